"""The examples of docs/cache.md, run as they stand there."""

import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.cache.fill.plan import plan_cache
from pipeline.cache.layout.cached_teacher import load_codecs
from pipeline.storage.store import Store
from tests.fakes import fill_in_process

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "cache.md"
DECODE, START, *EXAMPLES = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
CODECS = ("float16", "pca2-int8-zstd")


@pytest.fixture(scope="module", params=CODECS)
def cache(request, tmp_path_factory):
    """Folder of a teacher that gives 4 x 4 x 8 patches, and its patches by key as this repository decodes them."""
    from pipeline.config.load import load_config
    from pipeline.distill.config import DistillJobConfig
    from tests.fakes import write_photos

    root = tmp_path_factory.mktemp("open")
    write_photos(root / "photos", 150)
    teacher = "teachers=[{model: 'tests.fakes:colours', args: {dim: 8}}]"
    settings = [f"data.train={root}/photos", "cache.shard_size=100", f"cache.codec={request.param}", teacher]
    plan, _ = fill_in_process(plan_cache(load_config(DistillJobConfig, None, settings), Store.at(root / "cache")))
    dataset, teacher = plan.splits[0].dataset, plan.teachers[0]
    (part,) = dataset.parts
    folder = part.teacher(teacher.id)
    codecs, known = load_codecs(dataset.cache, teacher), {}
    for record in folder.records().values():
        table = folder.read(record)
        patches, summaries = (
            codec.decode(torch.from_numpy(np.stack([np.frombuffer(row, np.uint8) for row in table[kind].to_pylist()])))
            for kind, codec in (("patches", codecs["patches"]), ("summary", codecs["summary"]))
        )
        pairs = zip(patches.numpy(), summaries.numpy(), strict=True)
        known |= dict(zip(table["key"].to_pylist(), pairs, strict=True))
    return folder.store.uri, known


@pytest.mark.parametrize("library", ["pq.ParquetFile", "pandas", "duckdb", "load_dataset"])
def test_the_example_gives_the_features_of_its_keys(cache, library):
    folder, known = cache
    (example,) = [text for text in EXAMPLES if library in text]
    names = {"folder": folder}
    exec(DECODE + START + example, names)
    assert names["patches"].shape == (len(names["keys"]), 4, 4, 8)
    assert len(names["patches"]) in (10, 64, 100)
    assert (names["projection"] is not None) == names["codec"].startswith("pca")
    assert all(f"class{label}" in sample_id for sample_id, label, *_ in names.get("found", ()))
    expected = np.stack([known[key][0] for key in names["keys"]])
    np.testing.assert_allclose(names["patches"], expected, rtol=1e-5, atol=1e-6)


def test_the_documented_decoder_reads_summaries_too(cache):
    folder, known = cache
    names = {"folder": folder}
    exec(DECODE + START, names)
    table = pq.read_table(names["files"][0])
    rows = np.stack([np.frombuffer(row, np.uint8) for row in table["summary"].to_pylist()])
    found = names["decode"](rows, (8,), names["codec"], names["projection"], kind="summary")
    expected = np.stack([known[key][1] for key in table["key"].to_pylist()])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("codec", ["float32", "bfloat16", "int8", "float16-zstd", "int8-zstd"])
def test_the_documented_decoder_knows_every_number_format(codec):
    from pipeline.cache.layout.codec import Codec

    names = {}
    exec(DECODE, names)
    feature_codec = Codec.parse(codec).build({"patches": (2, 3, 8)}, None)["patches"]
    rows = feature_codec.encode(torch.randn(5, 2, 3, 8))
    assert np.array_equal(names["decode"](rows, (2, 3, 8), codec), feature_codec.decode(torch.from_numpy(rows)).numpy())


def test_shards_hold_standard_types_alone(cache):
    schema = pq.ParquetFile(next(Path(cache[0]).glob("*.parquet"))).schema
    types = {schema.column(i).name: schema.column(i).physical_type for i in range(len(schema))}
    assert types == {
        "key": "FIXED_LEN_BYTE_ARRAY",
        "view": "INT32",
        "summary": "FIXED_LEN_BYTE_ARRAY",
        "patches": "FIXED_LEN_BYTE_ARRAY",
    }
