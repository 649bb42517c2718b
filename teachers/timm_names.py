"""Factory of `timm/<model>[.<tag>]`: the models whose authors compute otherwise than timm get their own class."""

from teachers.base import Teacher, TeacherError, TeacherOptions
from teachers.dinov2 import VARIANTS as DINOV2
from teachers.dinov2 import DINOv2
from teachers.dinov3 import DINOv3, DINOv3ConvNeXt
from teachers.sam import SAM
from teachers.timm_backbone import TimmTeacher


def timm_model(options: TeacherOptions) -> Teacher:
    """Factory of `timm/<model>`."""
    model = options.variant
    if not model:
        raise TeacherError("teacher timm: add a model, as in timm/mobilenetv2_100")
    name, (architecture, _, tag) = f"timm/{model}", model.partition(".")
    if architecture in {known.partition(".")[0] for known in DINOV2.values()}:
        return DINOv2(name, model, options)
    if "_dinov3" in architecture:
        return DINOv3(name, model, options)
    if architecture.startswith("convnext") and tag.startswith("dinov3"):
        return DINOv3ConvNeXt(name, model, options)
    if architecture.startswith("samvit"):
        return SAM(name, model, options)
    return TimmTeacher(name, model, options)
