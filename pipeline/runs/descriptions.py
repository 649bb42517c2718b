"""What the runs of a job are called and how they describe themselves in MLflow, from the configuration alone."""

from __future__ import annotations

from pipeline.config.load import Config

_BACKBONES = ("finetune", "knn", "linear", "seg-probe")


def run_title(config: Config, job: str) -> str:
    """A name that tells one run from its neighbours: recipe, job, and what the job is about."""
    return " ".join([f"{config.name}-{job}", *_about(config, job), f"seed{config.seed}"])


def _about(config: Config, job: str) -> list[str]:
    teachers = "+".join(teacher.model.removeprefix("timm/") for teacher in config.teachers)
    student = config.student.name.removeprefix("timm/")
    if job == "distill":
        return [student, f"from {teachers}"]
    if job == "precompute":
        return [teachers]
    if job == "finetune":
        return [config.finetune.task, config.finetune.student or f"{student} from scratch"]
    if job in _BACKBONES:
        return [str(config.evaluate.student)]
    return [str(config.evaluate.model)] if job.startswith("evaluate") else []


def run_note(config: Config, job: str) -> list[str]:
    """Paragraphs of Markdown: what the job does, with what, on which images."""
    lines = [
        f"**{run_title(config, job)}**",
        f"Images: `{config.data.train}`, held out: `{config.data.held_out or 'none'}`.",
    ]
    if job in ("distill", "precompute"):
        if job == "distill" and config.student.weights != "random":
            lines.append(f"The student starts from the weights `{config.student.weights}`.")
        rows = [f"| {teacher.model} | {teacher.weights} | {teacher.weight} |" for teacher in config.teachers]
        lines.append("\n".join(["| teacher | weights | in the loss |", "|---|---|---|", *rows]))
        lines.append(
            "Their licences and the hashes of what they said are artifacts of the nested run `precompute`: `teachers/`, "
            "`manifests/`."
        )
    if job in ("distill", "finetune"):
        train = config.train
        lines.append(
            f"Training: {train.epochs} epochs of batches of {train.batch_size} at {config.student.input_size} px, seed "
            f"{config.seed}. Curves, pictures and the model are in the nested run `{job}`."
        )
    return lines
