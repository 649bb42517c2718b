"""Where actors come to lie on the real Ray, with GPUs that it is only told of: teachers that fit share one."""

import json
import os
import subprocess
import sys
import time
from collections import defaultdict

import pytest

from tests.conftest import REPOSITORY

ROWS, GPUS = 64, 2


class Recorder:
    """In place of `Extract`: answers every shard with the GPU that Ray gave to its actor."""

    def __init__(self, device, threads, batch_size):
        assert (device, batch_size) == ("cuda", 8)
        self.threads = threads

    def __call__(self, row):
        import ray

        time.sleep(2)  # so that every actor gets some
        (gpu,) = ray.get_runtime_context().get_accelerator_ids()["GPU"]
        return {**row, "gpu": gpu, "actor": os.getpid(), "threads": self.threads}


def main():
    """Extraction with teachers of which two fit on a GPU, and for which one thread decodes enough."""
    import ray

    from pipeline.cache.fill.placement import Measured
    from pipeline.cache.fill.ray_pipeline import run_in_actors

    ray.init(num_cpus=6, num_gpus=GPUS, include_dashboard=False, log_to_driver=False)
    measured = Measured(memory=30 << 30, total=80 << 30, device_s=1e-3, host_s=1e-3)
    rows = [{"shard": number} for number in range(ROWS)]
    print(json.dumps(list(run_in_actors(Recorder, rows, (), 8, measured))))


@pytest.mark.slow
def test_teachers_that_fit_share_a_gpu_and_every_gpu_is_used():
    command = [sys.executable, "-m", "tests.cache.fill.test_placement_on_ray"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    assert sorted(answer["shard"] for answer in answers) == list(range(ROWS))
    assert {answer["threads"] for answer in answers} == {1}
    actors = defaultdict(set)
    for answer in answers:
        actors[answer["gpu"]].add(answer["actor"])
    assert len(actors) == GPUS
    assert {len(found) for found in actors.values()} == {2}


if __name__ == "__main__":
    # By its name, which Ray's workers can import: `Recorder` of __main__ would travel with all that it refers to.
    from tests.cache.fill.test_placement_on_ray import main

    main()
