"""How many actors share a GPU, with how many threads, and what is said where a GPU waits."""

import pytest

from pipeline.cache.fill import ray_pipeline
from pipeline.cache.fill.placement import CONTEXT_BYTES, Measured, Placement, actors_per_gpu, measure, place, starved

GIB = 1 << 30


def _measured(memory, total=80 * GIB, device_s=0.01, host_s=0.01):
    return Measured(memory, total, device_s, host_s)


@pytest.mark.parametrize(
    ("memory", "actors"), [(80 * GIB, 1), (37 * GIB, 1), (36 * GIB, 2), (24 * GIB, 3), (18 * GIB, 4), (GIB, 4)]
)
def test_as_many_actors_share_a_gpu_as_its_memory_holds_with_a_tenth_to_spare(memory, actors):
    assert actors_per_gpu(_measured(memory)) == actors


def test_what_was_not_measured_gets_a_gpu_of_its_own():
    assert actors_per_gpu(None) == 1
    assert actors_per_gpu(_measured(0, 0)) == 1
    assert place(33, 4, 100, 8) == Placement(4, 1.0, 8)


def test_an_actor_has_the_threads_that_keep_the_device_fed_and_no_more():
    # Decoding takes 4 times the device: 5 threads with a quarter to spare, shared by the two actors of a GPU.
    measured = _measured(30 * GIB, host_s=0.04)
    assert place(65, 4, 100, 16, measured) == Placement(8, 0.5, 3)
    assert place(65, 4, 100, 16, _measured(60 * GIB, host_s=0.04)) == Placement(4, 1.0, 5)
    assert place(9, 4, 100, 2, measured) == Placement(8, 0.5, 1)
    assert place(65, 4, 100, 16, _measured(60 * GIB, host_s=0.5)).threads == 16


def test_no_actor_asks_for_more_than_the_smallest_node_has():
    # 8 CPUs beside a GPU, and 64 more on nodes that decode; then two CPUs beside each GPU, for two actors.
    assert place(72, 1, 100, 8) == Placement(1, 1.0, 8)
    assert place(65, 4, 100, 2, _measured(30 * GIB, host_s=0.5)) == Placement(8, 0.5, 1)
    assert place(20, 0, 100, 4) == Placement(4, 0, 4)


def test_the_smallest_node_decides_and_one_without_cpus_does_not_count(monkeypatch):
    def room(gpus, *nodes):
        monkeypatch.setattr(ray_pipeline, "gpus", lambda: gpus)
        monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": node} for node in nodes])
        return ray_pipeline._node_cpus()

    monkeypatch.setattr(ray_pipeline, "is_cluster", lambda: True)
    head, large, small = {"memory": 1.0}, {"CPU": 16.0}, {"CPU": 4.0}
    assert room(0, head, large, small) == 4
    assert room(3, head, large, {"CPU": 8.0, "GPU": 1.0}, {"CPU": 12.0, "GPU": 2.0}) == 6
    assert room(0, head) == 1


def test_there_are_no_more_actors_than_shards():
    assert place(65, 4, 3, 16, _measured(GIB)).actors == 3
    assert place(9, 0, 2, 2) == Placement(2, 0, 2)


def test_without_gpus_actors_share_the_cpus_but_one():
    assert place(4, 0, 100, 2) == Placement(1, 0, 2)
    assert place(13, 0, 100, 16) == Placement(1, 0, 8)
    assert place(1, 0, 100, 1) == Placement(1, 0, 1)


def test_a_placement_says_what_it_is():
    assert str(Placement(8, 0.5, 3)) == "8 actors, each 0.5 of a GPU, 3 threads each"
    assert str(Placement(2, 0, 2)) == "2 actors, 2 threads each"


def test_what_keeps_a_gpu_waiting_is_named_with_its_remedy():
    stages = {"teacher": 100.0, "render": 250.0, "read": 5.0, "encode": 20.0, "write": 25.0}
    line = starved(stages, seconds=100, gpus=2)
    assert line == (
        "the GPUs were busy 50% of the extraction; decoding and resizing takes 62% of the actors' time: "
        "more CPUs per GPU, or smaller images"
    )
    assert "a faster store" in starved({**stages, "write": 900.0}, 100, 2)


def test_busy_gpus_short_extractions_and_cpus_are_passed_over():
    assert starved({"teacher": 181.0, "render": 500.0}, 100, 2) == ""
    assert starved({"teacher": 1.0}, 59, 2) == ""
    assert starved({"teacher": 1.0}, 100, 0) == ""


def test_a_probe_asks_all_teachers_about_views_of_a_shard(filled):
    (part,) = filled.train.parts
    found = measure({part.key: part}, [(part.key, 0)], filled.plan.teachers, 16, {"part": part.key, "shard": 0}, "cpu")
    assert found.memory == 0 < CONTEXT_BYTES
    assert found.device_s > 0
    assert found.host_s > 0
