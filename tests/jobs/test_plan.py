"""What `--plan` says of a cluster."""

import argparse
from dataclasses import replace

import pytest
import torch

from jobs import distill
from jobs._plan import cost_plan
from pipeline.cache.fill import estimate
from pipeline.cache.fill.estimate import Probe, estimate_cache
from pipeline.distill.estimate import time_student
from pipeline.runtime.ray_session import Hardware
from pipeline.runtime.units import time_span


@pytest.fixture
def estimates(filled, monkeypatch):
    """Of two teachers on a pretended GPU, the first shards of which are missing."""
    monkeypatch.setattr(type(filled.plan.splits[0]), "missing", lambda split, teacher: split.dataset.shards[:1])
    asked = []

    def ask(teacher, batch_size):
        asked.append(teacher.id)
        return Probe("NVIDIA Pretended", 0.5, 10**9, True, 3 << 30)

    found = estimate_cache(filled.plan, filled.config, ask)
    assert asked == [teacher.id for teacher in filled.plan.teachers]
    return found


def test_a_cluster_is_named_with_its_gpus_memory_hours_and_price(filled, estimates):
    cluster = Hardware(3, 24, 2, ("H100",))
    text = cost_plan(filled.plan, filled.config, estimates, cluster)
    total = sum(found.gpu_hours for found in estimates)
    assert total == pytest.approx(2 * (100 + 40) / 0.5 / 3600)
    assert f"3 nodes, 24 CPUs, 2 GPUs (H100): {time_span(3600 * total / 2)} on all GPUs" in text
    assert "3.0 GiB" in text
    assert f"{estimates[0].gpu_hours * filled.config.plan.gpu_hour_price:.2f}" in text


def test_a_plan_ends_with_totals_in_units_that_a_person_reads(filled, estimates):
    rows = [line.split() for line in cost_plan(filled.plan, filled.config, estimates).splitlines()]
    *_, total = (row for row in rows if row[:1] == ["all"])
    assert total == ["all", "280", "of", "380", "9.3", "min", "9.3", "min", "0.31"]
    brief = [replace(found, hours=2e-9, gpu_hours=8.32e-06) for found in estimates]
    text = cost_plan(filled.plan, filled.config, brief)
    assert "under 0.1 s" in text
    assert "e-0" not in text
    unknown = [estimates[0], replace(estimates[1], hours=None, gpu_hours=None)]
    rows = [line.split() for line in cost_plan(filled.plan, filled.config, unknown).splitlines()]
    assert next(row for row in rows if row[:1] == ["all"])[4:] == ["unknown"] * 3


def test_a_cluster_without_gpus_says_so_and_one_machine_says_nothing(filled, estimates):
    assert "3 nodes, 24 CPUs, 0 GPUs: teachers run on CPUs" in cost_plan(
        filled.plan, filled.config, estimates, Hardware(3, 24, 0, ())
    )
    assert "nodes" not in cost_plan(filled.plan, filled.config, estimates)
    assert estimate.Probe("cpu", 1.0, 1, True).memory == 0


def test_the_plan_of_a_distillation_ends_with_the_time_of_its_training(photo_config, capsys, monkeypatch):
    monkeypatch.setattr(distill, "time_student", lambda config: (20.0, "cpu"))
    config = photo_config("phases=[{train.epochs: 2}, {train.epochs: 3, train.batch_size: 32}]", "data.val=none")
    figures = distill.show_plan(config, argparse.Namespace())
    first, second = 2 * (150 // 16) * 16 / 20, 3 * (150 // 32) * 32 / 20
    assert figures["training_hours"] == pytest.approx((first + second) / 3600)
    assert figures["views_missing"] == 2 * 2 * 150
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].split()[:4] == ["1", "288", "20.0", "images/s"]
    assert lines[-1].endswith(time_span(second))


def test_a_student_is_timed_at_its_size(photo_config):
    rate, device = time_student(photo_config("student.name=timm/test_resnet", "student.token_dim=16"))
    assert rate > 0
    assert device == ("cuda" if torch.cuda.is_available() else "cpu") or "NVIDIA" in device
