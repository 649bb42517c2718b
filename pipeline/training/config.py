"""The training run."""

from __future__ import annotations

import logging
import math
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, Strict, field_validator, model_validator

from pipeline.config.tree import Section, operational

FEW_STEPS = 10
"""Steps of an epoch below which a plan warns."""
LARGEST_BATCH, SMALLEST_BATCH, ENOUGH_STEPS = 256, 16, 20
"""Sizes between which a batch size is chosen, and the steps of an epoch that it leaves if it can."""

log = logging.getLogger(__name__)


class TrainConfig(Section):
    """The training run."""

    epochs: int = Field(30, ge=1, description="passes over the training images")
    batch_size: int = Field(
        0,
        ge=0,
        description="images per step, over all workers; 0: 256, halved down to 16 while an epoch has fewer than 20 steps",
    )
    micro_batch: int | None = Field(
        None, ge=1, description="maximum images per forward pass of a worker; gradients are accumulated; none: no limit"
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate of AdamW at train.lr_batch_size")
    lr_batch_size: int | None = Field(
        None, ge=1, description="batch size of train.lr, which is scaled linearly to train.batch_size; none: not scaled"
    )
    min_lr: float = Field(1e-6, ge=0, description="learning rate at the end of the cosine")
    warmup_epochs: float = Field(1.5, ge=0, description="epochs of linear warm-up")
    weight_decay: float = Field(
        0.05, ge=0, description="AdamW weight decay; norms, biases and what the network exempts have none"
    )
    clip_grad: float = Field(1.0, gt=0, description="maximum L2 norm of the gradient")
    ema_decay: float = Field(
        0.9998,
        ge=0,
        lt=1,
        description="decay of the averaged weights, or (1 + steps) / (10 + steps) while that is less",
    )
    workers: NonNegativeInt | Annotated[tuple[PositiveInt, PositiveInt], Strict(False)] = operational(
        0,
        description="training workers, or [least, most] depending on the cluster; 0: one per GPU, or one without GPUs",
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="numeric precision of the student; auto: bfloat16 or float16 on devices that are fast in it"
    )
    compile: bool | None = Field(
        None,
        description="whether torch.compile compiles the student and the loss; none: in long distillations on one GPU",
    )
    shuffle_window: int = Field(1024, ge=1, description="images shuffled together, after row groups are shuffled")
    checkpoint_steps: int = operational(
        0, ge=0, description="steps between checkpoints within an epoch; 0: only at the end of an epoch"
    )
    keep_checkpoints: int = operational(
        2, ge=1, description="number of latest checkpoints that stay while the run trains"
    )
    keep_finished: int = operational(
        0,
        ge=0,
        description="how many of them stay when the run has finished, for each phase; the student and the best always do",
    )
    checkpoints: str | None = operational(
        None, description="folder or s3://, gs:// address of the checkpoints; none: in the run's folder below `work`"
    )
    best_metric: str | None = operational(
        None,
        description="evaluation metric (knn, ...) whose best checkpoint is also kept; none: the main metric of a fine-tuning",
    )
    best_is: Literal["highest", "lowest"] = operational(
        "highest", description="whether the highest or the lowest value of train.best_metric is best"
    )

    @field_validator("workers")
    @classmethod
    def _least_before_most(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        if isinstance(value, tuple) and value[0] > value[1]:
            raise ValueError(f"[least, most] must not be {list(value)}")
        return value

    @field_validator("batch_size")
    @classmethod
    def _more_than_one(cls, value: int) -> int:
        if value == 1:
            raise ValueError("input should be 2 or more, or 0 for a size that suits the data, not 1")
        return value

    @model_validator(mode="after")
    def _equal_shares(self) -> TrainConfig:
        if self.batch_size:
            check_shares(self.batch_size, self.most_workers or 1)
        return self

    def for_images(self, images: int) -> Self:
        """These settings with a batch size that suits epochs of so many images (or crops), if none is given."""
        if self.batch_size:
            return self
        size, shares = LARGEST_BATCH, self.most_workers or 1
        while size > SMALLEST_BATCH and images < ENOUGH_STEPS * size:
            size //= 2
        return self.model_copy(update={"batch_size": math.ceil(size / shares) * shares})

    def describe(self, input_size: int, seed: int, child_run: str) -> str:
        """A sentence about the training for the note of a run."""
        batch = self.batch_size or "a size that suits the data"
        return (
            f"Training: {self.epochs} epochs of batches of {batch} at {input_size} px, seed {seed}. The model is in "
            f"the nested run `{child_run}`; `report.html` shows the whole run."
        )

    def describe_epochs(self, images: int, steps: int) -> str:
        """Epochs of so many steps on `images` (or crops), for a plan, and what fills no batch; warns of short epochs."""
        if steps < FEW_STEPS and images >= 2 * FEW_STEPS:
            log.warning(
                "an epoch has fewer than %d steps (%d of %d images), in which a network learns little: set train.batch_size=%d, "
                "or raise train.epochs",
                FEW_STEPS,
                steps,
                self.batch_size,
                2 ** int(math.log2(images / FEW_STEPS)),
            )
        left = images % self.batch_size if steps == images // self.batch_size else 0
        rest = f"; {left} images, others in every epoch, fill no batch" if left else ""
        return f"{self.epochs} epochs of {steps} steps of {self.batch_size} images{rest}"

    def shared_folders(self) -> dict[str, str]:
        """The folder or address of checkpoints outside the work folder, by field."""
        return {"train.checkpoints": self.checkpoints} if self.checkpoints else {}

    @property
    def most_workers(self) -> int:
        """Maximum number of workers; 0: one per GPU."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def peak_lr(self) -> float:
        """Peak learning rate at `batch_size`: scaled linearly from `lr_batch_size` (Goyal et al. 2017, section 2.1)."""
        return self.lr * self.batch_size / self.lr_batch_size if self.lr_batch_size else self.lr

    @property
    def lr_rule(self) -> str:
        """`peak_lr` and its derivation, in words."""
        scaling = f"scaled linearly from {self.lr:.3g} at {self.lr_batch_size}" if self.lr_batch_size else "not scaled"
        return f"{self.peak_lr:.3g} at {self.batch_size} images per step, {scaling}"


def check_shares(batch_size: int, shares: int) -> None:
    """Raise a ValueError with the nearest valid sizes if a global batch cannot be divided into equal shares."""
    if batch_size % shares or batch_size < shares:
        below = batch_size // shares * shares
        near = " or ".join(str(size) for size in (below, below + shares) if size)
        raise ValueError(f"train.batch_size={batch_size} cannot be shared equally by {shares} workers; {near} can")
