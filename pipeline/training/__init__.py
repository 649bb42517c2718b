"""The training engine of distillation and fine-tuning: a plain PyTorch loop, and Ray Train around it.

`train` needs a :class:`Task` and no Ray; `fit` runs it on Ray Train workers with DDP, checkpoints and resumption.

    task.py        what is trained, on which data, and how it is evaluated
    worker.py      rank, collectives, and the shares of the global batch
    step.py        one optimiser step: precision, accumulation, clipping, averaging
    ema.py         the exponential moving average of the weights
    upload.py      copies of batches to the device, one step ahead
    meter.py       losses, rate, and shares of the time
    loop.py        `train`: epochs, positions, evaluation, divergence
    checkpoint.py  content of a checkpoint, and the copy of the best one
    stopping.py    the stop file and SIGTERM
    ray_train.py   `fit`; only its functions import Ray, so that the loop runs without it
"""
