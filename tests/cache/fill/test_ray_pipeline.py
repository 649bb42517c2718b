import time

import pytest

from pipeline.cache.fill.ray_pipeline import run_tasks
from pipeline.errors import UserError


def _slow(row):
    time.sleep(30)
    return row


def test_a_pipeline_without_progress_ends_with_what_can_be_done(ray_session, monkeypatch):
    from ray.data import DataContext

    monkeypatch.setattr(DataContext.get_current(), "execution_no_progress_timeout_s", 2)
    with pytest.raises(UserError, match=r"no shard was finished for 2 s.*lower cache\.shard_size"):
        list(run_tasks([{"shard": 0}], _slow))
