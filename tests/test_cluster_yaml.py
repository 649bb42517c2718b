import re
from pathlib import Path

import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

REPOSITORY = Path(__file__).resolve().parent.parent
CLUSTER = yaml.safe_load((REPOSITORY / "cluster.yaml").read_text())


def test_ray_accepts_the_cluster_file():
    validate_config(prepare_config(CLUSTER))


def test_gpu_nodes_are_on_spot_and_there_before_a_job_counts_them():
    gpu = CLUSTER["available_node_types"]["gpu"]
    assert gpu["min_workers"] >= 1
    assert gpu["resources"]["GPU"] >= 1
    assert gpu["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"


def test_nodes_run_the_pinned_ray_and_install_the_lock():
    pinned = re.search(r"^ray==([\d.]+)", (REPOSITORY / "requirements.lock").read_text(), re.MULTILINE)
    assert pinned
    assert f":{pinned[1]}-" in CLUSTER["docker"]["image"]
    mounted = CLUSTER["file_mounts"]["~/requirements.lock"]
    assert (REPOSITORY / mounted).is_file()
    assert any("--require-hashes" in command for command in CLUSTER["setup_commands"])


def test_authentication_is_explicit_wherever_ray_starts():
    starts = [c for c in CLUSTER["head_start_ray_commands"] + CLUSTER["worker_start_ray_commands"] if "ray start" in c]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
