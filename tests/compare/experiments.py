"""A real MLflow store with an experiment as the jobs log it, but for the training: every figure is made up."""

from pipeline.compare.collect import Entry
from pipeline.config.jobs import job_root
from pipeline.config.load import load_config
from pipeline.runs.config import JobConfig
from pipeline.tracking.run import Run, start_run

CIFAR = {"train": ("photos/train.parquet", "cifar-11112222"), "val": ("photos/test.parquet", "cifar-val-33334444")}
FLOWERS = ("data/flowers/val", "flowers-val-aaaabbbb")
"""Other held-out images: their path and name."""
HOSTILE = '=2+5</script><img src=x onerror="document.title=1">|`*'
STUDENTS = {"regla_t": (2_692_640, 35e6, 0.0), "regla_s": (6_100_000, 70e6, 2.5)}
TEACHERS = {"hog": (14e6, 0.0), "dinov2/vits14": (60e6, 4.0), "clip/ViT-B-32@openai": (90e6, 6.0)}
"""Bytes in the cache, and what they add to kNN."""

UNUSED = ("classify", "segment", "detect", "augment", "knn")
"""Sections left out, to be quick."""


class Store:
    """Logs runs into one experiment."""

    def __init__(self, folder, experiment="proof"):
        self.work, self.uri, self.experiment = folder, f"sqlite:///{folder}/mlflow.db", experiment

    def start(self, job: str, *overrides: str, name: str = "run", **tags: str) -> Run:
        root = job_root(job) or JobConfig
        tree = load_config(root, None, [*overrides, "name=run"]).model_dump(mode="json")
        config = {key: value for key, value in tree.items() if key not in UNUSED} | {"name": name}
        return start_run(
            self.uri,
            experiment=self.experiment,
            name=f"{name}-{job}",
            config=config,
            tags={"job": job, **tags},
            work=self.work,
        )

    def distil(self, student, teachers, seed, knn, *overrides, name="run", status="FINISHED", data=CIFAR, **metrics):
        """A distillation of two epochs that ended with this kNN; returns its nested run."""
        listed = ", ".join(f"{{model: {teacher}}}" for teacher in teachers)
        settings = [
            f"student.name={student}",
            f"teachers=[{listed}]",
            f"seed={seed}",
            "data.train=/a/photos/train.parquet",
        ]
        parent = self.start(
            "distill", *settings, "data.val=/a/photos/test.parquet", "student.input_size=64", *overrides, name=name
        )
        filled, trained = parent.child("precompute"), parent.child("distill")
        for split, (location, identity) in data.items():
            filled.log_dataset(identity, location, identity[-8:], split)
        curve = [(0, {"knn": 11.0}), (10, {"epoch": 1.0, "samples_seen": 500.0})]
        curve += [(10, {"knn": knn - 2, "knn_raw": knn - 1.5}), (20, {"epoch": 2.0, "samples_seen": 1000.0})]
        trained.log_metrics([*curve, (20, {"knn": knn, "knn_raw": knn - 0.4})])
        if status == "FINISHED":
            parameters, macs, _ = STUDENTS.get(student, (1e6, 1e6, 0))
            trained.log_metric_dict({"parameters": parameters, "macs": macs})
            parent.log_metric_dict({"knn_before": 11.0, "knn_after": knn, "cache_bytes": 1e6, "hours": 0.5, **metrics})
        for run in (filled, trained, parent):
            run.finish(status)
        return trained

    def judge(self, job, student_run, figures, *overrides, status="FINISHED", name="run", val=CIFAR["val"]):
        """An evaluation of a student on the images `val` (location, identity); None: without a word on them."""
        field = "finetune" if job == "finetune" else "evaluate"
        run = self.start(job, f"{field}.student=work/runs/a/student", *overrides, name=name)
        if val:
            run.log_dataset(val[1], val[0], val[1][-8:], "val")
        run.set_student_run(student_run)
        run.log_metric_dict(figures)
        run.finish(status)
        return run

    def benchmark(self, milliseconds, *overrides, name="run"):
        """A benchmark that measured these."""
        run = self.start("benchmark", *overrides, name=name)
        run.log_metric_dict(milliseconds)
        run.finish()


def entry(label="regla_t", seed=0, *, status="finished", held_out="photos", config=(), curve=(), **measures):
    """A row as `collect` gives it, of a student of this name."""
    texts = {"status": status, "job": "distill", "student": label, "teachers": "hog", "seed": str(seed)}
    fields = {"student.name": label, **dict(config)}
    name = f"{label}-{seed}"
    run_id = f"id-{name}-{status}-{held_out}-{hash(frozenset(fields.items()))}"
    return Entry(run_id, name, seed, None, texts, measures, tuple(curve), fields, held_out)
