"""What a log line says of itself."""

import json
import logging
import threading

import pytest

from pipeline.runtime import logs
from pipeline.runtime.progress import Progress


@pytest.fixture
def written(monkeypatch, capsys):
    """Configure our loggers as a worker does; gives the lines on stderr."""

    def configured(form):
        monkeypatch.setenv("REGLA_LOG", form)
        logs.configure_worker()
        return lambda: capsys.readouterr().err.splitlines()

    return configured


ROW = {"split": "train", "shard": 12}


def test_a_json_line_names_run_stage_and_shard_wherever_the_row_went(written):
    lines = written("json")
    with logs.context(run="photos-distill-41b70301", stage="precompute"):
        row = {**ROW, **logs.row_context()}

    def work():
        with logs.shard_context(row, "extract"):
            logging.getLogger("pipeline.storage.remote").warning("cannot read %s", "it")

    elsewhere = threading.Thread(target=work)
    elsewhere.start()
    elsewhere.join()
    (line,) = map(json.loads, lines())
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "warning",
        "message": "cannot read it",
        "logger": "pipeline.storage.remote",
        "run": "photos-distill-41b70301",
        "stage": "extract",
        "shard": "train/12",
    }


def test_a_plain_line_is_for_people(written):
    lines = written("text")
    with logs.shard_context(ROW, "index"):
        logging.getLogger("pipeline.x").warning("slow")
    logging.getLogger("pipeline.x").warning("slow")
    logging.getLogger("pipeline.x").info("chatter")
    assert lines() == ["WARNING: slow [index train/12]", "WARNING: slow"]


def test_an_exception_stays_one_json_line(written):
    lines = written("json")
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logging.getLogger("pipeline.x").exception("failed")
    (line,) = map(json.loads, lines())
    assert line["message"] == "failed"
    assert line["exception"].endswith("ValueError: two\nlines")


def test_progress_is_a_json_line_with_its_figures(written, capsys):
    lines = written("json")
    with Progress(10, "img", "index") as progress, logs.context(stage="index"):
        progress.update(10)
    assert capsys.readouterr().out == ""
    with Progress(10, "img", "index") as progress:
        progress.update(10)
    (line,) = map(json.loads, lines())
    assert (line["done"], line["total"], line["unit"]) == (10, 10, "img")
    assert line["message"].startswith("index  10/10 img")
