"""Prometheus gauges of the present state of a job: Ray exports them on every node, with the prefix ``ray_``.

`docs/grafana.json` shows them. MLflow keeps the curves.
"""

import sys
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

GAUGES = {
    "regla_images_per_second": "images that went through a stage in a second (extract: pairs of image and teacher)",
    "regla_shards": "teacher shards that this job has computed",
    "regla_shards_left": "image shards of which a teacher is still to be asked",
    "regla_quarantined": "images that were left out of the data because they cannot be read",
    "regla_data_wait_share": "share of the time that training spent waiting for data",
    "regla_loss": "loss that is trained on",
}
"""Description by name. Each gauge has the tag `stage`: index, extract, train."""


def export(stage: str, figures: Mapping[str, float]) -> None:
    """Set the gauges with these names (without prefix) and ignore other figures; without a Ray session do nothing."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return
    for name, value in figures.items():
        if f"regla_{name}" in GAUGES:
            _gauge(f"regla_{name}").set(value, tags={"stage": stage})


def export_training(history: Iterable[tuple[int, Mapping[str, float]]]) -> None:
    """Export the latest values of a history, (step, metrics), if it has a loss."""
    latest = {name: value for _, metrics in history for name, value in metrics.items()}
    if "loss" in latest:
        export("train", latest)


@cache
def _gauge(name: str) -> Any:
    from ray.util.metrics import Gauge

    return Gauge(name, description=GAUGES[name], tag_keys=("stage",))
