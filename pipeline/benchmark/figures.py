"""Figures of the benchmark, as PNG files."""

from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

matplotlib.use("Agg")

PUBLISHED = Path(__file__).with_name("published.csv")
"""Published top-1 on ImageNet-1K: model, parameters in millions, resolution, top1, training, source."""


def latency_figure(table: pd.DataFrame, path: Path) -> None:
    """Median latency against image side, one panel per form, log-log, with quartiles as bands."""
    forms = list(dict.fromkeys(table.form))
    figure = Figure(figsize=(5.2 * len(forms), 4.6), layout="constrained")
    panels = figure.subplots(1, len(forms), squeeze=False, sharey=True)[0]
    for panel, form in zip(panels, forms, strict=True):
        for model, line in table[table.form == form].sort_values("size").groupby("model", sort=False):
            ours = str(model).startswith("regla")
            style = {"color": "black", "linewidth": 2.2} if ours else {"linewidth": 1.1}
            (drawn,) = panel.plot(line["size"], line.milliseconds, marker="o", markersize=3, label=str(model), **style)
            band = {"color": drawn.get_color(), "alpha": 0.15, "linewidth": 0}
            panel.fill_between(line["size"], line.milliseconds_q1, line.milliseconds_q3, **band)
        sides = sorted(table["size"].unique())
        panel.set(xscale="log", yscale="log", title=form, xlabel="side of the image, pixels")
        panel.set_xticks(sides, [str(side) for side in sides])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    setting = table.iloc[0]
    where = f"{setting.threads} thread(s)" if setting.device == "cpu" else "GPU"
    panels[0].set_ylabel(f"latency, ms ({setting.device}, {where}, {setting.precision}, batch {setting.batch})")
    panels[-1].legend(fontsize=7)
    figure.savefig(path, dpi=150)


def accuracy_figure(path: Path) -> None:
    """Published top-1 against parameters (figure 1 of the ReGLA paper); hollow markers are claims of that paper.

    :data:`PUBLISHED` gives the source of each accuracy. This project has not trained ReGLA on ImageNet-1K.
    """
    rows = pd.read_csv(PUBLISHED)
    figure = Figure(figsize=(7.5, 5.2), layout="constrained")
    panel = figure.subplots()
    for family, group in rows.groupby(rows.model.str.split("_").str[0], sort=True):
        claimed = family == "regla"
        style: Any = {"s": 60, "facecolors": "none", "edgecolors": "black"} if claimed else {"s": 22}
        label = "ReGLA-M, as the paper states" if claimed else str(family)
        panel.scatter(group.parameters, group.top1, label=label, **style)
    panel.set(xlabel="parameters, millions", ylabel="published top-1 on ImageNet-1K, %", xscale="log")
    panel.set_xticks([3, 5, 10, 20, 40], ["3", "5", "10", "20", "40"])
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    figure.savefig(path, dpi=150)
