import csv

from pipeline.compare.comparison import Comparison
from pipeline.compare.tables import curves_frame, groups_frame, render_markdown, render_text, runs_frame
from pipeline.tracking.reading import read_experiment
from tests.compare.experiments import HOSTILE


def read_csv(file):
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def test_the_runs_are_a_table_for_machines_with_blanks_for_what_is_not_known(comparison, tmp_path):
    runs_frame(comparison).to_csv(tmp_path / "runs.csv", index=False)
    rows = {row["name"]: row for row in read_csv(tmp_path / "runs.csv")}
    assert len(rows) == 13
    row = rows["regla_s-din-1-distill"]
    assert (row["group"], row["teachers"], row["seed"]) == (
        "regla_s · hog + dinov2/vits14",
        "hog + dinov2/vits14",
        "1",
    )
    assert (float(row["parameters"]), float(row["latency"]), float(row["cache_bytes"])) == (6_100_000, 5.1, 60e6)
    assert (row["linear"], row["top1"], row["gpu_hours"], row["cost"]) == ("", "", "", "")


def test_a_cell_that_a_spreadsheet_would_run_is_text(comparison, tmp_path):
    runs_frame(comparison).to_csv(tmp_path / "runs.csv", index=False)
    assert f"'{HOSTILE}-distill" in [row["name"] for row in read_csv(tmp_path / "runs.csv")]
    curves_frame(comparison).to_csv(tmp_path / "curves.csv", index=False)
    rows = read_csv(tmp_path / "curves.csv")
    assert len(rows) == 13 * 3
    assert (rows[0]["epoch"], rows[0]["knn"]) == ("0.0", "11.0")
    assert not [cell for row in rows for cell in row.values() if cell.startswith(("=", "+", "-", "@"))]


def test_the_groups_have_mean_deviation_and_number_of_seeds(comparison, tmp_path):
    groups_frame(comparison).to_csv(tmp_path / "groups.csv", index=False)
    rows = {row["group"]: row for row in read_csv(tmp_path / "groups.csv")}
    assert len(rows) == 6
    found = rows["regla_t · hog"]
    assert (found["knn_n"], found["linear_n"], found["top1_n"]) == ("2", "1", "")
    assert float(found["knn_std"]) > 0
    assert rows["regla_s · hog + clip/ViT-B-32@openai"]["front"] == "parameters latency cache_bytes samples_seen"


def test_the_terminal_shows_runs_groups_changes_and_what_is_significant(comparison):
    text = render_text(comparison)
    for expected in (
        "13 runs in 6 groups",
        "all: job distill, data cifar, input 64 px, codec pca-int8-zstd, views whole image",
        "teachers.1.model",
        "(t-test, paired by seed, 2 seeds)",
        "Latency: fused, 64 px, batch 1, float32, CPU, 1 thread(s), run run-benchmark.",
        "Unfinished, and not counted: broken-distill.",
        "Runs without a student, not shown: 1 benchmark",
    ):
        assert expected in text
    assert "teachers.1.codec" not in text
    assert "GPU hours" not in text


def test_names_do_not_steer_a_terminal_nor_a_markdown_table(store):
    run = store.start("distill", name="\x1b[31mred\x07 | <b>bold</b> [link](http://x)")
    run.finish()
    found = Comparison.of(read_experiment(store.uri, store.experiment))
    assert "\x1b" not in render_text(found)
    assert "\x07" not in render_text(found)
    line = next(line for line in render_markdown(found, []).splitlines() if "red" in line)
    assert "\\| \\<b\\>bold\\</b\\> \\[link\\]" in line


def test_markdown_has_tables_of_equal_width_and_the_figures(comparison):
    text = render_markdown(comparison, [("Accuracy against cost", "figure1.png")])
    assert "![Accuracy against cost](figure1.png)" in text
    for block in text.split("\n\n"):
        if block.startswith("| "):
            widths = {line.replace("\\|", "").count("|") for line in block.splitlines()}
            assert len(widths) == 1
