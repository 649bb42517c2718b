"""What follows from a job's declaration: its help, and the identity of its runs."""

import pickle
from typing import Any

import pytest
from pydantic import Field, create_model

from pipeline.config.jobs import all_roots, job_root
from pipeline.config.load import load_config
from pipeline.config.tree import Section, describe_fields, iter_fields, operational
from pipeline.distill.config import DistillJobConfig
from pipeline.downstream.config import EvaluateModelJobConfig, FinetuneJobConfig
from pipeline.training.config import TrainConfig


@pytest.mark.parametrize("root", all_roots(), ids=lambda root: root.__name__)
def test_every_field_has_a_meaning_and_help_lists_it(root):
    fields = list(iter_fields(*root.variants()))
    assert all(line.meaning for line in fields)
    text = describe_fields(*root.variants())
    assert all(f"  {line.key} " in text for line in fields)
    assert len(fields) == len({line.key for line in fields}) == len(text.splitlines())


def sections(job):
    return {line.key.partition(".")[0] for line in iter_fields(*job_root(job).variants()) if "." in line.key}


def test_a_job_has_the_sections_that_it_reads():
    base = {"tracking", "data"}
    teachers = base | {"cache", "teachers", "views", "plan", "resolutions"}
    assert sections("precompute") == teachers
    assert sections("distill") == teachers | {"student", "loss", "augment", "train", "knn"}
    assert sections("finetune") == base | {"student", "train", "finetune", "classify", "segment", "detect"}
    assert sections("linear") == base | {"cache", "student", "knn", "evaluate"}
    assert sections("evaluate-segment") == sections("finetune") | {"evaluate"}
    assert sections("benchmark") == {"tracking", "benchmark"}
    assert job_root("compare") is None


def fingerprint(*overrides, root=DistillJobConfig):
    return load_config(root, None, overrides).fingerprint()


@pytest.mark.parametrize(
    "change",
    [
        "work=/elsewhere",
        "outputs=s3://models/results",
        "tracking.experiment=x",
        "cache.uri=/elsewhere",
        "data.max_bad=0.5",
        "train.workers=2",
        "train.keep_checkpoints=5",
        "train.checkpoints=/elsewhere",
        "train.checkpoint_steps=9",
        "plan.gpu_hour_price=9",
        "detect.anchor=8",
        "train.lr=1e-3",
        "teachers=[hog]",
        "phases=[{train.keep_checkpoints: 5}]",
        "phases=[{train.lr: 1e-3}]",
    ],
)
def test_a_field_that_changes_no_number_or_is_at_its_default_changes_no_identity(change):
    assert fingerprint(change) == fingerprint()


@pytest.mark.parametrize(
    "change",
    [
        "seed=1",
        "train.lr=2e-3",
        "train.batch_size=512",
        "train.micro_batch=8",
        "train.precision=float32",
        "train.compile=true",
        "teachers=[{model: hog, weight: 0.5}]",
        "teachers=[hog, sam]",
        "teachers=[sam]",
        "loss.patches={cosine: 1}",
        "loss.max_patches=none",
        "student.args={drop_path_rate: 0.1}",
        "data.samples.size=64",
        "phases=[{train.lr: 2e-3}]",
        "phases=[{}, {}]",
    ],
)
def test_another_number_is_another_identity(change):
    assert fingerprint(change) != fingerprint()


def test_the_pictures_and_data_workers_of_a_fine_tuning_are_no_part_of_its_identity():
    changed = fingerprint("finetune.pictures=0", "finetune.data_workers=0", root=FinetuneJobConfig)
    assert changed == fingerprint(root=FinetuneJobConfig)
    assert fingerprint("finetune.task=detect", root=FinetuneJobConfig) != changed
    assert fingerprint("classify.mixup=0", root=FinetuneJobConfig) != changed


class OneMoreField(TrainConfig):
    momentum: float = Field(0.9, description="as a later version adds it")
    threads: int = operational(4, description="as a later version adds it")


class MoreSection(Section):
    strength: float = Field(0.0, description="as a later version adds it")


def test_a_later_version_with_more_fields_at_their_defaults_knows_the_runs_of_this_one():
    fields: dict[str, Any] = {"train": (OneMoreField, OneMoreField()), "more": (MoreSection, MoreSection())}
    later = create_model("Later", __base__=DistillJobConfig, **fields)
    for tree in ({}, {"train": {"lr": 2e-3}}, {"teachers": ["hog", "sam"], "phases": [{"train.lr": 2e-3}, {}]}):
        known = DistillJobConfig.model_validate(tree).fingerprint()
        assert later.model_validate(tree).fingerprint() == known
        assert later.model_validate({**tree, "train": {**tree.get("train", {}), "threads": 8}}).fingerprint() == known
    assert later(train=OneMoreField(momentum=0.5)).fingerprint() != DistillJobConfig().fingerprint()
    assert later(more=MoreSection(strength=1)).fingerprint() != DistillJobConfig().fingerprint()


@pytest.mark.parametrize("root", [FinetuneJobConfig, EvaluateModelJobConfig.of_task("segment")])
def test_a_configuration_with_the_section_of_a_task_travels_to_workers(root):
    config = load_config(root, None, ["finetune.task=segment", "segment.size=64"])
    copy = pickle.loads(pickle.dumps(config))  # noqa: S301
    assert copy == config
    assert type(copy) is type(config)
