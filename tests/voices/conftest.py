"""A small SAM in a file, and students with and without its head."""

import pytest
import torch

from pipeline.distill.kept_heads import StudentWithHeads, write_heads
from pipeline.distill.standardise import neutral_standardiser
from pipeline.student.loading import load_student
from pipeline.student.model import Student, distillation_head, save_encoder
from tests.teachers.sam_files import DIM, authors_file

ARGS = {"dims": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "heads": 1}
SIZE = 128


def keep_heads(folder, labels, dim=DIM):
    """Export a small student with seeded heads of these teachers, whose standardisation is not neutral."""
    torch.manual_seed(0)
    encoder = load_student("regla_t", weights="random", args=ARGS).encoder
    save_encoder(encoder, "regla_t", ARGS, SIZE, folder)
    student, parts, teachers = Student(encoder, 16), {}, []
    for label in labels:
        standardiser = neutral_standardiser("mean_std", dim)
        standardiser.std.uniform_(0.5, 2)
        standardiser.mean.normal_()
        standardiser._prepare()
        heads = {"patches": distillation_head(16, 32, dim)}
        parts[label] = torch.nn.ModuleDict(heads), torch.nn.ModuleDict({"patches": standardiser})
        teachers.append({"label": label, "id": label.replace("/", "-"), "channels": {"patches": dim}})
    if labels:
        described = {"hidden": 32, "standardise": "mean_std", "teachers": teachers}
        write_heads(StudentWithHeads(student, parts, described), folder)
    return folder


@pytest.fixture(scope="session")
def sam_file(tmp_path_factory):
    """A whole SAM in the authors' layout; its embeddings have 32 channels."""
    file = tmp_path_factory.mktemp("sam") / "sam.pth"
    torch.save(authors_file(), file)
    return file


@pytest.fixture(scope="session")
def prompted_student(tmp_path_factory):
    """The folder of a student with the heads of two teachers, one of them a SAM."""
    return keep_heads(tmp_path_factory.mktemp("prompted") / "student", ["dinov2/vitb14", "sam/vit_b"])
