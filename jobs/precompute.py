"""Fill the feature cache: every teacher on every image, once.

python jobs/precompute.py recipes/quickstart.yaml data.train=photos/train data.val=photos/val
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jobs._cli import run, size, table
from jobs._plan import cache_plan
from pipeline.cache.build import plan_cache
from pipeline.cache.job import cache_bytes, precompute
from pipeline.config import Config
from pipeline.job import open_job
from pipeline.runs import cache_store


def main(config: Config, dry_run: bool) -> dict[str, Any]:
    """Compute what the cache lacks of the recipe's teachers and images."""
    plan = plan_cache(config, cache_store(config))
    print(f"plan\n{cache_plan(plan, config)}", flush=True)
    if dry_run:
        return {"dry_run": True}
    with open_job(config, "precompute") as job, job.phase("precompute") as tracked:
        plan, report = precompute(config, plan, tracked)
    quarantined = sum(len(bad) for bad in report.quarantined.values())
    rows = {
        "shards computed": report.shards_computed,
        "quarantined images": quarantined,
        "cache": f"{plan.store.uri} ({size(cache_bytes(plan))})",
        "time": f"{report.seconds:.0f} s",
        "MLflow": f"{job.tracking_uri} run {job.run.run_id}",
    }
    print(f"done\n{table(rows)}")
    return {
        "shards_computed": report.shards_computed,
        "images_extracted": report.images_extracted,
        "quarantined": quarantined,
        "seconds": round(report.seconds, 1),
        "mlflow_run_id": job.run.run_id,
    }


if __name__ == "__main__":
    run(main, __doc__)
