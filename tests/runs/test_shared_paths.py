"""Paths that another node does not see are refused with the remedy; the other nodes are pretended."""

import logging
from pathlib import Path

import pytest

from pipeline.config.load import load_config
from pipeline.distill.config import DistillJobConfig
from pipeline.errors import UserError
from pipeline.runs import shared_paths as shared
from pipeline.runs.folder import work_folder
from pipeline.runs.shared_paths import check_shared
from tests.fakes import write_photos


@pytest.fixture
def cluster(monkeypatch):
    """Two more nodes; gives the paths that each was asked about, and a set of folders that the second does not see."""
    asked, unseen = [], set()

    def ask(nodes, paths):
        assert nodes == {"id1": "10.0.0.1", "id2": "10.0.0.2"}
        asked.extend(paths)
        assert all(Path(path).exists() for path in paths)
        hidden = [path for path in paths if any(str(path).startswith(str(folder)) for folder in unseen)]
        return {"10.0.0.1": [], "10.0.0.2": hidden}

    monkeypatch.setattr(shared, "_other_nodes", lambda: {"id1": "10.0.0.1", "id2": "10.0.0.2"})
    monkeypatch.setattr(shared, "_ask", ask)
    return asked, unseen


@pytest.fixture
def config(tmp_path):
    for split in ("train", "val"):
        write_photos(tmp_path / "photos" / split, 2)
    (tmp_path / "weights.pth").touch()
    data = [f"data.{split}={tmp_path}/photos/{split}" for split in ("train", "val")]
    cache = f"cache.uri={tmp_path}/cache"
    teachers = f"teachers=[hog, {{model: dinov2/vits14, weights: {tmp_path}/weights.pth}}]"
    return load_config(DistillJobConfig, None, [*data, cache, teachers, f"work={tmp_path}/work"])


def test_every_path_of_a_job_is_asked_for_and_the_markers_are_removed(tmp_path, cluster, config):
    check_shared(config)
    asked = {str(Path(path).relative_to(tmp_path)) for path in cluster[0]}
    assert {"photos/train", "photos/val", "weights.pth"} < asked
    markers = asked - {"photos/train", "photos/val", "weights.pth"}
    assert sorted(Path(marker).parent.name for marker in markers) == ["cache", "work"]
    assert not list(tmp_path.rglob(".seen-*"))


def test_no_node_is_asked_about_a_store(tmp_path, cluster, config):
    data = config.data.model_copy(update={"train": "s3://bucket/train-{000..127}.tar", "val": "https://host/val.tar"})
    check_shared(config.model_copy(update={"data": data}))
    assert not [path for path in cluster[0] if "://" in str(path)]


@pytest.mark.parametrize(
    ("folder", "field", "remedy"),
    [
        ("work", "work", "is not the same folder on node 10.0.0.2 of the cluster; name one on a shared file system"),
        ("cache", "cache.uri", "or an object store"),
        ("photos/train", "data.train", "copy it to every node"),
        ("photos/val", "data.val", "copy it to every node"),
        ("weights.pth", "teachers.1.weights", "copy it to every node"),
    ],
)
def test_a_path_that_one_node_does_not_see_is_refused_with_the_remedy(tmp_path, cluster, config, folder, field, remedy):
    cluster[1].add(tmp_path / folder)
    with pytest.raises(UserError, match=rf"^{field}: .*{folder}.*{remedy}") as refused:
        check_shared(config)
    assert ".seen-" not in str(refused.value)
    assert not list(tmp_path.rglob(".seen-*"))


def test_generated_scenes_and_an_object_store_need_no_shared_folder_but_work(tmp_path, cluster, monkeypatch):
    monkeypatch.setattr("pipeline.storage.store.Store.check", lambda store: None)
    check_shared(load_config(DistillJobConfig, None, [f"work={tmp_path}/work", "cache.uri=s3://bucket/cache"]))
    assert [Path(path).parent for path in cluster[0]] == [tmp_path / "work"]


@pytest.mark.usefixtures("ray_session")
def test_on_one_node_nothing_is_asked_or_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "_ask", lambda *_: pytest.fail("asked"))
    check_shared(load_config(DistillJobConfig, None, [f"work={tmp_path}/work"]))
    assert not (tmp_path / "work").exists()


@pytest.mark.usefixtures("ray_session")
def test_a_node_looks_for_itself_and_one_that_is_gone_is_only_warned_of(tmp_path, caplog):
    import ray

    here, gone = ray.get_runtime_context().get_node_id(), "0" * 56
    (tmp_path / "there").touch()
    paths = [f"{tmp_path}/there", f"{tmp_path}/absent"]
    with caplog.at_level(logging.WARNING):
        assert shared._ask({here: "here", gone: "gone"}, paths) == {"here": [f"{tmp_path}/absent"]}
    assert "nodes did not answer whether they see the work folder: gone" in caplog.text


def test_a_work_folder_in_an_object_store_is_refused_with_the_remedy():
    with pytest.raises(UserError, match=r"work=s3://bucket/work: .*cache\.uri"):
        work_folder(load_config(DistillJobConfig, None, ["work=s3://bucket/work"]))
