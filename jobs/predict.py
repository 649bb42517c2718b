"""Features of images, written as Parquet or JSON.

python jobs/predict.py work/runs/<run>/student photos/ --to features.parquet
python jobs/predict.py models:/m-... a.jpg b.jpg --to features.json
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
from pipeline.predict import Predictor, find_images, writer_of


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, predict, and print where the features are and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    naming(parser, "exported student folder, MLflow model URI (models:/m-...), or timm name")
    parser.add_argument("images", nargs="+", type=Path, help="image files, and folders that are searched for them")
    parser.add_argument("--to", type=Path, default=Path("features.parquet"), help="*.parquet or *.json that is written")
    parser.add_argument("--batch-size", type=int, default=32, help="images per forward")
    parser.add_argument("--device", help="cpu, cuda, ...; default: a GPU where there is one")
    options = parser.parse_args(arguments)
    finish(lambda: predict(options))


def predict(options: argparse.Namespace) -> Mapping[str, Any]:
    """Write the features of all images."""
    write, paths = writer_of(options.to), find_images(options.images)
    loaded, size = load_named(options)
    features = Predictor(loaded.encoder, size, options.device, options.batch_size).features(paths)
    write(paths, features)
    print(table({"images": len(paths), "features": f"{options.to}, {features.shape[1]} channels"}))
    return {"file": str(options.to.resolve()), "images": len(paths), "channels": features.shape[1]}


if __name__ == "__main__":
    main()
