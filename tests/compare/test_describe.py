"""What a group of runs goes by: the fields that their job reads and that change a number."""

import pytest

from pipeline.compare.describe import configuration
from pipeline.config.jobs import all_roots, job_root
from pipeline.config.load import load_config
from pipeline.tracking.reading import LoggedRun
from pipeline.tracking.run import _flatten


def params(root, *overrides):
    tree = load_config(root, None, overrides).model_dump(mode="json")
    return {key: str(value) for key, value in _flatten(tree)}


def compared(job, fields):
    return configuration(LoggedRun("1", "run", None, "FINISHED", 0, fields, {"job": job}, {}, {}), {})


@pytest.mark.parametrize("job", ["distill", "finetune", "linear", "evaluate-detect", "precompute"])
def test_a_run_that_logged_the_fields_of_all_jobs_is_like_one_that_logged_its_own(job):
    root = job_root(job)
    own = params(root.of_task("detect") if job == "evaluate-detect" else root.select({}))
    whole = {key: value for root in all_roots() for kind in root.variants() for key, value in params(kind).items()}
    whole |= own
    found = compared(job, whole)
    assert found == compared(job, own)
    assert found.keys() <= own.keys()


def test_fields_that_change_no_number_and_the_seed_are_no_difference():
    changed = ["name=b", "work=/b", "seed=1", "cache.uri=/b", "train.workers=2", "tracking.experiment=b", "data.name=b"]
    changed += ["train.keep_checkpoints=9", "outputs=/b", "train.checkpoints=/b", "plan.gpu_hour_price=3"]
    root = job_root("distill")
    assert compared("distill", params(root, *changed)) == compared("distill", params(root))
    phases = "phases=[{{train.epochs: 2, train.workers: {}}}]"
    one, other = (compared("distill", params(root, phases.format(workers))) for workers in (1, 2))
    assert one == other
    assert one["phases.0.train.epochs"] == "2"


def test_fields_that_change_a_number_are_differences():
    root = job_root("distill")
    base, found = (compared("distill", params(root, *more)) for more in ([], ["loss.drop=0.5", "teachers=[hog, sam]"]))
    assert {key for key in found if found[key] != base.get(key)} >= {"loss.drop", "teachers.1.model"}


def test_fields_of_a_task_of_the_users_own_are_kept():
    fields = params(job_root("finetune")) | {"depth.bins": "16"}
    assert compared("finetune", fields)["depth.bins"] == "16"
