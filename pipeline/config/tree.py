"""Configuration trees: sections of typed fields, and the root of them that each job declares.

Every field has a type, a default and one line of meaning. A job's root class lists the sections that the job reads;
`--help`, the resolved recipe in MLflow, a comparison's differences and the identity of a run follow from it.
"""

import hashlib
import json
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeFloat
from pydantic.fields import FieldInfo

Share = Annotated[float, Field(ge=0, le=1)]
"""In [0, 1]."""


def _at_least_one_point(value: Any) -> Any:
    if value == {}:
        raise ValueError("a schedule has at least one point, such as {0: 1}")
    return value


Schedule = Annotated[NonNegativeFloat | dict[Share, NonNegativeFloat], AfterValidator(_at_least_one_point)]
"""A weight, or weights by the share of training done, linear in between: {0: 1, 0.5: 0.2}."""


def operational(default: Any, **arguments: Any) -> Any:
    """A field that changes no computed number: where a job runs, what it keeps, how it is tracked.

    Such fields do not count in a run's identity or in comparisons. `arguments` are those of :func:`pydantic.Field`.
    """
    return Field(default, json_schema_extra={"operational": True}, **arguments)


class Section(BaseModel):
    """An immutable group of fields that refuses unknown keys, and values of another type: `true` is not 1."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def decisive(self) -> dict[str, Any]:
        """The fields that change what is computed and are not at their defaults, JSON-ready."""
        found = {}
        for name, info in type(self).model_fields.items():
            if _extra(info, "operational"):
                continue
            value = self._json(name, getattr(self, name))
            if info.is_required() or value != self._json(name, info.get_default(call_default_factory=True)):
                found[name] = value
        return found

    def _json(self, name: str, value: Any) -> Any:
        if isinstance(value, Section):
            return value.decisive()
        if isinstance(value, list) and value and isinstance(value[0], Section):
            return [item.decisive() for item in value]
        return self.model_copy(update={name: value}).model_dump(mode="json", include={name})[name]


class JobRoot(Section):
    """The whole configuration of a job: its fields and sections."""

    @classmethod
    def variants(cls) -> tuple[type[Self], ...]:
        """The classes that recipes can select: only this one, unless the sections depend on a field."""
        return (cls,)

    @classmethod
    def select(cls, tree: Mapping[str, Any]) -> type[Self]:
        """The variant that a recipe selects, or a UserError if the recipe names something that does not exist."""
        return cls

    def phase_configs(self) -> tuple[Self, ...]:
        """The configuration of each phase; without phases, this one."""
        return (self,)

    def fingerprint(self) -> str:
        """The identity of a run: a digest of the fields that change its numbers and are not at their defaults."""
        fields = [phase.decisive() for phase in self.phase_configs()]
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


class FieldLine(NamedTuple):
    """A field as `--help` and the reference show it; the key of a list's entry has the index 0."""

    key: str
    type: str
    default: Any
    meaning: str
    operational: bool
    annotation: Any


def iter_fields(*roots: type[Section]) -> Iterator[FieldLine]:
    """Every field of the classes once, section by section."""
    fields = {line.key: line for root in roots for line in _iter_fields(root)}
    section_by_key = {key: key.partition(".")[0] if "." in key else "" for key in fields}
    for section in dict.fromkeys(section_by_key.values()):
        yield from (line for key, line in fields.items() if section_by_key[key] == section)


def _iter_fields(model: type[Section], prefix: str = "", operational: bool = False) -> Iterator[FieldLine]:
    for name, info in model.model_fields.items():
        marked = operational or bool(_extra(info, "operational"))
        if (section := section_of(info)) is not None:
            entry = "0." if typing.get_origin(info.annotation) is list else ""
            yield from _iter_fields(section, f"{prefix}{name}.{entry}", marked)
        else:
            default = "required" if info.is_required() else _shown(info.default)
            kind = _extra(info, "type") or _type_name(info.annotation)
            yield FieldLine(prefix + name, kind, default, info.description or "", marked, info.annotation)


def describe_fields(*roots: type[Section]) -> str:
    """The text of `--help`: one line per field with its type, default and meaning."""
    rows = [
        (line.key, f"{line.type} = {'none' if line.default is None else line.default}", line.meaning)
        for line in iter_fields(*roots)
    ]
    width = max(len(key) for key, *_ in rows)
    return "\n".join(f"  {key:<{width}}  {text}  [{value}]" for key, value, text in rows)


def section_of(info: FieldInfo) -> type[Section] | None:
    """The class of a field that is a section or a list of them."""
    candidates = (info.annotation, *typing.get_args(info.annotation))
    return next((kind for kind in candidates if isinstance(kind, type) and issubclass(kind, Section)), None)


def _extra(info: FieldInfo, key: str) -> Any:
    return info.json_schema_extra.get(key) if isinstance(info.json_schema_extra, dict) else None


def _shown(default: Any) -> Any:
    return f"[{', '.join(map(str, default))}]" if isinstance(default, list) else default


def _type_name(annotation: Any) -> str:
    """A type as users read it."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin in (types.UnionType, typing.Union):
        return "|".join("none" if part is type(None) else _type_name(part) for part in arguments)
    if origin in (list, tuple, dict):
        return {list: "list", tuple: "list", dict: "mapping"}[origin]
    return getattr(annotation, "__name__", str(annotation))
