"""SAM's mask decoders for the teachers whose `mask_weight` asks for them: the checks before a training, and their weights."""

from collections.abc import Mapping, Sequence

from pipeline.cache.config import TeacherConfig
from pipeline.cache.layout.cached_teacher import CachedTeacher
from pipeline.errors import UserError
from teachers.base import TeacherError
from teachers.hub import HubFile, check_available
from teachers.sam_masks import PUBLISHED, SamMasks, load_sam_masks
from teachers.weights import parse_weights


def makes_masks(config: TeacherConfig) -> bool:
    """Whether a teacher's masks are compared, now or later in the schedule."""
    weight = config.mask_weight
    return any(weight.values()) if isinstance(weight, Mapping) else weight > 0


def check_mask_teachers(teachers: Sequence[CachedTeacher]) -> None:
    """Raise a UserError for a `mask_weight` of a teacher that is no SAM, or whose patches are averaged."""
    for number, teacher in enumerate(teachers):
        if not makes_masks(teacher.config):
            continue
        name, field = teacher.spec.name, f"teachers.{number}"
        if not name.startswith("sam/"):
            raise UserError(
                f"{field}.mask_weight: masks are made by SAM's decoder, which cannot read features of {name}: leave it out, or "
                "set it for a teacher sam/vit_b"
            )
        if teacher.spec.pool > 1:
            raise UserError(
                f"{field}.mask_weight: SAM's decoder reads SAM's own patches, but {field} averages squares of "
                f"{teacher.spec.pool} x {teacher.spec.pool}: set {field}.pool=1 in the same phase"
            )


def check_decoders(teachers: Sequence[CachedTeacher]) -> None:
    """Raise a UserError, before anything expensive starts, if the decoder of a teacher cannot be had or is another SAM's."""
    for number, teacher in enumerate(teachers):
        if makes_masks(teacher.config):
            _check(teacher, f"teachers.{number}")


def _check(teacher: CachedTeacher, field: str) -> None:
    name, weights = teacher.spec.name, teacher.config.weights
    try:
        if parse_weights(weights, name, "sa1b").kind == "hub":
            check_available(name, HubFile(PUBLISHED[_variant(teacher)], ("model.safetensors",)))
            return
        masks = load_decoder(teacher)
    except TeacherError as error:
        raise UserError(f"{field}.mask_weight: needs SAM's mask decoder: {error}") from error
    if masks.dim != teacher.spec.patch_dim:
        raise UserError(
            f"{field}.mask_weight: the mask decoder in {weights} reads {masks.dim} channels, but {name} gives "
            f"{teacher.spec.patch_dim}: its weights must be those of one whole SAM"
        )


def load_decoder(teacher: CachedTeacher) -> SamMasks:
    """Prompt encoder and mask decoder, from the weights of the teacher; as :func:`teachers.sam_masks.load_sam_masks`."""
    return load_sam_masks(teacher.config.weights, _variant(teacher))


def load_decoders(teachers: Sequence[CachedTeacher]) -> dict[str, SamMasks]:
    """The decoders of all teachers whose masks are compared, by teacher id."""
    return {teacher.id: load_decoder(teacher) for teacher in teachers if makes_masks(teacher.config)}


def _variant(teacher: CachedTeacher) -> str:
    return teacher.spec.name.partition("/")[2]
