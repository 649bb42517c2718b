"""What every job shares: arguments, clear errors with exit code 2, and the last line of JSON."""

from __future__ import annotations

import argparse
import io
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import Config, describe_fields, load_config
from pipeline.errors import UserError
from teachers.base import TeacherError

DEFAULT_RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "quickstart.yaml"


def run(
    body: Callable[[Config, bool], Mapping[str, Any]], description: str, arguments: Sequence[str] | None = None
) -> None:
    """Parse the command line, run the job and print its figures as one line of JSON.

    Args:
        body: called with the configuration and whether to stop after the plan.
        description: first paragraph of `--help`.

    Exits with code 2 and one line on what the user can mend; anything else keeps its traceback.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"fields (recipe keys and overrides):\n{describe_fields()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "items", nargs="*", metavar="recipe.yaml | key=value", help="a recipe (recipes/quickstart.yaml) and overrides"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved plan and stop")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.captureWarnings(True)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # what workers print shows in a log file as it comes
    try:
        figures = body(_configure(options.items), options.dry_run)
    except (UserError, TeacherError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    print(json.dumps(figures))


def _configure(items: Sequence[str]) -> Config:
    recipes = [item for item in items if "=" not in item and item.endswith((".yaml", ".yml"))]
    if len(recipes) > 1:
        raise UserError(f"give one recipe, not {len(recipes)}: {', '.join(recipes)}")
    return load_config(recipes[0] if recipes else DEFAULT_RECIPE, [item for item in items if item not in recipes])


def table(rows: Mapping[str, Any]) -> str:
    """Two aligned columns; rows whose value is None are left out."""
    shown = {name: value for name, value in rows.items() if value is not None}
    width = max(len(name) for name in shown)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in shown.items())


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
