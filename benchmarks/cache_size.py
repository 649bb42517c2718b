"""Measure bytes and fidelity of stored features, per teacher and codec.

    python benchmarks/cache_size.py recipes/photos.yaml data.train=<photos> teachers.1.weights=<file> --images 1024

Projections are fitted on one half of the images; every codec is evaluated on the other half. Bytes are those of a Parquet file
of that half, including zstd. Prints a table and one line of JSON: for the recipe's own codec the bytes of float32 over its bytes
(`ratio`) and the mean cosine of a patch (`min_cosine`), each the minimum over the trained teachers.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # a script imports from its own checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from benchmarks.synthetic_cache import binary_column
from pipeline.cache.layout.cached_teacher import make_teacher
from pipeline.cache.layout.codec import TARGET_COSINE, Codec, Projection, fidelity, fit_projection
from pipeline.config.load import load_config
from pipeline.distill.config import DistillJobConfig
from pipeline.imaging.crop import crop_and_resize
from pipeline.imaging.decode import decode_image
from pipeline.imaging.geometry import FULL
from pipeline.sources.open import open_source
from pipeline.sources.sample_scenes import SceneSettings
from teachers.base import Teacher

CODECS = ("float32", "float16", "bfloat16", "int8", "int8-zstd", "pca-int8", "pca-int8-zstd")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every teacher of a recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("items", nargs="+", help="a recipe and overrides, as for the jobs")
    parser.add_argument("--images", type=int, default=512, help="images, spread over the training source")
    parser.add_argument("--figure", type=Path, help="PNG file of cosine against bytes")
    options = parser.parse_args(arguments)
    config = load_config(DistillJobConfig, options.items[0], options.items[1:])
    images = list(_images(config, options.images))
    results = {}
    for entry in config.teachers:
        teacher = make_teacher(entry)
        untrained = teacher.spec.weights.startswith("random")
        height, width, channels = *teacher.spec.grid, teacher.spec.patch_dim
        name = f"{teacher.spec.name} {height}x{width}x{channels}{' (untrained)' if untrained else ''}"
        print(f"\n{name}: {len(images) // 2} images to fit, as many to evaluate")
        codec = entry.codec or config.cache.codec
        rows = _measure(codec, _features(teacher, images, config.cache.batch_size))
        results[name] = {"untrained": untrained, "codec": codec, **rows}
    if options.figure:
        _draw(results, options.figure)
    print(json.dumps(_summary(results)))


def _images(config: DistillJobConfig, count: int) -> Iterator[bytes]:
    data = config.data
    settings = SceneSettings(data.samples.train, data.samples.size, config.seed)
    source = open_source(data.train, split="train", image_column=data.image_column, samples=settings)
    index = source.index()
    chosen = np.linspace(0, index.num_rows - 1, min(count, index.num_rows)).round().astype(int)
    # Alternate halves are compared, so no class may lie in one of them only.
    found = source.read(index.take(np.random.default_rng(0).permutation(chosen)))
    return (image for image in found if isinstance(image, bytes))


@torch.inference_mode()
def _features(teacher: Teacher, images: Sequence[bytes], batch_size: int) -> dict[str, Tensor]:
    teacher.load()
    spec, parts = teacher.spec, []
    for first in range(0, len(images), batch_size):
        decoded = map(decode_image, images[first : first + batch_size])
        pixels = [crop_and_resize(image, FULL, spec.input_size, spec.interpolation) for image in decoded]
        parts.append(teacher.encode(torch.from_numpy(np.stack(pixels))))
    features = {"patches": torch.cat([part.patches for part in parts])}
    summaries = [part.summary for part in parts if part.summary is not None]
    return features | ({"summary": torch.cat(summaries)} if summaries else {})


def _measure(own: str, features: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Bytes and fidelity by codec, which include the recipe's own."""
    channels = features["patches"].shape[-1]
    fixed = [f"pca{channels // part}-int8" for part in (2, 4, 8, 16, 32) if channels // part >= 4]
    print(
        f"  {'codec':<18}{'components':>11}{'bytes per image':>16}{'of float32':>12}{'cosine':>9}{'1st pct':>9}{'error':>8}"
    )
    rows: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys([*CODECS, *fixed, own]):
        codec = Codec.parse(name)
        projection = fit_projection(codec, features["patches"][::2]) if codec.pca else None
        row = rows[name] = _evaluate(codec, projection, {kind: values[1::2] for kind, values in features.items()})
        kept, part = len(projection.basis) if projection else channels, rows["float32"]["bytes"] / row["bytes"]
        print(
            f"  {name:<18}{kept:>11}{row['bytes']:>16,.0f}{f'1/{part:.1f}':>12}"
            f"{row['cosine']:>9.4f}{row['cosine_p1']:>9.4f}{row['relative_error']:>8.4f}"
        )
    return rows


def _evaluate(codec: Codec, projection: Projection | None, features: dict[str, Tensor]) -> dict[str, float]:
    """Bytes an image over all token types, and the fidelity of the patches."""
    codecs = codec.build({kind: tuple(values.shape[1:]) for kind, values in features.items()}, projection)
    encoded = {kind: codecs[kind].encode(values) for kind, values in features.items()}
    columns = {kind: binary_column(rows) for kind, rows in encoded.items()}
    sink = pa.BufferOutputStream()
    compression = "zstd" if codec.zstd else "none"
    pq.write_table(pa.table(columns), sink, compression=compression, use_dictionary=False, write_statistics=False)
    kept = codecs["patches"].decode(torch.from_numpy(encoded["patches"]))
    return {"bytes": sink.getvalue().size / len(kept), **fidelity(features["patches"], kept)}


def _draw(results: dict[str, dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for teacher, rows in results.items():
        codecs = {name: (row["bytes"] / 1024, row["cosine"]) for name, row in rows.items() if isinstance(row, dict)}
        projected = sorted(codecs[name] for name in codecs if name[:3] == "pca" and name[3].isdecimal())
        (line,) = axes.plot(*zip(*projected, strict=True), "-", linewidth=0.8)
        points: Any = {"linestyle": "none", "color": line.get_color()}
        axes.plot(*zip(*codecs.values(), strict=True), marker=".", label=teacher, **points)
        axes.plot(*codecs[rows["codec"]], marker="*", markersize=15, markeredgecolor="black", **points)
    axes.axhline(TARGET_COSINE, color="grey", linewidth=0.8, linestyle="--")
    axes.set(
        xscale="log",
        xlabel="KiB per image",
        ylabel="mean cosine of a token",
        title="Stars: the default codec; lines: PCA and int8",
    )
    axes.legend()
    figure.savefig(path, dpi=120)


def _summary(results: dict[str, dict]) -> dict[str, object]:
    def figures(rows: dict, codec: str) -> dict[str, float]:
        ratio = rows["float32"]["bytes"] / rows[codec]["bytes"]
        return {"ratio": round(ratio, 2), "cosine": round(rows[codec]["cosine"], 5)}

    own = {name: figures(rows, rows["codec"]) for name, rows in results.items()}
    counted = [own[name] for name, rows in results.items() if not rows["untrained"]] or list(own.values())
    return {
        "ratio": min(row["ratio"] for row in counted),
        "min_cosine": min(row["cosine"] for row in counted),
        "teachers": {name: {"codec": results[name]["codec"], **row} for name, row in own.items()},
        "int8": {name: figures(rows, "int8") for name, rows in results.items()},
    }


if __name__ == "__main__":
    main()
