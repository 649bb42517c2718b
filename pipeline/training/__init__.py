"""The training engine of distillation and fine-tuning.

`loop.train` is a plain PyTorch loop over a `task.Task`; `ray_train.fit` runs it on Ray Train workers with DDP, checkpoints
and resumption.
"""
