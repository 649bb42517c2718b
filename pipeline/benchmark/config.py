"""What is measured side by side."""

from typing import Literal

from pydantic import Field, PositiveInt

from pipeline.config.tree import Section
from pipeline.runs.config import JobConfig


class BenchmarkConfig(Section):
    """What `jobs/benchmark.py` measures."""

    models: list[str] = Field(
        [
            "regla_m",
            "iformer_m",
            "efficientvit_b1",
            "efficientvit_b2",
            "repvit_m1_1",
            "fastvit_sa12",
            "mobilenetv4_conv_medium",
            "mobilenetv4_hybrid_medium",
            "mobilevitv2_100",
        ],
        min_length=1,
        description="timm models; `name {argument: value}` passes arguments",
    )
    reference: str = Field("regla_m", description="model that latency ratios refer to")
    sizes: list[PositiveInt] = Field([512], min_length=1, description="sides of the input in pixels")
    batch_sizes: list[PositiveInt] = Field([1], min_length=1, description="images per forward")
    forms: list[Literal["eager", "fused", "compiled", "onnx"]] = Field(
        ["fused", "onnx"], min_length=1, description="eager, fused, compiled, onnx (ONNX Runtime)"
    )
    device: Literal["cpu", "cuda"] = Field("cpu", description="device that the models run on")
    precisions: list[Literal["float32", "bfloat16", "float16"]] = Field(
        ["float32"], min_length=1, description="float32, bfloat16, float16"
    )
    threads: int = Field(1, ge=1, description="CPU threads of torch and of ONNX Runtime")
    rounds: int = Field(11, ge=1, description="interleaved rounds per model; the median is reported")


class BenchmarkJobConfig(JobConfig):
    """`jobs/benchmark.py`: networks side by side."""

    benchmark: BenchmarkConfig = BenchmarkConfig()
