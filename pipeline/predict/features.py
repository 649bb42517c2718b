"""Features in a file, one row an image."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from pipeline.errors import UserError


def make_writer(file: Path) -> Callable[[Sequence[Path], Tensor], None]:
    """A function that writes one row per image, ``path`` and ``features`` (float32), to a `.parquet` or `.json` file.

    Raises:
        UserError: for another ending, or if its folder cannot be made.
    """
    if file.suffix not in _WRITERS:
        raise UserError(f"{file}: the name must end in {' or '.join(_WRITERS)}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror})") from error
    return partial(_WRITERS[file.suffix], file)


def _write_parquet(file: Path, paths: Sequence[Path], features: Tensor) -> None:
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(features.numpy().ravel()), features.shape[1])
    pq.write_table(pa.table({"path": [str(path) for path in paths], "features": vectors}), file)


def _write_json(file: Path, paths: Sequence[Path], features: Tensor) -> None:
    rows = [{"path": str(path), "features": row} for path, row in zip(paths, features.tolist(), strict=True)]
    file.write_text(json.dumps(rows), encoding="utf-8")


_WRITERS = {".parquet": _write_parquet, ".json": _write_json}
