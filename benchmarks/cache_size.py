"""Measure bytes and fidelity of stored features, per teacher and codec.

    python benchmarks/cache_size.py recipes/photos.yaml data.train=<photos> teachers.1.weights=<file> --images 1024
    python benchmarks/cache_size.py --simulated
    python benchmarks/cache_size.py --below <cache>

Projections are fitted on one part of the images and every codec is evaluated on the others, which are committed as the job
commits them. Bytes are those of all files of the teacher: features, statistics, records, projections, description.
Fidelity is the cosine of the standardised patches (`pipeline/cache/layout/target.py`), computed here in float64. PHI-S is a
rotation and one scale, which leave the cosine of the centred patches as it is.

`--simulated` draws features instead, in the shapes of DINOv2-L, CLIP-L and SAM-H (pooled to 16x16): normal, with means and
deviations that spread over the channels as lognormal, a correlation of the spectrum i**-power in a random basis, and for
the transformers two massive channels of a hundredfold deviation. The spectrum decides the size: it is a model, no
measurement of those networks.

`--below` measures a cache that a job has filled instead: the bytes of every file below its folder by kind, relative to the
features, and for each teacher those of float32 over all its bytes: features, statistics, records, projections, description.

Prints a table and one line of JSON: for the recipe's own codec the bytes of float32 over its bytes (`ratio`) and the mean cosine
(`min_cosine`), each the minimum over the trained teachers.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

if not __package__:  # a script imports from its own checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pipeline.cache.config import TeacherConfig
from pipeline.cache.fill.shard_builder import ShardBuilder
from pipeline.cache.layout.cached_teacher import CachedTeacher, make_teacher, projections_of
from pipeline.cache.layout.codec import Codec, FeatureCodec
from pipeline.cache.layout.part import KEY, image_key, teacher_home
from pipeline.cache.layout.projection import dump_projections, fit_projections
from pipeline.cache.layout.shards import ShardFolder, add_projection, fixed_width
from pipeline.cache.layout.stats import dump_moments, merge_all
from pipeline.cache.layout.target import TARGET_COSINE
from pipeline.cache.layout.view_rows import ViewRows
from pipeline.config.load import load_config
from pipeline.distill.config import DistillJobConfig
from pipeline.imaging.crop import crop_and_resize
from pipeline.imaging.decode import decode_image
from pipeline.imaging.geometry import FULL
from pipeline.sources.open import open_source
from pipeline.sources.sample_scenes import SceneSettings
from pipeline.storage.store import Store
from teachers.base import TeacherOutput, TeacherSpec

CODECS = ("float32", "float16", "int8", "int8-zstd", "pca-int8-zstd")
OWN = "pca-int8-zstd"
BATCH, SHARD = 32, 512
SIMULATED = {"DINOv2-L": (1024, 1024, 2), "CLIP-L": (1024, 768, 2), "SAM-H": (256, None, 0)}
"""Channels of the 16x16 patches and of the summary, and massive channels."""


@dataclass
class Features:
    """Features of one teacher: those to fit on, and batches to store, the same every time."""

    spec: TeacherSpec
    fitted: dict[str, Tensor]
    stored: Sequence[Callable[[], dict[str, Tensor]]]
    untrained: bool = False


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every teacher of a recipe, or simulated ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("items", nargs="*", help="a recipe and overrides, as for the jobs")
    parser.add_argument("--simulated", action="store_true", help="draw features instead")
    parser.add_argument("--power", type=float, default=1.5, help="with --simulated: decay of the spectrum")
    parser.add_argument("--below", metavar="CACHE", help="count the files of this cache instead")
    parser.add_argument("--images", type=int, default=768, help="images, of which 256 are fitted and the others stored")
    parser.add_argument("--figure", type=Path, help="PNG file of cosine against bytes")
    options = parser.parse_args(arguments)
    if options.below:
        print(json.dumps(_count(Path(options.below))))
        return
    teachers = _simulated(options) if options.simulated else _computed(options)
    results = {}
    for codec, features in teachers:
        spec = features.spec
        name = (
            f"{spec.name} {spec.grid[0]}x{spec.grid[1]}x{spec.patch_dim}{' (untrained)' if features.untrained else ''}"
        )
        stored = sum(_rows(batch()) for batch in features.stored)
        print(f"\n{name}: {len(features.fitted['patches'])} images fitted, {stored} stored")
        results[name] = {"untrained": features.untrained, "codec": codec, **_measure(codec, features)}
    if options.figure:
        _draw(results, options.figure)
    print(json.dumps(_summary(results)))


KINDS = {
    "images": r"parts/.*/images/shard-.*\.parquet",
    "features": r"parts/.*/teachers/.*/shard-.*\.parquet",
    "crops": r"parts/.*/rows/shard-.*\.parquet",
    "statistics": r".*/(shard-.*|statistics|stats|phi_s)\.npz",
    "projections": r"teachers/.*/projection-.*\.npz",
    "records": r"parts/.*/(shard-\d+|records)\.json",
    "samples and keys": r".*/((rows|bad)-.*|index)\.parquet",
    "descriptions": r".*",
}
"""Kinds of files by the first pattern that their path below a cache matches."""


def _count(cache: Path) -> dict[str, object]:
    """Bytes of all files below a cache by kind, and of each teacher's beside those of float32."""
    files = {path: path.stat().st_size for path in sorted(cache.rglob("*")) if path.is_file()}
    sizes, numbers, own = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0), dict[str, list[float]]()
    for path, size in files.items():
        place = path.relative_to(cache).as_posix()
        kind = next(kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, place))
        sizes[kind], numbers[kind] = sizes[kind] + size, numbers[kind] + 1
        named = re.match(r"(?:parts/.*/|)teachers/([^/]+)/|datasets/.*/statistics/[^/]+/[^/]+/([^/]+)/", place)
        if named:
            sums = own.setdefault(named[1] or named[2], [0, 0, 0])  # all bytes, features, float32
            sums[0] += size
            if kind == "features":
                about, rows = pq.read_schema(path).metadata, pq.read_metadata(path).num_rows
                shapes = [json.loads(value) for name, value in about.items() if name.endswith(b".shape")]
                sums[1] += size
                sums[2] += 4 * rows * sum(map(math.prod, shapes))
    print(f"  {'kind':<18}{'files':>8}{'bytes':>15}{'of features':>13}")
    for kind, size in sizes.items():
        print(f"  {kind:<18}{numbers[kind]:>8}{size:>15,}{size / sizes['features']:>13.2%}")
    beside = sum(size for kind, size in sizes.items() if kind not in ("images", "crops", "features"))
    print(f"  {'beside both':<18}{'':>8}{beside:>15,}{beside / sizes['features']:>13.2%}")
    ratios = {name: exact / total for name, (total, _, exact) in own.items()}
    for name, (total, features, _) in own.items():
        print(
            f"  {name:<45}{total:>15,} bytes, {total / features - 1:.2%} beside features, 1/{ratios[name]:.1f} of float32"
        )
    return {"bytes": sizes, "beside": round(beside / sizes["features"], 5), "ratios": ratios}


def _rows(batch: Mapping[str, Tensor]) -> int:
    return len(batch["patches"])


def _computed(options: argparse.Namespace) -> Iterator[tuple[str, Features]]:
    config = load_config(DistillJobConfig, options.items[0], options.items[1:])
    images = list(_images(config, options.images))
    for entry in config.teachers:
        teacher = make_teacher(entry)
        teacher.load()
        spec, batches = teacher.spec, []
        for first in range(0, len(images), BATCH):
            decoded = map(decode_image, images[first : first + BATCH])
            pixels = [crop_and_resize(image, FULL, spec.input_size, spec.interpolation) for image in decoded]
            with torch.inference_mode():
                output = teacher.encode(torch.from_numpy(np.stack(pixels)))
            kinds = {"patches": output.patches, "summary": output.summary}
            batches.append({kind: values.float() for kind, values in kinds.items() if values is not None})
        few = len(images) // BATCH // 3
        fitted = {kind: torch.cat([batch[kind] for batch in batches[:few]]) for kind in batches[0]}
        yield (
            entry.codec or config.cache.codec,
            Features(
                spec,
                fitted,
                [partial(dict, batch) for batch in batches[few:]],
                spec.weights.startswith("random"),
            ),
        )


def _images(config: DistillJobConfig, count: int) -> Iterator[bytes]:
    data = config.data
    settings = SceneSettings(data.samples.train, data.samples.size, config.seed)
    source = open_source(data.train, split="train", image_column=data.image_column, samples=settings)
    index = source.index()
    chosen = np.linspace(0, index.num_rows - 1, min(count, index.num_rows)).round().astype(int)
    # Two parts are compared, so no class may lie in one of them only.
    found = source.read(index.take(np.random.default_rng(0).permutation(chosen)))
    return (image for image in found if isinstance(image, bytes))


def _draw_batch(distributions: Mapping[str, tuple[Tensor, Tensor]], seed: int) -> dict[str, Tensor]:
    """A batch of features by token type."""
    generator, batch = torch.Generator().manual_seed(seed), {}
    for kind, (mean, mixing) in distributions.items():
        shape = (BATCH, 16, 16) if kind == "patches" else (BATCH,)
        batch[kind] = mean + torch.randn(*shape, len(mean), generator=generator) @ mixing
    return batch


def _distribution(channels: int, massive: int, power: float) -> tuple[Tensor, Tensor]:
    """Mean [D] and mixing matrix [D, D] of normal features."""
    rng = np.random.default_rng(0)
    deviations = np.exp(0.8 * rng.standard_normal(channels))
    deviations[rng.choice(channels, massive, replace=False)] *= 100
    spectrum = np.arange(1, channels + 1.0) ** -power
    mixing = np.sqrt(spectrum)[:, None] * np.linalg.qr(rng.standard_normal((channels, channels)))[0]
    mixing *= deviations / np.linalg.norm(mixing, axis=0)
    mean = deviations * rng.standard_normal(channels)
    return torch.from_numpy(mean).float(), torch.from_numpy(mixing).float()


def _simulated(options: argparse.Namespace) -> Iterator[tuple[str, Features]]:
    for name, (patches, summary, massive) in SIMULATED.items():
        channels = {"patches": patches} | ({"summary": summary} if summary else {})
        few = 256 // BATCH
        distributions = {kind: _distribution(size, massive, options.power) for kind, size in channels.items()}
        batches = [partial(_draw_batch, distributions, seed) for seed in range(options.images // BATCH)]
        fitting = [batch() for batch in batches[:few]]
        fitted = {kind: torch.cat([batch[kind] for batch in fitting]) for kind in channels}
        spec = TeacherSpec(
            name=f"{name} (simulated)",
            architecture=name,
            weights="none",
            input_size=(224, 224),
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            interpolation="bicubic",
            summary_dim=summary,
            patch_dim=patches,
            grid=(16, 16),
            licence="none",
        )
        yield OWN, Features(spec, fitted, batches[few:])


def _measure(own: str, features: Features) -> dict[str, dict[str, float]]:
    """Bytes and fidelity by codec, which include the recipe's own."""
    heads = ("bytes an image", "beside", "of float32", "target", "1st pct", "PHI-S", "1st pct", "raw")
    print(f"  {'codec':<15}{'width':>7}" + "".join(f"{head:>15}" for head in heads))
    rows: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys([*CODECS, own]):
        with TemporaryDirectory() as folder:
            row = rows[name] = _stored(name, features, Store.at(folder))
        ratio = f"1/{rows['float32']['bytes'] / row['bytes']:.1f}"
        cosines = (f"{row[key]:.4f}" for key in ("cosine", "cosine_p1", "phi_s", "phi_s_p1", "raw_cosine"))
        cells = (f"{row['bytes']:,.0f}", f"{row['beside']:.2%}", ratio, *cosines)
        print(f"  {name:<15}{row['width']:>7}" + "".join(f"{cell:>15}" for cell in cells), flush=True)
    return rows


def _stored(codec: str, features: Features, cache: Store) -> dict[str, float]:
    """Commit shards, and measure the folders of the teacher and what is read from them."""
    spec = features.spec
    teacher = CachedTeacher(TeacherConfig(model="hog"), spec, "measured", codec, "float32")
    home = teacher_home(cache, teacher.id)
    folder = ShardFolder(cache.sub("shards"), home=home)
    if Codec.parse(codec).pca:
        parsed = Codec.parse(codec)
        add_projection(home, dump_projections(parsed, fit_projections(parsed, features.fitted)))
    home.put("teacher.json", json.dumps(asdict(spec), indent=2).encode())
    per_shard, images = SHARD // BATCH, 0
    for shard in range(-(-len(features.stored) // per_shard)):
        builder, keys = ShardBuilder(teacher, folder.projection, projections_of(cache, teacher)), []
        for number in range(shard * per_shard, min((shard + 1) * per_shard, len(features.stored))):
            batch = features.stored[number]()
            keys += [image_key(str(images + row).encode()) for row in range(_rows(batch))]
            images += _rows(batch)
            builder.add(TeacherOutput(batch.get("summary"), batch["patches"]), 0.0)
        table = pa.table({"key": pa.array(keys, KEY), "view": pa.array([0] * len(keys), pa.int16())})
        views = ViewRows(table, table, {})
        with patch.object(ShardBuilder, "fidelity", lambda *_: {}):  # measured here, and no codec is refused
            builder.commit(folder, shard, views, "cpu")
    records = folder.records()
    if len(records) > 1:
        folder.merge_statistics(records)
    cache.put("stats.npz", dump_moments(merge_all(folder.moments(records.values()))))
    total = cache.bytes_below()
    parquet = sum(record.bytes for record in records.values())
    return {
        "width": builder.codecs["patches"].width,
        "bytes": total / images,
        "beside": total / parquet - 1,
        **_cosines(teacher.codecs(projections_of(cache, teacher))["patches"], features, folder),
    }


def _cosines(codec: FeatureCodec, features: Features, folder: ShardFolder) -> dict[str, float]:
    """Cosines of the stored patches, standardised by the statistics of all of them, and raw, in float64."""
    merged = merge_all(folder.moments(folder.records().values()))["patches"]
    standardised, centred, raw, first = [], [], [], 0
    read = np.concatenate([fixed_width(folder.read(r, ["patches"])["patches"]) for r in folder.records().values()])
    for batch in (make() for make in features.stored):
        x = batch["patches"].flatten(0, -2).double().numpy()
        rows = torch.from_numpy(read[first : first + _rows(batch)].copy())
        y = codec.decode(rows).flatten(0, -2).double().numpy()
        first += _rows(batch)
        raw.append(_cosine(x, y))
        centred.append(_cosine(x - merged.mean, y - merged.mean))
        live = merged.std > 1e-6 * np.abs(merged.mean)
        standardised.append(_cosine(*((part[:, live] - merged.mean[live]) / merged.std[live] for part in (x, y))))
    target, phi_s, raw_cosines = (np.concatenate(parts) for parts in (standardised, centred, raw))
    return {
        "cosine": float(target.mean()),
        "cosine_p1": float(np.percentile(target, 1)),
        "phi_s": float(phi_s.mean()),
        "phi_s_p1": float(np.percentile(phi_s, 1)),
        "raw_cosine": float(raw_cosines.mean()),
    }


def _cosine(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Cosines of the rows of two arrays [N, D]; rows of zeros are left out."""
    lengths = np.linalg.norm(x, axis=1)
    some = lengths > 0
    return np.sum(x * y, axis=1)[some] / (lengths[some] * np.linalg.norm(y, axis=1)[some].clip(1e-30))


def _draw(results: dict[str, dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for teacher, rows in results.items():
        codecs = {name: (row["bytes"] / 1024, row["cosine"]) for name, row in rows.items() if isinstance(row, dict)}
        (line,) = axes.plot(*zip(*codecs.values(), strict=True), marker=".", linestyle="none", label=teacher)
        axes.plot(*codecs[rows["codec"]], marker="*", markersize=15, markeredgecolor="black", color=line.get_color())
    axes.axhline(TARGET_COSINE, color="grey", linewidth=0.8, linestyle="--")
    axes.set(xscale="log", xlabel="KiB per image, all files", ylabel="mean cosine of a standardised patch")
    axes.set_title("Stars: the default codec")
    axes.legend()
    figure.savefig(path, dpi=120)


def _summary(results: dict[str, dict]) -> dict[str, object]:
    def figures(rows: dict, codec: str) -> dict[str, float]:
        ratio = rows["float32"]["bytes"] / rows[codec]["bytes"]
        names = ("cosine", "cosine_p1", "beside")
        return {"ratio": round(ratio, 2), **{name: round(rows[codec][name], 5) for name in names}}

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
