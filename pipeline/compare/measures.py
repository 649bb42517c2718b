"""The measures of a comparison: name, unit, direction and format."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.downstream.base import Column, DownstreamTask, load_task
from pipeline.downstream.config import TASKS


@dataclass(frozen=True)
class Measure:
    """A number of a run; `scale` is the value of one `unit`, `digits` the number of decimals (None: three significant digits).

    CSV files and JSON name it by its key and hold unscaled values.
    """

    key: str
    label: str
    unit: str
    better: Literal["higher", "lower"] | None
    scale: float = 1.0
    digits: int | None = None

    @property
    def title(self) -> str:
        """Label and unit."""
        return f"{self.label}, {self.unit}" if self.unit else self.label

    def show(self, value: float) -> str:
        """Format a value in `unit`, without the unit."""
        scaled = value / self.scale
        if self.digits is not None:
            return f"{scaled:.{self.digits}f}"
        return f"{scaled:.3g}" if abs(scaled) < 1000 else f"{scaled:.0f}"


KNN = Measure("knn", "kNN", "%", "higher", digits=1)
PARAMETERS = Measure("parameters", "parameters", "M", "lower", 1e6, 2)
BEFORE_TASKS = (KNN, Measure("linear", "linear", "%", "higher", digits=1))
AFTER_TASKS = (
    Measure("zero_shot", "zero-shot", "%", "higher", digits=1),
    Measure("text_to_image_r1", "text to image R@1", "%", "higher", digits=1),
    Measure("pck", "PCK@0.1", "%", "higher", digits=1),
    Measure("probe_miou", "mIoU of the probe", "%", "higher", digits=1),
    Measure("prompts_mask_iou", "mask IoU of prompts", "%", "higher", digits=1),
    Measure("prompts_mask_ap", "mask AP of prompts", "%", "higher", digits=1),
    PARAMETERS,
    Measure("macs", "MACs", "G", None, 1e9),
    Measure("latency", "latency", "ms", "lower"),
    Measure("cache_bytes", "cache", "MiB", "lower", 2.0**20),
    Measure("samples_seen", "samples seen", "k", "lower", 1e3),
    Measure("hours", "time", "h", None),
    Measure("gpu_hours", "GPU hours", "", None),
    Measure("cost", "cost", "", None, digits=2),
    Measure("knn_raw", "kNN of raw weights", "%", None, digits=1),
    Measure("knn_before", "kNN before", "%", None, digits=1),
)


def columns_of(tasks: Iterable[type[DownstreamTask[Any]]]) -> dict[str, Column]:
    """Columns of the built-in tasks and of others, by metric; the first one for a metric counts."""
    columns = [column for task in (*map(load_task, TASKS), *tasks) for column in task.columns]
    return {column.metric: column for column in reversed(columns)}


def measures_of(columns: Iterable[Column]) -> dict[str, Measure]:
    """All measures by key, in the order of the tables. Accuracies of built-in tasks are in percent, AP too."""
    own = (
        Measure(c.key, c.label, c.unit, "higher" if c.higher_is_better else "lower", digits=c.digits) for c in columns
    )
    return {measure.key: measure for measure in (*BEFORE_TASKS, *own, *AFTER_TASKS)}


COSTS = ("parameters", "latency", "cache_bytes", "samples_seen")
"""The costs that accuracies are plotted against, by key."""
WITHOUT_IMAGES = frozenset({*COSTS, "macs", "hours", "gpu_hours", "cost"})
"""The measures that depend on no held-out images, by key."""
TEXTS = ("status", "job", "data", "student", "input", "teachers", "codec", "views", "seed", "device")
"""Names of the texts that describe a run, in the order of the tables."""
