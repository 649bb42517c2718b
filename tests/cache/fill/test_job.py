"""What filling the cache tells MLflow, on a real SQLite store."""

from pipeline.cache.fill.build import plan_cache
from pipeline.cache.fill.job import precompute
from pipeline.storage.store import Store
from pipeline.tracking.run import start_run
from tests.fakes import without_ray


def test_a_start_that_computes_nothing_leaves_what_an_earlier_one_logged(photo_config, tmp_path, monkeypatch):
    without_ray(monkeypatch)
    config, uri = photo_config(), f"sqlite:///{tmp_path}/mlflow.db"
    run = start_run(uri, experiment="e", name="r", config={"a": 1}, tags={}, work=tmp_path)
    logged = []
    for _ in range(2):
        _, report = precompute(config, plan_cache(config, Store.at(tmp_path / "cache")), run)
        run.flush()
        logged.append((report.shards_computed, run.client.get_run(run.run_id).data.metrics))
    (first, metrics), (second, later) = logged
    assert second == 0 < first == metrics["shards_computed"]
    assert metrics == later
    assert metrics.keys() >= {"images_extracted", "images_per_second", "seconds", "quarantined", "cache_bytes"}
