"""Every recipe loads, and resolves to a plan before any weights are there; what it lacks is one clear line."""

import re
import shutil
from functools import cache
from pathlib import Path

import pytest
import yaml

from jobs import distill, precompute
from pipeline.cache.fill import plan
from pipeline.config.load import load_config
from pipeline.distill.config import DistillJobConfig
from pipeline.distill.task import build_student
from pipeline.errors import UserError
from teachers.hub import HubFile
from tests.fakes import write_photos
from tests.student.conftest import export_student

RECIPES = [
    path
    for path in sorted(Path(__file__).resolve().parents[2].glob("recipes/*.yaml"))
    if "finetune" not in yaml.safe_load(path.read_text())  # those are for jobs/finetune.py
]
DATA = {"data.train": "train", "data.val": "val"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Folder of a few photos in each place that a recipe looks for them."""
    folder = tmp_path_factory.mktemp("photos")
    for split in ("train", "part", "val"):
        write_photos(folder / split, 8)
    return folder


@pytest.fixture(scope="module")
def proxy(tmp_path_factory):
    """The exported student of another recipe."""
    folder = tmp_path_factory.mktemp("proxy")
    config = load_config(DistillJobConfig, None, ["student.name=regla_l"])
    export_student(build_student(config).encoder, config, folder)
    return folder


@pytest.fixture(scope="module")
def quick_teachers():
    """Specs are found once, whichever recipe asks."""
    plain = plan.make_teacher
    remembered = cache(lambda key: plain(key.config))

    class Key:
        def __init__(self, config):
            self.config, self.text = (
                config,
                config.model_dump_json(include={"model", "weights", "input_size", "pool", "args"}),
            )

        def __hash__(self):
            return hash(self.text)

        def __eq__(self, other):
            return self.text == other.text

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "make_teacher", lambda config: remembered(Key(config)))
        patch.setattr(HubFile, "cached", lambda file: Path(__file__))
        yield


def test_there_are_the_recipes_that_the_readme_promises():
    names = {path.stem for path in RECIPES}
    sizes = {f"imagenet_regla_{size}" for size in "tsml"}
    assert names >= {"quickstart", "photos", "own_images", "imagenet100", "cifar", *sizes}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_resolves_to_a_plan(recipe, photos, proxy, tmp_path, job, quick_teachers):
    config = load_config(DistillJobConfig, recipe)
    phases = config.phase_configs()
    overrides = [f"{key}={photos}/{part}" for key, part in DATA.items()]
    overrides += [
        f"phases.{n}.data.train={photos}/part" for n, changes in enumerate(config.phases) if "data" in changes
    ]
    overrides += [f"{'phases.0.' if config.phases else ''}train.batch_size=8", f"work={tmp_path}"]
    overrides += [f"phases.{n}.train.batch_size=8" for n in range(1, len(config.phases))]
    overrides += ["teachers.1.weights=random"] if recipe.stem == "photos" else []
    overrides += [f"teachers.0.weights={proxy}"] if recipe.stem.endswith("_proxy") else []
    text, figures = job(distill.main, str(recipe), *overrides, "--dry-run")
    assert figures == {"dry_run": True}
    assert text.count(" views cached") >= len(phases) * len(config.teachers)
    assert "resized" not in text or recipe.stem in ("quickstart", "photos")
    for number, phase in enumerate(phases, 1):
        assert len(phases) == 1 or f"plan of phase {number} of {len(phases)}" in text
        assert f"{phase.student.name} at {phase.student.input_size} px" in text
        assert f"{phase.train.epochs} epochs of " in text
    assert not list(tmp_path.iterdir())


def test_the_cache_is_planned_for_every_phase(photos, tmp_path, job, quick_teachers):
    data = [f"{key}={photos}/{part}" for key, part in DATA.items()]
    recipe = str(RECIPES[0].parent / "imagenet.yaml")
    text, _ = job(precompute.main, recipe, *data, "--dry-run", f"phases.1.data.train={photos}/part", f"work={tmp_path}")
    assert "plan of phase 1 of 2" in text
    assert "plan of phase 2 of 2" in text
    assert "224x224 px -> 16x16x768" in text
    assert "336x336 px -> 24x24x768" in text


def test_the_sizes_of_imagenet_differ_in_their_student_alone():
    trees = []
    for size in "tsml":
        config = load_config(DistillJobConfig, Path(RECIPES[0].parent, f"imagenet_regla_{size}.yaml"))
        assert config.student.name == f"regla_{size}"
        tree = config.model_dump(exclude={"name"})
        tree["student"].pop("name")
        trees.append(tree)
    assert all(tree == trees[0] for tree in trees)
    assert len(config.phases) == 2


def test_images_that_are_not_there_are_named(job, refused, tmp_path):
    message = refused(distill.main, str(RECIPES[0].parent / "imagenet_regla_m.yaml"), f"work={tmp_path}", "--dry-run")
    assert "imagenet1k-train-0000.tar: no such file or folder" in message


def test_a_base_is_read_beside_the_recipe_and_changed_field_by_field(tmp_path):
    (tmp_path / "base.yaml").write_text(
        "train: {epochs: 3, lr: 0.1}\nteachers: [hog, sam]\nloss: {patches: {mse: 1}}\n"
    )
    (tmp_path / "one.yaml").write_text(
        "base: base.yaml\ntrain: {lr: 0.2}\nloss.patches: {cosine: 2}\nteachers: [hog]\n"
    )
    config = load_config(DistillJobConfig, tmp_path / "one.yaml", ["train.warmup_epochs=0"])
    assert (config.train.epochs, config.train.lr, config.train.warmup_epochs) == (3, 0.2, 0)
    assert (config.loss.patches, len(config.teachers)) == ({"cosine": 2}, 1)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("none.yaml", r"none\.yaml, the base of .*one\.yaml, does not exist"),
        ("one.yaml", r"one\.yaml is based on this recipe itself"),
    ],
)
def test_a_base_that_cannot_be_is_named(tmp_path, base, message):
    (tmp_path / "one.yaml").write_text(f"base: {base}\n")
    with pytest.raises(UserError, match=message):
        load_config(DistillJobConfig, tmp_path / "one.yaml")


def test_the_optional_phase_of_the_promptable_recipe_resolves(photos, tmp_path, job, quick_teachers):
    folder = tmp_path / "recipes"
    shutil.copytree(RECIPES[0].parent, folder)
    recipe = folder / "promptable.yaml"
    text, count = re.subn(r"(?m)^  # (- data:|  \S)", r"  \1", recipe.read_text())
    assert count == 8
    recipe.write_text(text)
    overrides = [f"phases.{n}.train.batch_size=8" for n in range(3)]
    overrides += [f"phases.{n}.data.train={photos}/part" for n in (1, 2)]
    overrides += [f"{key}={photos}/{part}" for key, part in DATA.items()]
    text, _ = job(distill.main, str(recipe), *overrides, f"work={tmp_path}", "--dry-run")
    assert text.count("8 prompts per image, 2 times each") == 1
    assert text.index("plan of phase 3 of 3") < text.index("8 prompts per image")
