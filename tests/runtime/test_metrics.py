"""Gauges for Prometheus, and the dashboard that shows exactly those."""

import json
import re
from pathlib import Path

import pytest

from pipeline.runtime import metrics
from pipeline.runtime.metrics import GAUGES, export, export_training

DASHBOARD = json.loads((Path(__file__).resolve().parents[2] / "docs/grafana.json").read_text())


@pytest.fixture
def shown(monkeypatch):
    """What gauges were set to, by name and stage; Ray's own are made, and hold the value until it is scraped."""
    values = {}
    real = metrics._gauge

    class Seen:
        def __init__(self, name):
            self.name, self.gauge = name, real(name)

        def set(self, value, tags):
            self.gauge.set(value, tags=tags)
            values[self.name, tags["stage"]] = value

    monkeypatch.setattr(metrics, "_gauge", Seen)
    return values


def test_the_dashboard_shows_every_gauge_and_no_other_of_ours():
    expressions = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    names = {name for expression in expressions for name in re.findall(r"ray_(regla_\w+)", expression)}
    assert names == GAUGES.keys()
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in DASHBOARD["panels"]]
    assert len(set(places)) == len(places)


@pytest.mark.usefixtures("ray_session")
def test_figures_of_a_stage_become_gauges_with_its_name(shown):
    export("extract", {"shards": 3, "images_per_second": 20.5, "no_gauge": 1.0})
    assert shown == {("regla_shards", "extract"): 3, ("regla_images_per_second", "extract"): 20.5}


@pytest.mark.usefixtures("ray_session")
def test_of_a_training_the_latest_value_of_each_figure_is_exported(shown):
    export_training([(1, {"loss": 2.0, "data_wait_share": 0.5}), (2, {"loss": 1.0}), (2, {"knn": 70.0})])
    assert shown == {("regla_loss", "train"): 1.0, ("regla_data_wait_share", "train"): 0.5}
    export_training([(0, {"images_per_second": 3.0})])
    assert ("regla_images_per_second", "train") not in shown


def test_without_a_ray_session_nothing_happens(monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr(metrics, "_gauge", lambda name: pytest.fail("made"))
    export("train", {"loss": 1.0})
