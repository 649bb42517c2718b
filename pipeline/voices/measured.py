"""A student and its CLIP teacher on held-out images: the embeddings of both, from the cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.cache.fill.build import build_cache
from pipeline.cache.fill.plan import CachePlan, SplitPlan, plan_splits
from pipeline.cache.layout.cached_teacher import CachedTeacher
from pipeline.cache.layout.dataset import Dataset
from pipeline.cache.read.scan import read_summaries
from pipeline.errors import UserError
from pipeline.evaluate.frozen import cached_encoder
from pipeline.runs.addresses import fetch_student
from pipeline.runs.folder import cache_store, work_folder
from pipeline.student.loading import load_student
from pipeline.tracking.address import resolve_uri
from pipeline.voices.config import WordsJobConfig
from pipeline.voices.heads import KeptTeacher, Summaries
from pipeline.voices.words import find_summaries, open_tower
from teachers.clip_text import TextTower


@dataclass(frozen=True)
class WordsPlan:
    """The plan of an evaluation: held-out images, the student with its head, its teacher, and the text tower.

    Attributes:
        encoder: the entry of the student's backbone in the cache, which it shares with the other evaluations.
        student_run: the MLflow run that trained it, if known.
    """

    cache: CachePlan
    encoder: CachedTeacher
    model: Summaries
    teacher: KeptTeacher
    tower: TextTower
    student_run: str | None

    @property
    def split(self) -> SplitPlan:
        """The held-out images and their source."""
        return self.cache.splits[0]

    @property
    def images(self) -> Dataset:
        """The held-out images in the cache."""
        return self.split.dataset


def plan_words(config: WordsJobConfig) -> WordsPlan:
    """Plan the vectors of `evaluate.student` on the held-out images, before anything expensive starts.

    Raises:
        UserError, TeacherError: if the student has no CLIP head, or images or text tower cannot be had.
    """
    settings = config.evaluate
    if not settings.student:
        raise UserError("evaluate.student must be given: the exported folder of a student, or its MLflow URI")
    if config.data.held_out is None:
        raise UserError("data.val: an evaluation needs held-out images")
    work = work_folder(config)  # which all nodes see
    source = fetch_student(settings.student, resolve_uri(config.tracking.uri, work), work)
    if (folder := Path(source).expanduser()).is_dir():
        source = str(folder.resolve())  # workers have another working directory
    student = load_student(source)
    model, teacher = find_summaries(student, config.words.teacher)
    tower = open_tower(teacher, config.words.text_weights).to("cuda" if torch.cuda.is_available() else "cpu")
    if tower.dim != model.dim:
        raise UserError(f"words.text_weights: {tower.name} has {tower.dim} channels, the student's head {model.dim}")
    store = cache_store(config)
    size = settings.input_size or student.input_size or config.student.input_size
    encoder = cached_encoder(source, size, weights="pretrained", args={}, grid=None)
    cache = CachePlan(store, plan_splits(config, store, only=("val",)), (encoder,), config.cache.shard_size)
    return WordsPlan(cache, encoder, model, teacher, tower, student.provenance.get("run_id"))


def compute_vectors(plan: WordsPlan, config: WordsJobConfig) -> WordsPlan:
    """Compute the missing vectors on all nodes and GPUs of the Ray session."""
    cache, _ = build_cache(plan.cache, config)
    return replace(plan, cache=cache, encoder=cache.teachers[0])


@torch.inference_mode()
def student_embeddings(plan: WordsPlan) -> tuple[Tensor, Tensor]:
    """The student's embeddings [N, D] of length 1, and labels [N], in the order of the samples."""
    vectors, labels = read_summaries(plan.images, plan.encoder)
    return F.normalize(plan.model.predict(vectors), dim=1), labels


def teacher_embeddings(plan: WordsPlan) -> Tensor | None:
    """The teacher's own, as the cache has stored them, in the same order; None if the cache lacks any of them."""
    cached = plan.teacher.cached
    if cached is None or plan.images.missing(cached.id):
        return None
    return F.normalize(read_summaries(plan.images, cached)[0], dim=1)


def why_no_teacher(plan: WordsPlan) -> str:
    """Why the teacher's own figure is missing, with the remedy."""
    if plan.teacher.cached is None:
        return f"heads.json of the student does not describe {plan.teacher.label} (it is of an earlier version)"
    return (
        f"the cache lacks features of {plan.teacher.cached.id} on {plan.images.location}: jobs/precompute.py with the recipe "
        "of the distillation and this data.val computes them"
    )
