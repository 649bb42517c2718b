"""The training engine that distillation and fine-tuning share: a plain PyTorch loop, and Ray Train around it.

`train` knows a :class:`Task` and nothing of Ray; `fit` runs it on Ray Train workers with DDP, checkpoints and resume.

    task.py        what is trained, on what, and how it is judged
    worker.py      this process among the workers, and its shares of the global batch
    step.py        one optimiser step: precision, accumulation, clipping, averaging
    average.py     the weights averaged over the steps
    meter.py       losses, rate, and where the time goes
    loop.py        `train`: epochs, positions, evaluation, divergence
    checkpoint.py  what a checkpoint holds, and which one is kept as the best
    stopping.py    how a run is told to save and to end
    ray_train.py   `fit`; Ray is imported inside its functions only, so that the loop runs on machines without it
"""
