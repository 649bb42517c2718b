"""The features of a frozen backbone through the cache are those that it gives directly."""

import dataclasses
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from pipeline.cache.read.scan import PatchReader, read_summaries, scan_images
from pipeline.errors import UserError
from pipeline.evaluate.config import EvaluateJobConfig
from pipeline.evaluate.frozen import FrozenTeacher, cached_encoder, map_levels
from pipeline.evaluate.job import compute_features, plan_frozen
from pipeline.evaluate.knn import embed, student_knn
from pipeline.evaluate.knn_search import Placement, search_knn
from pipeline.storage.store import Store
from pipeline.student.loading import load_student
from pipeline.student.model import save_encoder
from pipeline.training.worker import Worker
from teachers.base import TeacherError, TeacherOptions
from tests.fakes import without_ray

STUDENT = "timm/mobilenetv4_conv_small_035"
SETTINGS = [f"evaluate.student={STUDENT}", "evaluate.weights=random:3"]


@pytest.fixture
def computed(photo_config, monkeypatch):
    """A configuration and its plan, whose features are complete."""
    without_ray(monkeypatch)

    def compute(*overrides, grid=None):
        config = photo_config(*SETTINGS, *overrides, root=EvaluateJobConfig)
        return config, compute_features(plan_frozen(config, grid), config)

    return compute


def encoder_of(seed=3):
    return load_student(STUDENT, weights=f"random:{seed}").encoder


def test_vectors_in_the_cache_are_those_of_the_encoder(computed):
    # The training images of a distillation may be cached as crops; an evaluation takes them whole.
    config, plan = computed("views.crops=2")
    for dataset in (plan.train, plan.val):
        features, labels = read_summaries(dataset, plan.encoder)
        [expected], expected_labels = embed([encoder_of()], dataset, 32, 64)
        assert torch.allclose(features, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(labels, expected_labels)
    found = search_knn(plan.train, plan.val, plan.encoder, [5, 20], 0.07, Placement(0))
    assert [found[20]] == student_knn([encoder_of()], plan.train, plan.val, 32, config.knn)


@pytest.mark.parametrize("limit", [None, 64])
def test_ranks_embed_a_part_each_and_have_the_vectors_of_all(computed, monkeypatch, limit):
    _, plan = computed()
    encoders = [encoder_of(seed) for seed in (3, 4)]
    whole, labels = embed(encoders, plan.train, 32, 64, limit)
    met, said = threading.Barrier(2), []

    def meet(every, items):
        said.append(items)
        met.wait()
        every[:] = said

    monkeypatch.setattr("torch.distributed.all_gather_object", meet)
    with ThreadPoolExecutor() as ranks:
        (found, found_labels), (same, _) = ranks.map(
            lambda rank: embed(encoders, plan.train, 32, 64, limit, Worker(rank, 2)), range(2)
        )
    assert all(map(torch.equal, found, same))
    assert not torch.allclose(*whole)
    for vectors, expected in zip([*found, found_labels], [*whole, labels], strict=True):
        assert torch.allclose(
            torch.sort(vectors.double().flatten()).values, torch.sort(expected.double().flatten()).values
        )


@pytest.mark.usefixtures("ray_session")
def test_parts_of_the_bank_on_actors_find_what_one_process_finds(computed):
    _, plan = computed("cache.shard_size=40")
    assert len(plan.train.shards) == 4
    splits = plan.train, plan.val, plan.encoder, [1, 5, 20], 0.07
    assert search_knn(*splits, Placement(2)) == search_knn(*splits)


def test_maps_in_the_cache_are_those_of_the_encoder_at_a_grid(computed):
    _, plan = computed("evaluate.input_size=64", grid=8)
    groups, encoder = PatchReader(plan.val, plan.encoder), encoder_of()
    ids, patches = groups.read(0)
    batch = next(scan_images(plan.val, 64, 64))
    maps = encoder.maps(batch.images.float() / 255, map_levels(encoder.strides))
    assert ids == batch.keys
    assert groups.sizes == [40]
    assert patches.shape == (40, 8, 8, sum(part.shape[1] for part in maps))
    last = torch.nn.functional.interpolate(maps[-1], size=(8, 8), mode="bilinear").permute(0, 2, 3, 1)
    assert torch.allclose(patches[..., maps[0].shape[1] :], last, rtol=1e-2, atol=1e-3)


def test_features_are_computed_once_for_a_backbone_and_a_size(computed, monkeypatch):
    calls, forward = [], FrozenTeacher.forward
    monkeypatch.setattr(FrozenTeacher, "forward", lambda self, x: calls.append(len(x)) or forward(self, x))
    first = computed()[1]
    assert sum(calls) == 190
    assert computed()[1].encoder.id == first.encoder.id
    assert sum(calls) == 190


def test_an_encoder_is_known_by_its_weights_its_size_its_arguments_and_its_normalisation():
    def identity(size=32, weights="random:3", grid=None, **args):
        return cached_encoder(STUDENT, size, weights=weights, args=args, grid=grid).id

    ids = [identity(), identity(size=64), identity(weights="random:4"), identity(grid=0), identity(drop_rate=0.1)]
    assert len(set(ids)) == 5


def test_levels_that_are_put_side_by_side():
    assert map_levels([4, 8, 16, 32]) == [2, 3]
    assert map_levels([14, 14, 14]) == [2]
    assert map_levels([32]) == [0]


def test_a_size_that_the_backbone_does_not_take_is_named():
    with pytest.raises(TeacherError, match="timm/vit_tiny_patch16_224 does not take images of 100 px"):
        FrozenTeacher(TeacherOptions("", "random", 100, None, {"student": "timm/vit_tiny_patch16_224"}))


@pytest.fixture
def student_folder(tmp_path):
    """An exported student."""
    save_encoder(encoder_of(), STUDENT, {}, 32, tmp_path / "student")
    return tmp_path / "student"


@pytest.fixture
def logged(student_folder, tmp_path):
    """Store and URI of a student in MLflow."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri)
    experiment = client.create_experiment("tests", artifact_location=str(tmp_path / "artifacts"))
    run = client.create_run(experiment).info.run_id
    client.log_artifacts(run, str(student_folder), "student")
    return uri, f"models:/{client.create_logged_model(experiment, 'student', run).model_id}"


@pytest.fixture(params=["mlflow", "bucket"])
def remote_student(request, student_folder):
    """Overrides that name a student in MLflow or in an object store, and the words that no worker may be sent."""
    if request.param == "mlflow":
        uri, name = request.getfixturevalue("logged")
        return [f"evaluate.student={name}", f"tracking.uri={uri}"], [name, "models:", "sqlite:"]
    request.getfixturevalue("bucket")
    store = Store.at("s3://models/run/student")
    for file in student_folder.iterdir():
        store.put(file.name, file.read_bytes())
    return [f"evaluate.student={store.uri}"], ["s3:"]


def test_workers_get_a_folder_that_all_nodes_see_and_no_address(
    photo_config, remote_student, student_folder, tmp_path, monkeypatch
):
    overrides, forbidden = remote_student
    plan = plan_frozen(photo_config(*overrides, root=EvaluateJobConfig))
    sent = pickle.dumps(plan.encoder)
    assert not [word for word in forbidden if word.encode() in sent]
    assert tmp_path / "work" in Path(plan.encoder.config.args["student"]).parents
    for name in ("pipeline.tracking.models.MlflowClient", "pipeline.storage.store.Store.get"):
        monkeypatch.setattr(name, None)  # a worker reaches neither
    config = plan.encoder.config
    teacher = FrozenTeacher(TeacherOptions("", config.weights, config.input_size, None, config.args))
    assert teacher.spec == plan.encoder.spec
    assert (
        teacher.spec.weights
        == plan_frozen(photo_config(f"evaluate.student={student_folder}", root=EvaluateJobConfig)).encoder.spec.weights
    )


def test_images_without_labels_are_refused_before_anything_is_computed(photo_config, tmp_path):
    config = photo_config(*SETTINGS, f"data.val={tmp_path}/photos/val/class0", root=EvaluateJobConfig)
    with pytest.raises(UserError, match=r"data.val: .*class0 has no labels"):
        plan_frozen(config)
    assert dataclasses.is_dataclass(plan_frozen(config, grid=0))
    with pytest.raises(UserError, match=r"data\.val: an evaluation needs held-out images"):
        plan_frozen(photo_config(*SETTINGS, "data.val=null", root=EvaluateJobConfig))
