"""What Ray Train calls in a worker.

Its controller, a process that does not train, unpickles this function and its arguments too, and would import timm and torch's
compiler with them, which takes seconds: this module imports nothing, and the task stays bytes until a worker needs it.
"""

from typing import Any


def enter_worker(loop: dict[str, Any]) -> Any:
    """Train in this worker."""
    from pipeline.training.ray_train import train_worker

    return train_worker(loop)
