from types import SimpleNamespace

import pytest

from pipeline.cache.build import plan_cache
from pipeline.cache.store import Store
from pipeline.config import load_config
from tests.fakes import fill_in_process, write_photos

TEACHERS = "teachers=[{model: 'tests.fakes:colours', args: {dim: 8}}, {model: 'tests.fakes:colours', args: {dim: 4}}]"


@pytest.fixture
def photo_config(tmp_path):
    """A configuration for 150 training and 40 held-out photos in shards of 100; more overrides may be given."""
    write_photos(tmp_path / "photos/train", 150)
    write_photos(tmp_path / "photos/val", 40, seed=1)

    def configure(*overrides: str):
        paths = [f"data.train={tmp_path}/photos/train", f"data.val={tmp_path}/photos/val", f"work={tmp_path}/work"]
        small = ["cache.shard_size=100", "student.input_size=32", "train.batch_size=16", "train.shuffle_window=64"]
        return load_config(None, [*paths, *small, TEACHERS, *overrides])

    return configure


@pytest.fixture
def filled(tmp_path, photo_config):
    """A complete cache: `plan`, `config`, and the `train` dataset."""
    config = photo_config()
    plan = plan_cache(config, Store.at(tmp_path / "cache"))
    assert fill_in_process(plan) == 6
    return SimpleNamespace(plan=plan, config=config, train=plan.split("train").dataset, val=plan.split("val").dataset)
