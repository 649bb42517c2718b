"use strict";
(() => {
  const { plots, pairs, images } = JSON.parse(document.getElementById("data").textContent);
  const find = (id) => document.getElementById(id);
  const root = document.documentElement;

  // Theme: the system's, until the reader chooses. Storage may be forbidden where the page is shown in a frame.
  const themes = ["system", "light", "dark"];
  const memory = {
    get: () => { try { return localStorage.getItem("theme"); } catch { return null; } },
    set: (value) => { try { localStorage.setItem("theme", value); } catch { /* not kept */ } },
  };
  let theme = themes.includes(memory.get()) ? memory.get() : "system";
  const darkSystem = matchMedia("(prefers-color-scheme: dark)");
  function applyTheme() {
    if (theme === "system") delete root.dataset.theme; else root.dataset.theme = theme;
    find("theme").textContent = `Theme: ${theme}`;
    drawAll();
  }
  find("theme").addEventListener("click", () => {
    theme = themes[(themes.indexOf(theme) + 1) % themes.length];
    memory.set(theme);
    applyTheme();
  });
  darkSystem.addEventListener("change", () => theme === "system" && drawAll());

  // Every figure is of the chosen held-out images alone.
  const chosenImages = () => find("images").value;
  const chosenPlots = () => plots[chosenImages()];

  // Plots: the traces are given; colours of text and grid are the page's, and what is filtered out is left out.
  let visible = null;
  const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  function axis(given, narrow) {
    return {
      gridcolor: colour("--grid"), linecolor: colour("--strong-line"), zeroline: false, automargin: true,
      ...given, title: { ...given.title, standoff: 8, font: { size: narrow ? 12 : 13 } },
    };
  }
  function draw(id, plot, keep = () => true) {
    const place = find(id);
    if (!place || !plot) return;
    const narrow = place.clientWidth < 560;
    const shown = plot.data.filter((trace) => keep(trace.meta.role)
      && (!visible || !trace.meta.groups.length || trace.meta.groups.some((group) => visible.has(group))));
    const traces = shown.map((trace) => {
      if (trace.meta.role === "front") return { ...trace, line: { ...trace.line, color: colour("--muted") } };
      if (trace.meta.role !== "point") return trace;
      return { ...trace, marker: { ...trace.marker, line: { ...trace.marker.line, color: colour("--text") } } };
    });
    Plotly.react(place, traces, {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: narrow ? 11 : 13, color: colour("--text") },
      margin: { l: narrow ? 44 : 60, r: 12, t: 10, b: 50 },
      hoverlabel: { bgcolor: colour("--panel"), bordercolor: colour("--strong-line"), font: { color: colour("--text") }, align: "left" },
      hovermode: "closest",
      legend: { orientation: "h", y: -0.2, yanchor: "top", x: 0, font: { size: narrow ? 10 : 12 }, itemwidth: 30 },
      xaxis: axis(plot.layout.xaxis, narrow), yaxis: axis(plot.layout.yaxis, narrow),
    }, {
      responsive: true, displaylogo: false,
      modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"], displayModeBar: narrow ? false : "hover",
    });
  }
  function drawCost() {
    if (find("cost")) draw("plot-cost", chosenPlots().cost[find("accuracy").value][find("cost").value]);
  }
  function drawCurves() {
    const weights = find("weights")?.value;
    if (!weights) return;
    const roles = { both: ["average", "raw", "band", "teacher"], average: ["average", "band", "teacher"], raw: ["raw", "teacher"] }[weights];
    draw("plot-curves", chosenPlots().curves, (role) => roles.includes(role));
  }
  function drawAll() {
    drawCost();
    drawCurves();
    draw("plot-size", chosenPlots().size);
  }
  for (const id of ["accuracy", "cost"]) find(id)?.addEventListener("change", drawCost);
  find("weights")?.addEventListener("change", drawCurves);

  // Sorting: numbers by value, what is blank last; a header goes from one order to the other.
  function value(row, column) {
    const cell = row.children[column];
    if ("value" in cell.dataset) return Number(cell.dataset.value);
    const text = cell.textContent.trim();
    return text === "" || Number.isNaN(Number(text)) ? text : Number(text);
  }
  function compare(a, b, sign) {
    if (a === "" || b === "") return (a === "") - (b === "");
    if (typeof a === "number" && typeof b === "number") return sign * (a - b);
    return sign * String(a).localeCompare(String(b), undefined, { numeric: true });
  }
  for (const table of document.querySelectorAll("table")) {
    const headers = [...table.tHead.rows[0].cells];
    headers.forEach((header, column) => header.querySelector("button")?.addEventListener("click", () => {
      const first = header.classList.contains("number") ? "descending" : "ascending";
      const other = first === "descending" ? "ascending" : "descending";
      const order = header.getAttribute("aria-sort") === first ? other : first;
      for (const each of headers) if (each.hasAttribute("aria-sort")) each.setAttribute("aria-sort", "none");
      header.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const rows = [...table.tBodies[0].rows].map((row) => [value(row, column), row]);
      rows.sort(([a], [b]) => compare(a, b, sign));
      table.tBodies[0].append(...rows.map(([, row]) => row));
    }));
  }

  // Filter: every word must occur in a run or in its group; a group stays while one of its runs does.
  const rowsOf = (id) => [...(find(id)?.tBodies[0].rows ?? [])];
  const runs = rowsOf("table-runs"), groups = rowsOf("table-groups"), changes = rowsOf("table-changes");
  const words = new Map();
  for (const row of [...groups, ...changes]) {
    words.set(row.dataset.group, `${words.get(row.dataset.group) ?? ""} ${row.cells[0].textContent}`.toLowerCase());
  }
  function filter() {
    const wanted = find("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const kept = new Set();
    let count = 0;
    for (const row of runs) {
      const text = `${row.textContent.toLowerCase()} ${words.get(row.dataset.group) ?? ""}`;
      // A run without figures belongs to no images; it is shown with all.
      const other = row.dataset.images !== "" && row.dataset.images !== chosenImages();
      row.hidden = other || !wanted.every((word) => text.includes(word));
      if (row.hidden) continue;
      if (row.dataset.group) kept.add(Number(row.dataset.group));  // a run that has not finished may be in none
      count += 1;
    }
    for (const row of [...groups, ...changes]) row.hidden = !kept.has(Number(row.dataset.group));
    visible = wanted.length ? kept : null;
    find("count").textContent = count < runs.length ? `${count} of ${runs.length} runs` : "";
    drawAll();
  }
  find("search").addEventListener("input", filter);
  find("images").addEventListener("change", () => {
    // An accuracy that these groups lack gives way to one that they have.
    const measured = ({ value }) => Object.values(chosenPlots().cost[value])
      .some((plot) => plot.data.some((trace) => trace.meta.role === "point"));
    const options = [...(find("accuracy")?.options ?? [])];
    const kept = options.find((option) => option.selected);
    const next = kept && !measured(kept) && options.find(measured);
    if (next) find("accuracy").value = next.value;
    filter();
  });

  // Two groups.
  const chosen = (id) => find(id).selectedOptions[0].textContent;
  function reason(measure, numbers) {
    const name = chosen("pair-measure"), labels = [chosen("pair-first"), chosen("pair-second")];
    const used = numbers.map((number) => images[measure][number]);
    const lacking = labels.filter((_, index) => used[index] === null);
    if (lacking.length) return `Not compared: there is no ${name} of ${lacking.join(" nor of ")}.`;
    return `Not compared: ${name} of ${labels[0]} was measured on ${used[0]}, that of ${labels[1]} on ${used[1]}.`;
  }
  function tell() {
    const [a, b] = [find("pair-first").value, find("pair-second").value].map(Number);
    const measure = find("pair-measure").value;
    const found = pairs[`${measure} ${Math.min(a, b)} ${Math.max(a, b)}`];
    find("statement").textContent = found ?? (a === b ? "Choose two groups." : reason(measure, [a, b]));
  }
  if (find("statement")) {
    for (const id of ["pair-measure", "pair-first", "pair-second"]) find(id).addEventListener("change", tell);
    tell();
  }
  applyTheme();
  filter();
})();
