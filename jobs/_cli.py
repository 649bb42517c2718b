"""What the jobs share: arguments, one-line errors with exit code 2, the last line of JSON, and text for people."""

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
    """What a job does instead of its work if a flag is given: `body` takes the configuration and the command line's options.

    A `metavar` is the name of the flag's value. Modes exclude each other.
    """

    flag: str
    help: str
    body: Callable[[Any, argparse.Namespace], Mapping[str, Any]]
    metavar: str | None = None


@dataclass(frozen=True)
class Switch:
    """A flag that belongs to modes; given alone, it implies its mode if it has only one."""

    flag: str
    help: str
    modes: tuple[str, ...]


def later(module: str, function: str = "main") -> Callable[..., Any]:
    """A function of a module that is imported when the function is called.

    A script calls its own body through this: `--help` and a mistyped field need not wait ten seconds for torch and MLflow.
    """
    return lambda *arguments: getattr(import_module(module), function)(*arguments)


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
        body: called with the configuration and whether to stop after the plan.
        recipe: the default.
        listed: classes whose fields `--help` lists; empty: the variants of `root`.

    Exits with code 2 and one line for an error that the user can mend, and with 1 if the figures say ``"ok": false``; other
    errors keep their traceback.
    """
    listed = listed or root.variants()
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"fields (recipe keys and overrides):\n{describe_fields(*listed)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    items = parser.add_argument(
        "items", nargs="*", metavar="recipe.yaml | key=value", help="a recipe (recipes/quickstart.yaml) and overrides"
    )
    items.completer = partial(complete_item, listed)  # type: ignore[attr-defined]
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
    """Call a job and print its figures as one line of JSON, or its error; exit as :func:`run` does."""
    try:
        figures = call()
    except (UserError, TeacherError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command resumes here", file=sys.stderr)
        sys.exit(130)
    print(json.dumps(figures))
    if figures.get("ok") is False:
        sys.exit(1)


def _choose(
    parser: argparse.ArgumentParser, options: argparse.Namespace, modes: Sequence[Mode], switches: Sequence[Switch]
) -> Mode | None:
    given = {f"--{name.replace('_', '-')}" for name, value in vars(options).items() if value}
    chosen = given & {mode.flag for mode in modes}
    for switch in switches:
        if switch.flag in given and not chosen & set(switch.modes):
            if chosen or options.dry_run or len(switch.modes) > 1:
                parser.error(f"{switch.flag} goes with {' or '.join(switch.modes)}")
            chosen = set(switch.modes)
    return next((mode for mode in modes if mode.flag in chosen), None)


def confirm(question: str, yes: bool) -> bool:
    """Ask on the terminal unless `yes` answers; without a terminal, that is a UserError."""
    if yes:
        return True
    if not sys.stdin.isatty():
        raise UserError("nothing was removed: add --yes, because there is no terminal to confirm on")
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)  # stdout ends with a line of JSON
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _configure(root: type[R], items: Sequence[str], default: Path) -> R:
    recipes = [item for item in items if "=" not in item and item.endswith((".yaml", ".yml"))]
    if len(recipes) > 1:
        raise UserError(f"give one recipe, not {len(recipes)}: {', '.join(recipes)}")
    recipe = find_recipe(recipes[0]) if recipes else default
    return load_config(root, recipe, [item for item in items if item not in recipes])


def find_recipe(name: str) -> Path:
    """Path of a recipe; `quickstart.yaml` and `recipes/quickstart.yaml` name this package's unless there is such a file."""
    path = Path(name)
    own = RECIPES / path.name
    return own if not path.exists() and str(path.parent) in (".", "recipes") and own.is_file() else path


def table(rows: Mapping[str, Any]) -> str:
    """Two aligned columns, without the rows whose value is None."""
    shown = {name: value for name, value in rows.items() if value is not None}
    width = max(len(name) for name in shown)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in shown.items())


def grid(rows: Sequence[Mapping[str, str]]) -> str:
    """Aligned columns under a header; rows are cells by column."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  " + "  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def percent(value: float | None) -> str | None:
    """A percentage, for people."""
    return None if value is None else f"{value:.1f} %"


def size(count: float) -> str:
    """Bytes, for people."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = next((power for power in range(4) if count < 1024 ** (power + 1)), 4)
    return f"{count / 1024**power:.{min(power, 1)}f} {units[power]}"
