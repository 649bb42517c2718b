"""One typed configuration tree for every job: a YAML recipe, then dotted overrides.

    python jobs/distill.py recipes/quickstart.yaml train.epochs=5 student.name=regla_s teachers.0.weights=random

A recipe that names another beside it as its `base` gives only what differs; its `phases` are stages of the training,
each the fields that it changes. Every field has a type, a default and one line of meaning, which `--help` prints. An
unknown key, a wrong type or a value out of range raises :class:`~pipeline.errors.UserError` that names the key and,
where one is near, the right one.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import types
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    field_validator,
)

from pipeline.benchmark.config import BenchmarkConfig
from pipeline.cache.config import CacheConfig, PlanConfig, TeacherConfig, ViewsConfig
from pipeline.config.tree import Section
from pipeline.distill.config import AugmentConfig, LossConfig
from pipeline.downstream.classify.config import ClassifyConfig
from pipeline.downstream.config import FinetuneConfig
from pipeline.downstream.detect.config import DetectConfig
from pipeline.downstream.segment.config import SegmentConfig
from pipeline.errors import UserError, one_line
from pipeline.evaluate.config import EvaluateConfig, KnnConfig
from pipeline.sources.config import DataConfig
from pipeline.student.config import StudentConfig
from pipeline.tracking.config import TrackingConfig
from pipeline.training.config import TrainConfig

PHASE_FIELDS = ("data", "teachers", "views", "cache", "student.input_size", "loss", "augment", "train")
"""What a phase may change: all but what makes the network and the run what they are."""


class Config(Section):
    """The whole tree."""

    name: str = Field("distill", description="name of the run")
    work: str | None = Field(
        None, description="folder for cache, runs and MLflow; none: ./work, or ~/regla-distill in a submitted job"
    )
    outputs: str | None = Field(
        None,
        description="folder or s3://, gs:// address that the results of a finished run are copied to; none: they stay in `work` "
        "and in MLflow",
    )
    seed: int = Field(0, ge=0, description="seed of weights, order and generated scenes")
    data: DataConfig = DataConfig()
    teachers: list[TeacherConfig] = Field([TeacherConfig(model="hog")], min_length=1, description="list of teachers")
    views: ViewsConfig = ViewsConfig()
    cache: CacheConfig = CacheConfig()
    student: StudentConfig = StudentConfig()
    loss: LossConfig = LossConfig()
    augment: AugmentConfig = AugmentConfig()
    train: TrainConfig = TrainConfig()
    knn: KnnConfig = KnnConfig()
    tracking: TrackingConfig = TrackingConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    classify: ClassifyConfig = ClassifyConfig()
    segment: SegmentConfig = SegmentConfig()
    detect: DetectConfig = DetectConfig()
    benchmark: BenchmarkConfig = BenchmarkConfig()
    plan: PlanConfig = PlanConfig()
    phases: list[dict[str, Any]] = Field(
        [],
        description="stages of the training, each the fields that it changes: [{train.epochs: 25}, {student.input_size: 384}]",
    )

    @field_validator("teachers", mode="before")
    @classmethod
    def _strings_are_models(cls, value: Any) -> Any:
        return (
            [{"model": item} if isinstance(item, str) else item for item in value] if isinstance(value, list) else value
        )

    def phase_configs(self) -> tuple[Config, ...]:
        """The configuration of every phase: the recipe with what the phase changes, and itself where there is none.

        Raises:
            UserError: for what a phase cannot change, or what would not do in a recipe either.
        """
        if not self.phases:
            return (self,)
        return tuple(self._phase(number, changes) for number, changes in enumerate(self.phases))

    def _phase(self, number: int, changes: dict[str, Any]) -> Config:
        tree = self.model_dump(exclude={"phases"})
        where = f"phases.{number}"
        for key, value in _leaves(changes):
            if not key.startswith(PHASE_FIELDS):
                raise UserError(
                    f"{where}: {key} cannot change between phases; a phase may change {', '.join(PHASE_FIELDS)}"
                )
            try:
                _assign(tree, key, value)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
        try:
            return Config.model_validate(tree)
        except ValidationError as error:
            raise UserError(f"{where}: " + "; ".join(_explain(problem) for problem in error.errors())) from None

    def fingerprint(self, reads: Collection[str] = ()) -> str:
        """Digest of every field that decides what the run computes; a rerun of equal digest is the same run.

        Args:
            reads: sections beside the usual ones that this job goes by.
        """
        left_out = {"tracking", "evaluate", "benchmark", "plan", "work", "outputs"} - set(reads)
        fields = self.model_dump(mode="json", exclude=left_out)
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def load_config(
    recipe: str | Path | Mapping[str, Any] | None, overrides: Sequence[str] | Mapping[str, Any] = ()
) -> Config:
    """Read a YAML recipe and apply dotted overrides in order.

    Args:
        recipe: its file, or its fields, nested or dotted.
        overrides: `train.epochs=5`, ...; or fields with their values, nested or dotted.

    Raises:
        UserError: for a missing or malformed recipe, an unknown key, a wrong type or a value out of range.
    """
    tree = _changed({}, dict(recipe)) if isinstance(recipe, Mapping) else _read_recipe(Path(recipe)) if recipe else {}
    if isinstance(overrides, Mapping):
        tree, overrides = _changed(tree, dict(overrides)), ()
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"'{override}' is neither a recipe (.yaml) nor an override (key=value), see --help")
        _assign(tree, key, _parse(override, text))
        tree = _changed({}, tree)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise UserError("; ".join(_explain(problem) for problem in error.errors())) from None
    config.phase_configs()
    return config


def _read_recipe(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The tree of a recipe, over that of the one beside it that it names as its `base`."""
    if not path.is_file():
        known = sorted(str(p) for p in Path("recipes").glob("*.yaml"))
        named = f", the base of {above[-1]}," if above else ""
        raise UserError(f"recipe {path}{named} does not exist" + (f"; there are {', '.join(known)}" if known else ""))
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"recipe {path} is not valid YAML: {one_line(error)}") from None
    if not isinstance(tree, dict):
        raise UserError(f"recipe {path} must be a mapping of fields, such as `train: {{epochs: 5}}`")
    whole: dict[str, Any] = {}
    if "base" in tree:
        base = path.parent / str(tree.pop("base"))
        if base in (*above, path):
            raise UserError(f"recipe {path}: base: {base} is based on this recipe itself")
        whole = _read_recipe(base, (*above, path))
    return _changed(whole, tree)


def _changed(whole: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A tree with the fields that another one gives, nested or dotted; in the tree, and in its phases, they are nested.

    A field then has one place, where an override finds it.
    """
    for key, value in _leaves(changes):
        _assign(whole, key, value)
    if isinstance(phases := whole.get("phases"), list):
        whole["phases"] = [_changed({}, phase) if isinstance(phase, dict) else phase for phase in phases]
    return whole


def _parse(override: str, text: str) -> Any:
    try:
        return _meant(yaml.safe_load(text))
    except (yaml.YAMLError, RecursionError) as error:
        reason = getattr(error, "problem", None) or one_line(error)
        raise UserError(
            f"override '{override}' is not valid YAML ({reason}); one with spaces or brackets is quoted for the shell"
        ) from None


def _meant(value: Any) -> Any:
    """YAML says null for what `--help` calls none."""
    return None if value == "none" else value


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of the fields that a tree gives, whether it nests its sections or has dotted keys itself."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        section = re.sub(r"\.\d+(?=\.|$)", ".0", key) + "."
        if isinstance(value, dict) and any(field.startswith(section) for field in _keys()):
            yield from _leaves(value, f"{key}.")
        else:
            yield key, _meant(value)


def _assign(tree: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    node: Any = tree
    for position, part in enumerate(path):
        node = _child(node, part, ".".join(path[: position + 1]))
    if isinstance(node, list):
        _child(node, last, key)
        node[int(last)] = value
    else:
        node[last] = value


def _child(node: Any, part: str, where: str) -> Any:
    if isinstance(node, list):
        if not part.isdecimal() or int(part) >= len(node):
            raise UserError(f"{where}: the list has {len(node)} entries, numbered from 0")
        index = int(part)
        if isinstance(node[index], str):
            node[index] = {"model": node[index]}
        return node[index]
    if not isinstance(node.get(part), dict | list):
        node[part] = {}
    return node[part]


def _explain(problem: Any) -> str:
    # pydantic also puts the types of a union into the path.
    location, kind = [part for part in problem["loc"] if not re.search(r"[\[-]", str(part))], problem["type"]
    where = ".".join(str(part) for part in location)
    if kind == "extra_forbidden":
        return f"unknown key {where}" + _suggest(location)
    if kind == "missing":
        return f"{where} must be given"
    given = "" if isinstance(problem["input"], dict | list) else f", not {problem['input']!r}"
    message = re.sub(r" or instance of \w+", "", problem["msg"].removeprefix("Value error, "))
    if where and message.startswith(f"{where}."):
        return message
    return f"{where}: {message[0].lower()}{message[1:]}{given}"


def _suggest(location: Sequence[Any]) -> str:
    """Near names at the same depth, or every field of the same name elsewhere."""
    parts = ["0" if isinstance(part, int) else str(part) for part in location]
    names = {".".join(key.split(".")[: len(parts)]) for key in _keys()}
    near = difflib.get_close_matches(".".join(parts), sorted(names), n=1)
    best = near or [key for key in _keys() if key.rsplit(".", 1)[-1] == parts[-1]]
    return f"; did you mean {' or '.join(best)}?" if best else "; --help lists every key"


@cache
def _keys() -> tuple[str, ...]:
    return tuple(name for name, *_ in iter_fields())


def iter_fields(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, str, Any, str]]:
    """(dotted key, type, default, meaning) of every field, in order; list entries are shown with index 0."""
    for name, info in model.model_fields.items():
        annotation = info.annotation
        item = next((arg for arg in typing.get_args(annotation) if _is_section(arg)), None)
        if _is_section(annotation):
            yield from iter_fields(typing.cast(type[BaseModel], annotation), f"{prefix}{name}.")
        elif item is not None:
            yield from iter_fields(item, f"{prefix}{name}.0.")
        else:
            default = "required" if info.is_required() else _shown(info.default)
            yield prefix + name, _type_name(annotation), default, info.description or ""


def _shown(default: Any) -> Any:
    return f"[{', '.join(map(str, default))}]" if isinstance(default, list) else default


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _type_name(annotation: Any) -> str:
    if typing.get_origin(annotation) is Literal:
        return "|".join(str(value) for value in typing.get_args(annotation))
    if typing.get_origin(annotation) is Annotated:
        return _type_name(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return "|".join("none" if arg is type(None) else _type_name(arg) for arg in typing.get_args(annotation))
    if typing.get_origin(annotation) in (list, tuple, dict):
        return {list: "list", tuple: "list", dict: "mapping"}[typing.get_origin(annotation)]
    return getattr(annotation, "__name__", str(annotation))


def describe_fields() -> str:
    """The text of `--help`: one line per field with its type, default and meaning."""
    rows = [
        (key, f"{kind} = {'none' if default is None else default}", text) for key, kind, default, text in iter_fields()
    ]
    width = max(len(key) for key, *_ in rows)
    return "\n".join(f"  {key:<{width}}  {text}  [{value}]" for key, value, text in rows)
