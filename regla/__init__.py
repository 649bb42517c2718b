"""ReGLA Distill from Python: distil vision foundation models into a small backbone, and use it.

    import regla

    trained = regla.distill("own_images.yaml", images="photos/train", held_out="photos/val", train={"epochs": 5})
    print(trained.metrics["knn_after"], trained.folder)
    features = trained.load().features("photos/val")  # float32 [N, C]

The same jobs as on the command line (`regla --help`): they resume what was interrupted, and log to MLflow. Importing this
package imports neither torch, Ray nor MLflow; its functions do.
"""

from pipeline.errors import UserError
from regla.api import (
    TrainedModel,
    distill,
    evaluate,
    finetune,
    load_predictor,
    load_prompts,
    load_words,
    precompute,
)
from regla.images import write_images

__all__ = [
    "TrainedModel",
    "UserError",
    "distill",
    "evaluate",
    "finetune",
    "load_predictor",
    "load_prompts",
    "load_words",
    "precompute",
    "write_images",
]
