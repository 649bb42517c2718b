"""Teachers by name; a user's own plugs in as `package.module:factory`."""

from collections.abc import Mapping
from typing import Any

from teachers.base import Teacher, TeacherError, TeacherOptions
from teachers.errors import did_you_mean
from teachers.plugin import import_plugin

FACTORIES: dict[str, str] = {
    "dinov2": "teachers.dinov2:dinov2",
    "clip": "teachers.clip:clip",
    "sam": "teachers.sam:sam",
    "hog": "teachers.hog:hog",
    "timm": "teachers.timm_names:timm_model",
}
"""Name -> `module:factory`, imported on demand, so that a teacher needs no other teacher's library."""


def create_teacher(
    model: str,
    *,
    weights: str = "pretrained",
    input_size: int | None = None,
    pool: int | None = None,
    args: Mapping[str, Any] | None = None,
) -> Teacher:
    """A teacher without its weights; the options are those of :class:`~teachers.base.TeacherOptions`.

    Args:
        model: `name`, `name/variant`, or `package.module:factory`.

    Raises:
        TeacherError: if there is no such teacher, or it cannot be created as configured.
    """
    name, _, variant = model.partition("/")
    location = model if ":" in name else FACTORIES.get(name)
    if location is None:
        hint = did_you_mean(name, FACTORIES, "did you mean {}? ")
        raise TeacherError(
            f"teachers: there is no teacher {model}; {hint}known are {', '.join(FACTORIES)}, and package.module:factory"
        )
    options = TeacherOptions("" if ":" in name else variant, weights, input_size, pool, dict(args or {}))
    try:
        factory = import_plugin(location)
    except ImportError as error:
        raise TeacherError(f"teachers: {error}") from error
    if not callable(factory):
        raise TeacherError(f"teachers: {location} is not callable")
    teacher = factory(options)
    if not isinstance(teacher, Teacher):
        raise TeacherError(f"teachers: {location} returned {type(teacher).__name__}, not a teachers.base.Teacher")
    return teacher
