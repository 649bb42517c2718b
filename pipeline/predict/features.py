"""Features in a file, one row per image."""

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from pipeline.errors import UserError


def check_features_file(file: Path) -> None:
    """Make the folder of a .parquet or .json file; UserError for any other name, or if it cannot be made."""
    if file.suffix not in (".parquet", ".json"):
        raise UserError(f"{file}: the name must end in .parquet or .json")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror})") from error


def write_features(file: Path, paths: Sequence[Path], features: Tensor) -> None:
    """Write ``path`` and ``features`` (float32) of each image, as a Parquet table or a JSON list of objects."""
    names = [str(path) for path in paths]
    if file.suffix == ".parquet":
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(features.numpy().ravel()), features.shape[1])
        pq.write_table(pa.table({"path": names, "features": vectors}), file)
    else:
        rows = [{"path": name, "features": row} for name, row in zip(names, features.tolist(), strict=True)]
        file.write_text(json.dumps(rows), encoding="utf-8")
