"""The starts that benchmarks/downstream.py compares."""

from benchmarks.downstream import starts
from pipeline.config.load import load_config
from pipeline.downstream.backbone import find_start
from pipeline.downstream.config import FinetuneJobConfig
from pipeline.student.loading import load_student
from pipeline.student.model import save_encoder


def test_scratch_is_the_architecture_of_the_student_with_weights_of_its_own(tmp_path):
    args = {"dims": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "heads": 1}
    save_encoder(load_student("regla_t", weights="random", args=args).encoder, "regla_t", args, 48, tmp_path)
    overrides = starts(tmp_path, ["timm/test_resnet"])
    distilled, scratch, other = (
        find_start(load_config(FinetuneJobConfig, None, ["seed=1", *overrides[name]])).encoder.state_dict()
        for name in ("distilled", "scratch", "timm/test_resnet")
    )
    assert {key: value.shape for key, value in scratch.items()} == {key: v.shape for key, v in distilled.items()}
    assert any(not value.equal(distilled[key]) for key, value in scratch.items())
    assert other.keys() != scratch.keys()
