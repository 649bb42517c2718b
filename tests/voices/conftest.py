"""A student with the heads of a tiny CLIP model and of a teacher of colours, and the cache that they were distilled from."""

from types import SimpleNamespace

import pytest
import torch

from pipeline.cache.fill.plan import plan_cache
from pipeline.distill.job import make_job
from pipeline.distill.kept_heads import save_heads
from pipeline.distill.task import build_distiller
from pipeline.runs.folder import cache_store
from tests.fakes import fill_in_process
from tests.student.conftest import export_student
from tests.teachers import tiny_clip

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
