"""Distillation from the cache: targets, losses, and the task that the training engine runs."""
