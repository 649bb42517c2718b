"""What the jobs share: arguments, one-line errors with exit code 2, the last line of JSON, and text for people."""

import argparse
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from pipeline.config.load import load_config
from pipeline.config.tree import JobRoot, describe_fields, iter_fields
from pipeline.errors import UserError
from pipeline.runs.config import JobConfig
from pipeline.runtime import logs
from pipeline.runtime.openmp import wait_shortly
from teachers.errors import TeacherError

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
DEFAULT_RECIPE = RECIPES / "quickstart.yaml"
TYPES = {"", "bool", "int", "float", "str", "list", "tuple", "mapping", "none"}
"""Words for types in the listing of fields; any other word there is a value."""


R = TypeVar("R", bound=JobRoot)

Mode = Callable[[Any, argparse.Namespace], Mapping[str, Any]]
"""What a job does instead of its work, with the configuration and the command line's options."""
AddModes = Callable[[argparse.ArgumentParser, Any], Callable[[argparse.Namespace], Mode | None]]
"""Adds flags to a parser and to its group of flags that exclude each other; gives what chooses the mode by the options."""


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
    add_modes: AddModes | None = None,
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
    wait_shortly()
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
    choose = add_modes(parser, group) if add_modes else lambda options: None
    complete(parser)
    options = parser.parse_intermixed_args(arguments)
    mode = choose(options)
    logs.configure()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # what workers print shows in a log file as it comes

    def call() -> Mapping[str, Any]:
        config = _configure(root, options.items, recipe)
        if not mode and not any(map(_is_recipe, options.items)):
            scenes = (
                ", on generated scenes" if getattr(getattr(config, "data", None), "train", None) == "samples" else ""
            )
            print(
                f"no recipe is named: this is recipes/{recipe.name}{scenes}; --help shows how to name your own images"
            )
        return mode(config, options) if mode else body(config, options.dry_run)

    finish(call)


def run_parser(
    parser: argparse.ArgumentParser,
    body: Callable[[argparse.Namespace], Mapping[str, Any]],
    arguments: Sequence[str] | None = None,
) -> None:
    """Run a job that takes no recipe: `body` gets the options. Prints and exits as :func:`run` does."""
    wait_shortly()
    complete(parser)
    options = parser.parse_args(arguments)
    finish(lambda: body(options))


def model_parser(description: str | None, accepted: str) -> argparse.ArgumentParser:
    """A parser with the arguments that name a backbone; `accepted` says which kinds of model the job takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help=accepted)
    parser.add_argument(
        "--weights", default="pretrained", help="weights of a timm name: pretrained, random[:seed], or a file"
    )
    parser.add_argument("--size", type=int, help="side of the input in pixels; default: as the student was trained")
    parser.add_argument("--tracking-uri", help="MLflow store; default: MLFLOW_TRACKING_URI, else the work folder's")
    return parser


def tracking_uri(options: argparse.Namespace) -> str:
    """The MLflow store in which URIs are looked up."""
    from pipeline.runs.folder import work_folder
    from pipeline.tracking.address import resolve_uri

    return resolve_uri(options.tracking_uri, work_folder(JobConfig()), "--tracking-uri")


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


def complete(parser: argparse.ArgumentParser) -> None:
    """Print completions and exit if the shell asks for them; otherwise return."""
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)


def complete_item(roots: Sequence[type[JobRoot]], prefix: str, **_: Any) -> Iterator[str]:
    """Completions of `recipe.yaml | key=value`: recipes, fields of the job, and the values or files of a field."""
    from argcomplete.completers import FilesCompleter

    fields = {line.key: line.type for line in iter_fields(*roots)}
    key, equals, value = prefix.partition("=")
    if not equals:
        yield from (f"{field}=" for field in fields)
        yield from FilesCompleter(("yaml", "yml"))(prefix)
        yield from (recipe.name for recipe in RECIPES.glob("*.yaml"))
        return
    kind = fields.get(key, "")
    options = ("true", "false") if kind == "bool" else [option for option in kind.split("|") if option not in TYPES]
    yield from (f"{key}={option}" for option in options or FilesCompleter()(value))


def asked_flag(options: argparse.Namespace, flags: Sequence[str]) -> str | None:
    """The one of these flags that is given, if any; UserError for two of them, and for one beside `--task`."""
    asked = [flag for flag in flags if getattr(options, flag) not in (None, False)]
    if len(asked) > 1:
        raise UserError(f"--{asked[0]} and --{asked[1]}: give one of them")
    if asked and options.task:
        raise UserError(f"--task={options.task}: cannot be asked for with --{asked[0]}")
    return asked[0] if asked else None


def name_left_out(notes: Sequence[str], unreadable: Mapping[Path, str] | None) -> dict[str, Any]:
    """Name on stderr what a search has passed over and the images that cannot be read; returns the figures that tell it."""
    figures: dict[str, Any] = {}
    if notes:
        print(f"left out: {'; '.join(notes)}", file=sys.stderr)
        figures["left_out"] = notes
    if unreadable:
        for reason in unreadable.values():
            print(f"left out: {reason}", file=sys.stderr)
        figures |= {"ok": False, "unreadable": [*map(str, unreadable)]}
    return figures


def confirm(question: str, yes: bool) -> bool:
    """Ask on the terminal unless `yes` answers; without a terminal, that is a UserError."""
    if yes:
        return True
    if not sys.stdin.isatty():
        raise UserError("nothing was removed: add --yes, because there is no terminal to confirm on")
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)  # stdout ends with a line of JSON
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _configure(root: type[R], items: Sequence[str], default: Path) -> R:
    recipes = [*filter(_is_recipe, items)]
    if len(recipes) > 1:
        raise UserError(f"give one recipe, not {len(recipes)}: {', '.join(recipes)}")
    recipe = find_recipe(recipes[0]) if recipes else default
    return load_config(root, recipe, [item for item in items if item not in recipes])


def _is_recipe(item: str) -> bool:
    return "=" not in item and item.endswith((".yaml", ".yml"))


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
