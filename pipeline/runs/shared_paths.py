"""Checks, before anything expensive, that all nodes of a cluster see the files of a job."""

import logging
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pipeline.errors import UserError
from pipeline.runs.config import JobConfig
from pipeline.runs.folder import work_folder
from pipeline.runtime.ray_session import is_in_process
from pipeline.sources.locations import absolute, expand
from pipeline.storage.remote import is_uri
from pipeline.storage.store import Store

PATIENCE_S = 60.0
"""Seconds to wait for answers of the other nodes."""

log = logging.getLogger(__name__)


def check_shared(config: JobConfig) -> None:
    """Raise a UserError that names the field, path and node if another node does not see a path of the job.

    Folders for writing must be the same everywhere: the other nodes look for a marker file in them. Files that are only read
    may be copies at the same path. Nodes that join later are not checked.
    """
    nodes = _other_nodes()
    if not nodes:
        return
    with ExitStack() as markers:
        fields = {str(markers.enter_context(_marked(folder))): field for field, folder in _written(config).items()}
        local = {field: path for field, path in config.inputs().items() if not is_uri(path)}
        fields |= {expand(absolute(path))[0]: field for field, path in local.items()}
        for address, missing in _ask(nodes, list(fields)).items():
            for path in missing:
                raise UserError(_refusal(fields[path], path, address))


def _refusal(field: str, path: str, address: str) -> str:
    if field in ("work", "cache.uri", "train.checkpoints"):
        store = "" if field == "work" else ", or an object store (s3://..., gs://...)"
        return (
            f"{field}: {Path(path).parent} is not the same folder on node {address} of the cluster; "
            f"name one on a shared file system{store}"
        )
    return f"{field}: node {address} of the cluster has no {path}; put it on a shared file system, or copy it to every node"


def _written(config: JobConfig) -> dict[str, Path]:
    stores = {field: Store.at(folder) for field, folder in config.shared_folders().items()}
    return {"work": work_folder(config)} | {field: Path(s.uri) for field, s in stores.items() if s.is_local}


@contextmanager
def _marked(folder: Path) -> Iterator[Path]:
    """A new marker file; its name is unique, because network file systems cache that a name is absent."""
    marker = folder / f".seen-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        marker.touch()
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
    try:
        yield marker
    finally:
        marker.unlink(missing_ok=True)


def _other_nodes() -> dict[str, str]:
    """Address by id of the alive nodes except this process's own."""
    if is_in_process():
        return {}
    import ray

    own = ray.get_runtime_context().get_node_id()
    return {
        node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != own
    }


def _ask(nodes: Mapping[str, str], paths: Sequence[str]) -> dict[str, list[str]]:
    """The missing paths by address, for the nodes that answer."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    @ray.remote(num_cpus=0, max_retries=0)
    def missing() -> list[str]:  # nested, so that it travels by value: other nodes may lack this checkout
        return [path for path in paths if not os.path.exists(path)]

    pinned = {
        missing.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(): address
        for node, address in nodes.items()
    }
    answered, silent = ray.wait(list(pinned), num_returns=len(pinned), timeout=PATIENCE_S)
    answers = {}
    for reference in answered:
        try:
            answers[pinned[reference]] = ray.get(reference)
        except ray.exceptions.RayError:
            silent.append(reference)
    if silent:
        addresses = ", ".join(pinned[reference] for reference in silent)
        log.warning("nodes did not answer whether they see the work folder: %s", addresses)
    return answers
