"""Export a backbone in the formats of other runtimes, each held against eager, with a description and a model card.

python jobs/export.py work/runs/<run>/student --format torch_export onnx
python jobs/export.py models:/m-... --to exported
python jobs/export.py timm/<name> --weights <file> --size 224
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jobs._backbone import load_named, naming
from jobs._cli import finish, table
from pipeline.shipping import FILES, ship


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, export, and print what was written as a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    naming(parser)
    formats = [form for form in FILES if form != "coreml"]
    parser.add_argument(
        "--format", nargs="+", choices=list(FILES), default=formats, help=f"default: {' '.join(formats)}"
    )
    parser.add_argument("--to", type=Path, default=Path("exported"), help="folder that is written; default: exported")
    options = parser.parse_args(arguments)
    finish(lambda: export(options))


def export(options: argparse.Namespace) -> Mapping[str, Any]:
    """Write the folder."""
    loaded, size = load_named(options)
    described = ship(loaded, options.format, options.to, size)
    rows = {
        form: f"{options.to / entry['file']}  {_shown(entry['parity'])}" for form, entry in described["formats"].items()
    }
    print(f"{loaded.name} at {size} px\n{table({**rows, 'model card': options.to / 'README.md'})}")
    return {"folder": str(options.to.resolve()), "formats": described["formats"]}


def _shown(parity: Any) -> str:
    return (
        parity
        if isinstance(parity, str)
        else f"differs from eager by {parity['relative_error']:.1e} of the largest output"
    )


if __name__ == "__main__":
    main()
