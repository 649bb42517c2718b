"""A frozen backbone as a teacher, so that the cache keeps its features: float32 vectors or float16 maps.

They are computed once for all evaluations of a backbone at an input size, on all nodes and GPUs of the Ray session.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.cache.config import TeacherConfig
from pipeline.cache.layout.cached_teacher import CachedTeacher
from pipeline.cache.layout.keys import teacher_id
from pipeline.errors import UserError, one_line
from pipeline.student.loading import load_student
from pipeline.student.model import Encoder
from teachers.base import Teacher, TeacherError, TeacherOptions, TeacherOutput, TeacherSpec, digest_state


class FrozenTeacher(Teacher):
    """A backbone whose patches are the image vector, as a 1x1 grid, or its feature map.

    Args:
        options: ``args`` are those of :func:`~pipeline.student.loading.load_student`, and ``grid``: None for vectors, 0 for
            maps at the grid of :func:`map_levels`, or the side of the grid that maps are resized to.
    """

    def __init__(self, options: TeacherOptions) -> None:
        args = dict(options.args)
        self.grid: int | None = args.pop("grid", None)
        try:
            self.encoder, name, _, built_with, *_ = load_student(weights=options.weights, **args)
        except UserError as error:
            raise TeacherError(str(error)) from error
        assert options.input_size is not None
        size = options.input_size
        try:
            with torch.no_grad():
                _, height, width, channels = self._features(torch.zeros(2, 3, size, size)).shape
        except (RuntimeError, AssertionError, ValueError) as error:
            reason = one_line(error)
            raise TeacherError(f"{args['student']} does not take images of {size} px ({reason})") from error
        normalisation: dict[str, list[float]] = {}  # which the digest of the weights does not cover
        if isinstance(self.encoder, Encoder):
            normalisation = {name: getattr(self.encoder, name).flatten().tolist() for name in ("mean", "std")}
        self.weights_sha256 = digest_state(self.encoder)
        self.spec = TeacherSpec(
            name=f"frozen {name}",
            architecture=f"frozen/{name}",
            weights=f"sha256:{self.weights_sha256}",
            input_size=(size, size),
            mean=(0.0, 0.0, 0.0),  # the encoder normalises
            std=(1.0, 1.0, 1.0),
            interpolation="bicubic",
            summary_dim=None,
            patch_dim=channels,
            grid=(height, width),
            model_args={**built_with, **normalisation},
        )

    def load(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        """Move to the device, in the memory format of training, so that features round as in training."""
        self.device, self.dtype = torch.device(device), dtype
        self.encoder.to(self.device, dtype).to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> TeacherOutput:
        """[B, 3, H, W] RGB in [0, 1] -> no summary, patches [B, 1, 1, C] or [B, h, w, D]."""
        return TeacherOutput(None, self._features(images))

    def _features(self, images: Tensor) -> Tensor:
        if self.grid is None:
            return self.encoder(images)[:, None, None]
        if not isinstance(self.encoder, Encoder):
            raise TeacherError(
                "this model returns one vector per image, no feature maps: name the exported student folder"
            )
        maps = self.encoder.maps(images, map_levels(self.encoder.strides))
        side = (self.grid, self.grid) if self.grid else maps[0].shape[2:]
        sized = [F.interpolate(part, size=side, mode="bilinear", antialias=True) for part in maps]
        return torch.cat(sized, dim=1).permute(0, 2, 3, 1)


def map_levels(strides: Sequence[int]) -> list[int]:
    """Pyramid levels whose maps are concatenated: the deepest of stride 16 or less, and the last."""
    last = len(strides) - 1
    return sorted({max((level for level, stride in enumerate(strides) if stride <= 16), default=last), last})


def cached_encoder(
    student: str, input_size: int, *, weights: str, args: dict[str, object], grid: int | None
) -> CachedTeacher:
    """The entry of a frozen backbone in the cache; all nodes must see the `student`'s folder.

    Raises:
        TeacherError: if it cannot be loaded, or does not accept images of this size.
    """
    settings = {"student": student, "args": args, "grid": grid}
    config = TeacherConfig(
        model="pipeline.evaluate.frozen:FrozenTeacher", weights=weights, input_size=input_size, args=settings
    )
    spec = FrozenTeacher(TeacherOptions("", weights, input_size, None, settings)).spec
    codec = "float32" if grid is None else "float16"
    return CachedTeacher(config, spec, teacher_id(spec, codec, "float32"), codec, "float32")
