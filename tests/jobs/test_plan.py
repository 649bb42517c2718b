"""What `--plan` says of a cluster."""

from dataclasses import replace

import pytest

from jobs._plan import cost_plan
from pipeline.cache.fill import estimate
from pipeline.cache.fill.estimate import Probe, estimate_cache
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
