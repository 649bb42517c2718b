"""The benchmark job on small inputs: its table, files, run and errors. No time is asserted."""

import json

import mlflow
import pandas as pd
import pytest
import torch

from jobs import benchmark
from pipeline.benchmark import benchmark as measuring
from pipeline.benchmark.config import BenchmarkJobConfig
from pipeline.config.load import load_config
from pipeline.errors import UserError
from pipeline.student.cost import cost

MODELS = ["regla_t", "mobilenetv3_small_050"]


def configured(tmp_path, *overrides: str):
    base = [
        f"work={tmp_path}",
        f"benchmark.models={json.dumps(MODELS)}",
        "benchmark.reference=regla_t",
        "benchmark.rounds=2",
        "benchmark.sizes=[32, 64]",
        "benchmark.forms=[eager, fused]",
    ]
    return load_config(BenchmarkJobConfig, None, [*base, *overrides])


def test_measures_every_model_form_and_size(tmp_path, capsys):
    figures = benchmark.main(configured(tmp_path), dry_run=False)
    table = pd.read_csv(tmp_path / "benchmarks" / "benchmark.csv")
    assert len(table) == len(MODELS) * 2 * 2
    assert (table.milliseconds > 0).all()
    assert (table.milliseconds_q1 <= table.milliseconds).all()
    assert (table.milliseconds <= table.milliseconds_q3).all()
    assert (table[table.model == "regla_t"].ratio == 1).all()
    ours = table[(table.model == "regla_t") & (table["size"] == 64)].set_index("form")
    assert ours.parameters["eager"] > ours.parameters["fused"] == 2949640
    assert set(figures["latency"]["regla_t/fused/float32/1x64"]) == {"ms", "ratio"}
    assert (tmp_path / "benchmarks" / "latency.png").stat().st_size > 10_000
    assert (tmp_path / "benchmarks" / "accuracy.png").stat().st_size > 10_000
    out = capsys.readouterr().out
    assert "mobilenetv3_small_050" in out
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert run.info.status == "FINISHED"
    assert run.data.metrics["regla_t/fused/float32/1x32/ratio"] == 1


@pytest.mark.slow
def test_onnx_runtime_and_a_model_with_arguments(tmp_path):
    short = "regla_t {depths: [1, 1, 1, 1]}"
    models = f"benchmark.models={json.dumps(['regla_t', short])}"
    config = configured(tmp_path, models, "benchmark.forms=[onnx]", "benchmark.sizes=[32]")
    figures = benchmark.main(config, dry_run=False)
    table = pd.read_csv(tmp_path / "benchmarks" / "benchmark.csv").set_index("model")
    assert table.parameters["regla_t"] == 2949640 > table.parameters[short]
    assert set(figures["latency"]) == {"regla_t/onnx/float32/1x32", f"{short}/onnx/float32/1x32"}


def test_half_precision_and_larger_batches_are_counted_once(tmp_path, monkeypatch):
    counted = []
    monkeypatch.setattr(measuring, "cost", lambda model, images: counted.append(images.shape) or cost(model, images))
    config = configured(
        tmp_path,
        "benchmark.models=[regla_t]",
        "benchmark.forms=[fused]",
        "benchmark.precisions=[bfloat16]",
        "benchmark.batch_sizes=[1, 2]",
        "benchmark.sizes=[32]",
    )
    figures = benchmark.main(config, dry_run=False)
    assert set(figures["latency"]) == {"regla_t/fused/bfloat16/1x32", "regla_t/fused/bfloat16/2x32"}
    assert counted == [(1, 3, 32, 32)] * 2  # as trained, and in its inference form


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["benchmark.models=[regla_t, resnet_of_mine]"], "resnet_of_mine"),
        (["benchmark.reference=resnet18"], "benchmark.reference"),
        (["benchmark.forms=[onnx]", "benchmark.precisions=[float16]"], "float32 on the CPU"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        benchmark.main(configured(tmp_path, *overrides), dry_run=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said(tmp_path):
    with pytest.raises(UserError, match=r"benchmark\.device=cpu"):
        benchmark.main(configured(tmp_path, "benchmark.device=cuda"), dry_run=True)


def test_a_model_that_does_not_take_the_size_is_named(tmp_path):
    config = configured(tmp_path, "benchmark.models=[regla_t, deit_tiny_patch16_224]", "benchmark.sizes=[64]")
    with pytest.raises(UserError, match=r"deit_tiny_patch16_224 does not take 64 px"):
        benchmark.main(config, dry_run=False)
