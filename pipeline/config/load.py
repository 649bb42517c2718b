"""Load the configuration of a job: a YAML recipe, then dotted overrides.

    python jobs/distill.py recipes/quickstart.yaml train.epochs=5 student.name=regla_s teachers.0.weights=random

A recipe that names another file of its folder as its `base` gives only the fields that differ. A recipe may serve several jobs:
each job reads its own sections; the fields of other jobs are checked and ignored.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

from pipeline.config.dotted import (
    assign,
    field_of,
    is_field,
    keys_of,
    leaves,
    none_if_named,
    prune,
    unknown,
    validate,
)
from pipeline.config.jobs import all_roots
from pipeline.config.tree import JobRoot, iter_fields
from pipeline.config.yaml_text import read_inline_yaml, read_yaml
from pipeline.errors import UserError

log = logging.getLogger(__name__)

R = TypeVar("R", bound=JobRoot)
Tree = dict[str, Any]


def load_config(
    root: type[R],
    recipe: str | Path | Mapping[str, Any] | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
) -> R:
    """Read a recipe and apply overrides in order.

    Args:
        root: the configuration class of the job.
        recipe: its YAML file, or its fields, nested or dotted.
        overrides: `train.epochs=5`, ...; or fields with their values, nested or dotted. A warning names those that the job
            does not read.

    Raises:
        UserError: for a missing or malformed recipe, a wrong type, a value out of range, or an unknown key, with similar ones.
    """
    tree = _read_recipe(Path(recipe)) if isinstance(recipe, str | Path) else _merge({}, recipe or {})
    if isinstance(overrides, Mapping):
        overridden = [key for key, _ in leaves(overrides, _all_keys())]
        tree = _merge(tree, overrides)
    else:
        overridden = []
        for override in overrides:
            key, value = _parse(override)
            overridden.append(key)
            assign(tree, key, value)
            tree = _merge({}, tree)
    own = root.select(tree)
    others = [kind for other in all_roots() for kind in dict.fromkeys((other.select(tree), *other.variants()))]
    _refuse_unknown(tree, own, others)
    config = _validate(own, tree)
    for other in others:
        _validate(other, tree)
    if unread := [key for key in overridden if not is_field(key, keys_of(own))]:
        log.warning(
            "ignored, since this job does not read %s: %s", "it" if len(unread) == 1 else "them", ", ".join(unread)
        )
    return config


def _validate(root: type[R], tree: Tree) -> R:
    config = validate(root, prune(tree, root))
    config.phase_configs()
    return config


def _refuse_unknown(tree: Tree, own: type[JobRoot], others: Iterable[type[JobRoot]]) -> None:
    """Refuse keys that no job has, and suggest similar ones: first those of this job."""
    own_keys, keys = keys_of(own), keys_of(own, *others)
    phases = tree.get("phases")
    parts = {"": tree} | {f"phases.{n}: ": part for n, part in enumerate(phases if isinstance(phases, list) else [])}
    problems = [
        where + (unknown(key, own_keys) or unknown(key, keys) or f"unknown key {key}; --help lists every key")
        for where, part in parts.items()
        if isinstance(part, Mapping)
        for key in dict.fromkeys(_unknown_part(key, keys) for key in _all_leaves(part, keys))
        if key
    ]
    if problems:
        raise UserError("; ".join(problems))


def _all_leaves(tree: Mapping[str, Any], keys: Sequence[str]) -> Iterator[str]:
    """The dotted keys of a tree, and those of the entries of its lists of sections."""
    for key, value in leaves(tree, keys):
        yield key
        if isinstance(value, list) and any(known.startswith(f"{field_of(key)}.0.") for known in keys):
            for number, item in enumerate(value):
                if isinstance(item, Mapping):
                    yield from (name for name, _ in leaves(item, keys, f"{key}.{number}."))


def _unknown_part(key: str, keys: Sequence[str]) -> str | None:
    """The shortest beginning of a dotted key that is not in `keys`; None if the whole key is."""
    beginnings = accumulate(key.split("."), "{}.{}".format)
    return next((beginning for beginning in beginnings if not is_field(beginning, keys)), None)


@cache
def _all_keys() -> tuple[str, ...]:
    return keys_of(*(variant for root in all_roots() for variant in root.variants()))


def _read_recipe(path: Path, derived: tuple[Path, ...] = ()) -> Tree:
    """The tree of a recipe, merged into the tree of its `base`; `derived` are the recipes based on this one."""
    if not path.is_file():
        known = sorted(str(p) for p in Path("recipes").glob("*.yaml"))
        named = f", the base of {derived[-1]}," if derived else ""
        raise UserError(f"recipe {path}{named} does not exist" + (f"; there are {', '.join(known)}" if known else ""))
    try:
        tree = read_yaml(path.read_text(encoding="utf-8-sig")) or {}
    except ValueError as error:
        raise UserError(f"recipe {path} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"recipe {path} must be a mapping of fields, such as `train: {{epochs: 5}}`")
    whole: Tree = {}
    if "base" in tree:
        base = path.parent / str(tree.pop("base"))
        if base in (*derived, path):
            raise UserError(f"recipe {path}: base: {base} is based on this recipe itself")
        whole = _read_recipe(base, (*derived, path))
    return _merge(whole, tree)


def _merge(whole: Tree, changes: Mapping[str, Any]) -> Tree:
    """Set fields, nested or dotted, in a nested tree; the phases in it become nested too."""
    for key, value in leaves(changes, _all_keys()):
        assign(whole, key, value)
    if isinstance(phases := whole.get("phases"), list):
        whole["phases"] = [_merge({}, phase) if isinstance(phase, dict) else phase for phase in phases]
    return whole


def _parse(override: str) -> tuple[str, Any]:
    """The key and the value of an override: its text as it is where the field is a string, else YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"'{override}' is neither a recipe (.yaml) nor an override (key=value), see --help")
    kind = _string_fields().get(re.sub(r"^phases\.\d+\.", "", field_of(key)))
    if kind is not None and not _QUOTED.fullmatch(text):
        return key, None if kind is not str and text in _NOTHING else text
    try:
        return key, none_if_named(read_inline_yaml(text))
    except ValueError as error:
        raise UserError(
            f"override '{override}' is not valid YAML ({error}); one with spaces or brackets is quoted for the shell"
        ) from None


_QUOTED = re.compile(r"""\s*("[^"]*"|'[^']*')\s*""")
_NOTHING = ("", "none", "null", "~")


@cache
def _string_fields() -> dict[str, Any]:
    """The annotations, by dotted key, of the fields that are a string or None."""
    variants = [variant for root in all_roots() for variant in root.variants()]
    return {line.key: line.annotation for line in iter_fields(*variants) if line.annotation in (str, str | None)}
