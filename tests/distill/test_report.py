"""The report of runs with and without labels, from a cache that is filled without Ray."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from pipeline.cache.fill.build import BuildReport
from pipeline.cache.fill.plan import plan_cache
from pipeline.distill import report as module
from pipeline.distill.job import DistillResult, make_job
from pipeline.distill.report import Filled, distill_report
from pipeline.distill.task import build_distiller
from pipeline.evaluate.chance import interval
from pipeline.report.report import render
from pipeline.storage.store import Store
from pipeline.student.model import save_encoder
from tests.fakes import fill_in_process
from tests.report.pages import Page

HOSTILE = "<img src=x onerror=alert(1)>"
STUDENT = ["student.name=timm/test_resnet", "student.token_dim=16", "student.head_dim=32"]


@pytest.fixture
def run(tmp_path, photo_config, monkeypatch):
    """The page of a run as if it had been trained; arguments replace those of its last phase."""
    first = next((tmp_path / "photos/train/class0").iterdir())
    first.rename(first.with_name(f"{HOSTILE}.jpg"))
    config = photo_config(*STUDENT, f"name={HOSTILE}", "teachers.0.weight={0: 1, 0.5: 0.2}")
    plan, _ = fill_in_process(plan_cache(config, Store.at(tmp_path / "cache")))
    job, folder = make_job(config, plan), tmp_path / "run"
    distiller = build_distiller(job)
    save_encoder(distiller.student.encoder, "timm/test_resnet", {}, 32, folder / "student")
    monkeypatch.setattr(module, "devices", lambda: (2.0, "2 x H100"))
    monkeypatch.setattr(module, "EXAMPLES", 1000)  # all

    def page(knn=(30.0, 45.0), teachers=(), lines=(), **changed):
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        result = DistillResult(
            *(knn or (None, None)),
            dict(teachers),
            *(20, 320, "models:/m-1", folder / "student", "", {}),
            (replace(job, **changed),),
            distiller.eval(),
            {"parameters": 2.7e6, "macs": 1e9},
        )
        state = SimpleNamespace(folder=folder, hours=0.5, gpu_hours=1.0)
        started = SimpleNamespace(
            name="distill", run=SimpleNamespace(run_id="abc"), tracking_uri="sqlite:///m.db", state=state
        )
        bad = BuildReport(seconds=90, quarantined={"train": [{"sample_id": "a", "reason": "b"}]})
        figures = {"cache_bytes": 3 * 2**20, "shards_computed": 6, "seconds": 1800.0}
        text = render(distill_report(started, config, result, Filled([plan], [bad]), figures))
        assert len(text) < 2e6
        shown = Page(text)
        shown.check()
        return shown

    return page


LINES = [
    {"step": 0, "knn": 30.0, "knn_raw": 30.0, "val_cosine/colours8/patches": 0.1},
    {"step": 10, "epoch": 1.0, "loss": 2.0, "loss/colours8/patches": 1.0, "loss/colours8/kept": 0.5},
    {"step": 10, "knn": 45.0, "knn_raw": 44.0, "val_cosine/colours8/patches": 0.6},
]


def test_a_labelled_run_shows_its_curves_with_chance_teachers_and_uncertainty(run):
    page = run(teachers={"colours8": 60.0, "colours4": 50.0}, lines=LINES)
    assert page.points("averaged weights") == [(0.0, 30.0), (1.0, 45.0)]
    assert page.points("raw weights") == [(0.0, 30.0), (1.0, 44.0)]
    assert page.points("colours8/patches") == [(0.0, 0.1), (1.0, 0.6), (1.0, 1.0)]
    low, high = interval(45.0, 40)
    assert f"45.0 % {low:.1f} to {high:.1f} % on 40 held-out images" in page.text
    assert "chance 35.0 %" in page.text
    assert "teacher colours8 60.0 %" in page.text
    assert "best teacher 60.0 % kNN of colours8" in page.text
    assert "colours8/kept" not in page.text
    assert "{0.0: 1.0, 0.5: 0.2}" in page.text
    assert len(page.elements["polygon"]) == 1


def test_it_shows_every_part_of_the_run_and_what_names_hold_as_text(run):
    page = run(teachers={"colours8": 60.0, "colours4": 50.0}, lines=LINES)
    expected = "Recipe, Data, Teachers, Curves, Features as colours, Cache, Cost, Load the student"
    assert page.titles == expected.split(", ")
    assert f"class0 {HOSTILE}.jpg" in page.text
    assert page.text.startswith(f"test_resnet from tests.fakes:colours+tests.fakes:colours seed0 {HOSTILE}-distill")
    assert "1 images cannot be read" in page.text
    assert re.search(r"class\d \(50\), class\d \(50\)", page.text)
    assert "time of this start 30 min" in page.text
    assert "time of earlier starts 30 min" in page.text
    assert "GPU hours 2, 4.00 at plan.gpu_hour_price=2" in page.text
    assert "load_predictor(" in page.text
    assert len(page.elements["img"]) == 150 + 6  # image, two teachers with their predictions, the student's own


@pytest.mark.parametrize("changed", [{"val": None}, {"val": None, "held_out": None}])
def test_a_run_without_labels_or_held_out_images_has_a_report_too(run, changed):
    page = run(knn=None, lines=[line for line in LINES if "loss" in line], **changed)
    assert "There is no kNN" in page.text
    assert "kNN of the student" not in page.text
    assert page.points("total") == [(1.0, 2.0)]
    assert len(page.elements["img"]) == 150 + 6


def test_without_the_file_of_curves_the_rest_is_there(run):
    page = run(teachers={"colours8": 60.0, "colours4": 50.0})
    assert "svg" not in page.elements
    assert "kNN of the student 45.0 %" in page.text
