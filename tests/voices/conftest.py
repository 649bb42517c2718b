"""Students with heads: of a tiny CLIP model and a teacher of colours, with their cache; of a small SAM, in a file."""

from types import SimpleNamespace

import pytest
import torch

from pipeline.cache.fill.plan import plan_cache
from pipeline.distill.job import make_job
from pipeline.distill.kept_heads import StudentWithHeads, save_heads, write_heads
from pipeline.distill.standardise import neutral_standardiser
from pipeline.distill.task import build_distiller
from pipeline.runs.folder import cache_store
from pipeline.student.loading import load_student
from pipeline.student.model import Student, distillation_head, save_encoder
from tests.fakes import fill_in_process
from tests.student.conftest import export_student
from tests.teachers import tiny_clip
from tests.teachers.sam_files import DIM, authors_file

STUDENT = ["student.name=timm/test_resnet", "student.token_dim=16", "student.head_dim=32"]


@pytest.fixture
def taught(photo_config, tmp_path):
    """`folder` of the student (untrained), `file` with both towers of CLIP, `config` and complete `plan`; more overrides may be
    given."""

    def teach(*overrides, standardise="mean_std"):
        file = tmp_path / "clip.pt"
        torch.save(tiny_clip.build().state_dict(), file)
        clip = f"{{model: clip/{tiny_clip.PLAIN}, weights: '{file}'}}"
        teachers = f"teachers=[{clip}, {{model: 'tests.fakes:colours', args: {{dim: 4}}}}]"
        config = photo_config(*STUDENT, teachers, f"loss.standardise={standardise}", *overrides)
        plan, _ = fill_in_process(plan_cache(config, cache_store(config)))
        torch.manual_seed(0)
        distiller = build_distiller(make_job(config, plan)).eval()
        folder = tmp_path / "student"
        export_student(distiller.student.encoder, config, folder)
        save_heads(distiller, config.student.head_dim, folder)
        return SimpleNamespace(folder=folder, file=file, config=config, plan=plan, distiller=distiller)

    return teach


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
