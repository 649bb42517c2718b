"""What every job shares: arguments, clear errors with exit code 2, and the last line of JSON."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from jobs._completion import complete, complete_item
from pipeline.config.load import load_config
from pipeline.config.tree import JobRoot, describe_fields
from pipeline.errors import UserError
from pipeline.runtime import logs
from teachers.errors import TeacherError

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
DEFAULT_RECIPE = RECIPES / "quickstart.yaml"


R = TypeVar("R", bound=JobRoot)


@dataclass(frozen=True)
class Mode:
    """What a job does in place of its work when a flag is given; modes exclude each other.

    Attributes:
        flag, help: as `--help` shows them.
        body: called with the configuration and the command line's options.
        metavar: what the flag's value is called, or None where it has none.
    """

    flag: str
    help: str
    body: Callable[[Any, argparse.Namespace], Mapping[str, Any]]
    metavar: str | None = None


@dataclass(frozen=True)
class Switch:
    """A flag that goes with modes; given alone it stands for the only one that it goes with."""

    flag: str
    help: str
    modes: tuple[str, ...]


def later(module: str, function: str = "main") -> Callable[..., Any]:
    """A function of a module that is imported when it is called.

    A script hands over to itself in this way before it imports torch and MLflow: what takes ten seconds, `--help` and a
    mistyped field need not wait for.
    """
    return lambda *given, **named: getattr(import_module(module), function)(*given, **named)


def run(
    root: type[R],
    body: Callable[[R, bool], Mapping[str, Any]],
    description: str,
    arguments: Sequence[str] | None = None,
    modes: Sequence[Mode] = (),
    switches: Sequence[Switch] = (),
    recipe: Path = DEFAULT_RECIPE,
    listed: Sequence[type[JobRoot]] = (),
) -> None:
    """Parse the command line, run the job and print its figures as one line of JSON.

    Args:
        root: the configuration of the job, whose fields `--help` lists.
        body: called with the configuration and whether to stop after the plan.
        description: first paragraph of `--help`.
        modes: what else the job does; their figures say ``"ok": false`` for exit code 1.
        switches: that go with some of them.
        recipe: taken where the command line names none.
        listed: classes whose fields `--help` lists; none: those of `root`.

    Exits with code 2 and one line on what the user can mend; anything else keeps its traceback.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"fields (recipe keys and overrides):\n{describe_fields(*(listed or root.variants()))}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    items = parser.add_argument(
        "items", nargs="*", metavar="recipe.yaml | key=value", help="a recipe (recipes/quickstart.yaml) and overrides"
    )
    items.completer = partial(complete_item, listed or root.variants())  # type: ignore[attr-defined]
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--dry-run", action="store_true", help="print the resolved plan and stop")
    for mode in modes:
        kind: dict[str, Any] = {"metavar": mode.metavar} if mode.metavar else {"action": "store_true"}
        group.add_argument(mode.flag, help=mode.help, **kind)
    for switch in switches:
        parser.add_argument(switch.flag, action="store_true", help=switch.help)
    complete(parser)
    options = parser.parse_intermixed_args(arguments)
    chosen = _choose(parser, options, modes, switches)
    logs.configure()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # what workers print shows in a log file as it comes

    def call() -> Mapping[str, Any]:
        config = _configure(root, options.items, recipe)
        return chosen.body(config, options) if chosen else body(config, options.dry_run)

    finish(call)


def finish(call: Callable[[], Mapping[str, Any]]) -> None:
    """Print the figures of a job as one line of JSON; exit with 2 and one line on what the user can mend."""
    try:
        figures = call()
    except (UserError, TeacherError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    print(json.dumps(figures))
    if figures.get("ok") is False:
        sys.exit(1)


def _choose(
    parser: argparse.ArgumentParser, options: argparse.Namespace, modes: Sequence[Mode], switches: Sequence[Switch]
) -> Mode | None:
    given = {flag for flag in (mode.flag for mode in modes) if _value(options, flag)}
    for switch in switches:
        if not _value(options, switch.flag) or given & set(switch.modes):
            continue
        if given or options.dry_run or len(switch.modes) > 1:
            parser.error(f"{switch.flag} goes with {' or '.join(switch.modes)}")
        given |= set(switch.modes)
    return next((mode for mode in modes if mode.flag in given), None)


def _value(options: argparse.Namespace, flag: str) -> Any:
    return getattr(options, flag.removeprefix("--").replace("-", "_"))


def confirm(question: str, yes: bool) -> bool:
    """Ask on the terminal; `yes` answers beforehand.

    Raises:
        UserError: where nobody can be asked.
    """
    if yes:
        return True
    if not sys.stdin.isatty():
        raise UserError("nothing was removed: without a terminal to ask on, --yes must be given")
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)  # stdout ends with a line of JSON
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _configure(root: type[R], items: Sequence[str], default: Path) -> R:
    recipes = [item for item in items if "=" not in item and item.endswith((".yaml", ".yml"))]
    if len(recipes) > 1:
        raise UserError(f"give one recipe, not {len(recipes)}: {', '.join(recipes)}")
    recipe = find_recipe(recipes[0]) if recipes else default
    return load_config(root, recipe, [item for item in items if item not in recipes])


def find_recipe(name: str) -> Path:
    """Path of a recipe; where no file has it, `quickstart.yaml` and `recipes/quickstart.yaml` name those of this package."""
    path = Path(name)
    own = RECIPES / path.name
    return own if not path.exists() and str(path.parent) in (".", "recipes") and own.is_file() else path


def table(rows: Mapping[str, Any]) -> str:
    """Two aligned columns; rows whose value is None are left out."""
    shown = {name: value for name, value in rows.items() if value is not None}
    width = max(len(name) for name in shown)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in shown.items())


def grid(rows: Sequence[Mapping[str, str]]) -> str:
    """Aligned columns under the names that the rows give them."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  " + "  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def percent(value: float | None) -> str | None:
    """A share in percent, for people."""
    return None if value is None else f"{value:.1f} %"


def size(count: float) -> str:
    """Bytes, for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
