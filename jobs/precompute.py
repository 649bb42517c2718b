"""Fill the feature cache: run every teacher once on every image. Also plan, verify, repair, list and clean up the cache.

python jobs/precompute.py recipes/quickstart.yaml data.train=photos/train data.val=photos/val
python jobs/precompute.py recipes/quickstart.yaml --plan                 bytes, hours and price, from a probe of the teachers
python jobs/precompute.py recipes/quickstart.yaml --verify --repair      check every file, recompute only broken ones
python jobs/precompute.py --list                                         what the cache holds
python jobs/precompute.py --delete <address>                             an address that --list prints
python jobs/precompute.py --gc                                           files that nothing refers to
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

if not __package__:  # a script imports from its own checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jobs._cli import Mode, confirm, grid, later, run, table
from pipeline.cache.config import PrecomputeJobConfig

MODES = {
    "--plan": ("show_plan", "probe the teachers; print bytes, hours, price, read rate and free space, and stop"),
    "--verify": (
        "verify",
        "check every file, compare all images with the source, recompute a sample; exit code 1: broken",
    ),
    "--list": ("show_inventory", "print what the cache holds, and stop"),
    "--gc": ("collect_garbage", "remove files of the cache that nothing refers to, after asking"),
}


def add_modes(parser: argparse.ArgumentParser, modes: Any) -> Callable[[argparse.Namespace], Mode | None]:
    """Add the flags for other work on the cache; see :data:`jobs._cli.AddModes`."""
    for flag, (function, text) in MODES.items():
        modes.add_argument(flag, dest="mode", action="store_const", const=function, help=text)
    modes.add_argument("--delete", metavar="ADDRESS", help="delete what --list shows at this address, after asking")
    parser.add_argument("--repair", action="store_true", help="recompute only what is broken; implies --verify")
    parser.add_argument("--yes", action="store_true", help="with --delete or --gc: do not ask")

    def choose(options: argparse.Namespace) -> Mode | None:
        mode = "delete" if options.delete else options.mode
        if options.repair:
            if options.dry_run or mode not in (None, "verify"):
                parser.error("--repair goes with --verify")
            mode = "verify"
        if options.yes and mode not in ("delete", "collect_garbage"):
            parser.error("--yes goes with --delete or --gc")
        return later("jobs.precompute", mode) if mode else None

    return choose


if __name__ == "__main__":
    run(PrecomputeJobConfig, later("jobs.precompute"), __doc__, add_modes=add_modes)
    sys.exit()

from jobs._plan import fill, print_costs, print_plan
from pipeline.cache.fill.estimate import check_space
from pipeline.cache.fill.plan import CachePlan, check_weights, plan_cache
from pipeline.cache.layout.snapshot import RecordSnapshot
from pipeline.cache.maintain.audit import Verification, check_begun, verify_cache
from pipeline.cache.maintain.garbage import find_garbage, remove_garbage
from pipeline.cache.maintain.inventory import Entry, delete_entry, find_entry, take_inventory
from pipeline.cache.maintain.repair import repair_cache
from pipeline.runs.folder import cache_store
from pipeline.runs.shared_paths import check_shared
from pipeline.runtime.ray_session import connect, hardware, hardware_line, is_cluster
from pipeline.runtime.units import size

SHOWN = 50
"""Lines shown of a table of findings or garbage; further ones are counted."""


def main(config: PrecomputeJobConfig, dry_run: bool) -> dict[str, Any]:
    """Compute what the cache lacks of the recipe's teachers and images, for all of its phases."""
    planned = _planned(config)
    check_weights(*(plan for _, plan in planned))
    if dry_run:
        return {"dry_run": True}
    check_space(*(plan for _, plan in planned))
    # MLflow takes seconds to import, which the other modes need not wait for.
    from pipeline.cache.fill.job import cache_bytes, image_bytes
    from pipeline.runs.session import open_job

    with open_job(config, "precompute") as job:
        reports = [report for _, report in fill(job, planned)]
    result = {
        "shards_computed": sum(report.shards_computed for report in reports),
        "images_read": sum(report.images_read for report in reports),
        "images_extracted": sum(report.images_extracted for report in reports),
        "quarantined": max(sum(map(len, report.quarantined.values())) for report in reports),
        "seconds": round(sum(report.seconds for report in reports), 1),
        "mlflow_run_id": job.run.run_id,
    }
    plans = [plan for _, plan in planned]
    rows = {
        "images read": result["images_read"],
        "shards computed": result["shards_computed"],
        "quarantined images": result["quarantined"],
        "cache": f"{plans[0].store.uri} ({size(cache_bytes(*plans))} of features, {size(image_bytes(*plans))} of images)",
        "time": f"{result['seconds']:.0f} s",
        "MLflow": f"{job.tracking_uri} run {job.run.run_id}",
    }
    print(f"done\n{table(rows)}")
    return result


def _planned(config: PrecomputeJobConfig) -> list[tuple[PrecomputeJobConfig, CachePlan]]:
    """Plan every phase (a recipe without phases is one), and print the plans."""
    store, snapshot = cache_store(config), RecordSnapshot()
    planned = [(phase, plan_cache(phase, store, snapshot)) for phase in config.cache_configs()]
    for number, (phase, plan) in enumerate(planned, 1):
        print_plan(phase, plan, number, len(planned))
    return planned


def show_plan(config: PrecomputeJobConfig, _: argparse.Namespace) -> dict[str, Any]:
    """Probe the teachers and print the cost of filling the cache; raise an error if it cannot fit."""
    with connect() if is_cluster() else nullcontext():
        cluster, planned = hardware() if is_cluster() else None, _planned(config)
        return print_costs(planned, cluster)


def verify(config: PrecomputeJobConfig, options: argparse.Namespace) -> dict[str, Any]:
    """Check the cache of the recipe; with --repair, recompute what is broken."""
    planned = _planned(config)
    for _, plan in planned:
        check_begun(plan)
    found, left = [], 0
    with connect(config.debug):
        print(hardware_line(), flush=True)
        check_shared(config)
        for phase, plan in planned:
            found.append(verify_cache(plan, phase))
            _show_findings("findings", found[-1])
            remaining = found[-1]
            if options.repair and remaining.findings:
                _, remaining = repair_cache(plan, phase, remaining)
                _show_findings("after the repair", remaining)
            left += len(remaining.findings)
    findings = sum(len(part.findings) for part in found)
    return {
        "ok": not left,
        "files": sum(part.files for part in found),
        "rows_recomputed": sum(part.recomputed for part in found),
        "not_recomputed": sorted({name for part in found for name in part.skipped}),
        "fidelity": {name: figures for part in found for name, figures in part.fidelity.items()},
        "findings": findings,
        "repaired": findings - left if options.repair else 0,
    }


def _show_findings(title: str, found: Verification) -> None:
    for label, reason in found.skipped.items():
        print(f"not recomputed: {label}: {reason}", flush=True)
    for name, (mean, low) in found.fidelity.items():
        print(f"cosine of the standardised {name}: {mean:.4f}, 1st percentile {low:.4f}", flush=True)
    rows = [
        {
            "place": item.place,
            "what": item.what,
            "shard": "all" if item.shard is None else str(item.shard),
            "file": item.file.rpartition("/")[2],
            "problem": item.problem,
        }
        for item in found.findings
    ]
    print(f"{title}\n{_first(rows) if rows else '  all is well'}", flush=True)


def _first(rows: list[dict[str, str]]) -> str:
    more = f"\n  and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    return grid(rows[:SHOWN]) + more


def show_inventory(config: PrecomputeJobConfig, _: argparse.Namespace) -> dict[str, Any]:
    """Print what the cache holds, by address."""
    store = cache_store(config)
    entries = take_inventory(store)
    print(f"{store.uri}\n{grid([_row(entry) for entry in entries]) if entries else '  holds nothing'}")
    return {
        "cache": store.uri,
        "bytes": sum(entry.bytes for entry in entries),
        "entries": [
            {"address": e.address, "shards": e.shards, "of": e.of, "bytes": e.bytes, "fidelity": e.fidelity}
            for e in entries
        ],
    }


def _row(entry: Entry) -> dict[str, str]:
    return {
        "address": entry.address,
        "what": entry.what,
        "shards": f"{entry.shards} of {entry.of}",
        "size": size(entry.bytes),
        "cosine": "" if entry.fidelity is None else f"{entry.fidelity:.4f}",
        "licence": entry.licence,
    }


def delete(config: PrecomputeJobConfig, options: argparse.Namespace) -> dict[str, Any]:
    """Delete a version of a data set, crops, or a teacher's features, after asking."""
    store = cache_store(config)
    entry = find_entry(store, options.delete)
    print(grid([_row(entry)]), flush=True)
    if not confirm(f"delete {entry.address} from {store.uri}?", options.yes):
        return {"deleted": None, "bytes": 0}
    delete_entry(entry)
    return {"deleted": entry.address, "bytes": entry.bytes}


def collect_garbage(config: PrecomputeJobConfig, options: argparse.Namespace) -> dict[str, Any]:
    """Remove files that nothing refers to, after asking."""
    store = cache_store(config)
    items = find_garbage(store)
    total = sum(item.bytes for item in items)
    counts = ", ".join(f"{count} {why}" for why, count in Counter(item.why for item in items).items())
    rows = [
        {"file": item.path.removeprefix(f"{store.uri}/"), "size": size(item.bytes), "why": item.why} for item in items
    ]
    print(f"{store.uri}\n{_first(rows) if rows else '  no garbage'}", flush=True)
    if not items or not confirm(f"remove {len(items)} files, {size(total)} ({counts})?", options.yes):
        return {"files": 0, "bytes": 0}
    still = {item.path for item in find_garbage(store)}  # a job may have listed some of it meanwhile
    items = [item for item in items if item.path in still]
    remove_garbage(items)
    return {"files": len(items), "bytes": sum(item.bytes for item in items)}
