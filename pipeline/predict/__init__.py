"""Trained models on your own images, in a few lines.

    from pipeline.predict import load_predictor

    backbone = load_predictor("work/runs/<run>/student")
    features = backbone.features("photos")  # [N, C]: a file, a folder, an array, or a list of these

    model = load_predictor("work/runs/<run>/model")  # as jobs/finetune.py made it
    for objects in model.detect("photos"):  # or classify, segment, or predict, for any task
        print(objects.names, objects.boxes)

Imports no Ray, and MLflow for models in MLflow alone.
"""

from pipeline.downstream.detect.task import Objects
from pipeline.predict.predictor import Predictor, load_predictor

__all__ = ["Objects", "Predictor", "load_predictor"]
