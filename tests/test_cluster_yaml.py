"""cluster.yaml against Ray's own schema and scheduler; rayjob.yaml against the fields that KubeRay's API defines."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import ClusterResourceConstraint

from pipeline.config.load import load_config
from pipeline.distill.config import DistillJobConfig

REPOSITORY = Path(__file__).resolve().parent.parent
CLUSTER = yaml.safe_load((REPOSITORY / "cluster.yaml").read_text())
JOB = yaml.safe_load((REPOSITORY / "rayjob.yaml").read_text())
NODES = CLUSTER["available_node_types"]
PINNED = re.search(r"^ray==([\d.]+)", (REPOSITORY / "requirements.lock").read_text(), re.MULTILINE)[1]

# ray.io/v1 of KubeRay 1.5, of which these are the parts that are used.
RAY_JOB = {
    "entrypoint": str,
    "submissionMode": str,
    "backoffLimit": int,
    "shutdownAfterJobFinishes": bool,
    "ttlSecondsAfterFinished": int,
    "rayClusterSpec": dict,
}
RAY_CLUSTER = {
    "rayVersion": str,
    "authOptions": dict,
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": dict,
    "headGroupSpec": dict,
    "workerGroupSpecs": list,
}
HEAD_GROUP = {"serviceType": str, "rayStartParams": dict, "template": dict}
WORKER_GROUP = {
    "groupName": str,
    "replicas": int,
    "minReplicas": int,
    "maxReplicas": int,
    "rayStartParams": dict,
    "template": dict,
}


def test_ray_accepts_the_cluster_file():
    validate_config(prepare_config(CLUSTER))


def _launched(gpus, availability):
    """Node types that Ray's autoscaler starts for so many GPUs, by how each type could be had of late."""
    types = AutoscalingConfig(prepare_config(CLUSTER), skip_content_hash=True).get_node_type_configs()
    demand = ClusterResourceConstraint(
        resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make({"GPU": 1})] * gpus)
    )
    reply = ResourceDemandScheduler(None).schedule(
        SchedulingRequest(
            node_type_configs=types,
            disable_launch_config_check=True,
            max_num_nodes=CLUSTER["max_workers"],
            cluster_resource_constraints=[demand],
            recoverable_resource_availabilities=availability,
            cloud_resource_availabilities=availability,
        )
    )
    return {request.instance_type: request.count for request in reply.to_launch}


@pytest.mark.parametrize(
    ("availability", "expected"),
    [({}, "gpu_spot"), ({"gpu_spot": 0.0}, "gpu_on_demand"), ({"gpu_spot": 0.0, "gpu_on_demand": 0.0}, "gpu_spot")],
)
def test_gpus_come_from_spot_and_on_demand_where_spot_could_not_be_had(availability, expected):
    assert _launched(2, availability) == {expected: 2}
    assert NODES["gpu_spot"]["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert "InstanceMarketOptions" not in NODES["gpu_on_demand"]["node_config"]


def test_gpus_are_asked_for_before_a_job_counts_them():
    asked = re.search(r"request_resources\(bundles=\[\{'GPU': 1\}\] \* (\d+)\)", CLUSTER["head_start_ray_commands"][-1])
    assert asked
    assert 1 <= int(asked[1]) <= NODES["gpu_spot"]["max_workers"]
    assert any("RAY_enable_autoscaler_v2=1" in command for command in CLUSTER["head_start_ray_commands"])


def test_nodes_run_the_pinned_ray_and_install_the_lock():
    assert f":{PINNED}-" in CLUSTER["docker"]["image"]
    assert f"FROM {CLUSTER['docker']['image']}\n" in (REPOSITORY / "Dockerfile").read_text()
    assert JOB["spec"]["rayClusterSpec"]["rayVersion"] == PINNED
    mounted = CLUSTER["file_mounts"]["~/requirements.lock"]
    assert (REPOSITORY / mounted).is_file()
    assert any("--require-hashes" in command for command in CLUSTER["setup_commands"])


def test_authentication_is_explicit_wherever_ray_starts():
    starts = [c for c in CLUSTER["head_start_ray_commands"] + CLUSTER["worker_start_ray_commands"] if "ray start" in c]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert JOB["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def test_no_node_is_public_or_may_do_more_than_it_must():
    assert CLUSTER["provider"]["use_internal_ips"] is True
    policies = (REPOSITORY / "docs/operations.md").read_text()
    for node in (node["node_config"] for node in NODES.values()):
        assert node["SubnetIds"]
        assert node["SecurityGroupIds"]
        assert node["MetadataOptions"]["HttpTokens"] == "required"
        assert node["BlockDeviceMappings"][0]["Ebs"]["Encrypted"] is True
        assert f"`{node['IamInstanceProfile']['Name']}`" in policies


def _has(values, fields):
    assert values.keys() <= fields.keys()
    assert all(isinstance(value, fields[name]) for name, value in values.items())


def test_the_ray_job_has_the_fields_of_kuberay():
    assert (JOB["apiVersion"], JOB["kind"]) == ("ray.io/v1", "RayJob")
    spec = JOB["spec"]
    _has(spec, RAY_JOB)
    assert spec["submissionMode"] in ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
    cluster = spec["rayClusterSpec"]
    _has(cluster, RAY_CLUSTER)
    _has(cluster["autoscalerOptions"], {"version": str, "idleTimeoutSeconds": int})
    _has(cluster["headGroupSpec"], HEAD_GROUP)
    for group in cluster["workerGroupSpecs"]:
        _has(group, WORKER_GROUP)
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_the_pods_of_the_ray_job_are_a_head_decoders_and_gpus():
    cluster = JOB["spec"]["rayClusterSpec"]
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    assert groups.keys() == {"decode", "gpu"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    templates = [cluster["headGroupSpec"]["template"], *(group["template"] for group in groups.values())]
    for pod in (template["spec"] for template in templates):
        (container,) = pod["containers"]
        assert pod["restartPolicy"] == "Never"  # as the second autoscaler demands
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["envFrom"] == [{"secretRef": {"name": "regla-distill", "optional": True}}]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    limits = [pod["spec"]["containers"][0]["resources"]["limits"] for pod in templates]
    assert ["nvidia.com/gpu" in limit for limit in limits] == [False, False, True]
    assert groups["gpu"]["minReplicas"] >= 1  # there before a job counts them
    assert NODES["gpu_spot"]["max_workers"] == groups["gpu"]["maxReplicas"]


def test_the_entrypoint_of_the_ray_job_names_files_of_the_image():
    words = shlex.split(JOB["spec"]["entrypoint"])
    files = [word for word in words if word.startswith("/home/ray/regla-distill/")]
    copied = re.findall(r"^COPY (\w+) ", (REPOSITORY / "Dockerfile").read_text(), re.MULTILINE)
    assert len(files) == 2
    for file in files:
        relative = Path(file).relative_to("/home/ray/regla-distill")
        assert (REPOSITORY / relative).is_file()
        assert relative.parts[0] in copied
    load_config(DistillJobConfig, REPOSITORY / relative, [word for word in words if "=" in word])
    assert set(copied) == {"jobs", "pipeline", "recipes", "teachers"}


def test_the_job_that_the_cluster_file_shows_is_understood():
    comment = re.sub(r"^# *", "", (REPOSITORY / "cluster.yaml").read_text(), flags=re.MULTILINE)
    script, recipe, *overrides = shlex.split(re.search(r'JOB="(.*?)"', comment, re.DOTALL)[1])
    assert (REPOSITORY / script).is_file()
    assert {teacher.weights for teacher in load_config(DistillJobConfig, REPOSITORY / recipe, overrides).teachers} == {
        "pretrained"
    }


def test_a_job_finds_the_variables_of_the_file_of_credentials(tmp_path):
    (start,) = (command for command in CLUSTER["head_start_ray_commands"] if "--head" in command)
    reads = start.partition("RAY_AUTH_MODE")[0].replace("/mnt/regla", str(tmp_path))

    def shown():
        command = f"{reads} printenv MLFLOW_TRACKING_USERNAME || true"
        return subprocess.check_output(["sh", "-c", command], text=True)

    assert shown() == ""
    (tmp_path / "job.env").write_text("MLFLOW_TRACKING_USERNAME=somebody\n")
    assert shown() == "somebody\n"


def test_secrets_are_in_no_manifest():
    for name in ("cluster.yaml", "rayjob.yaml", "Dockerfile"):
        text = (REPOSITORY / name).read_text()
        assert not re.search(r"AKIA|(SECRET_ACCESS_KEY|PASSWORD|TOKEN)\s*[:=]\s*(?!\.\.\.)[\w/+]", text)
