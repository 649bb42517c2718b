import numpy as np
import pytest

from pipeline.cache.fill.plan import plan_cache
from pipeline.cache.fill.second_moments import _summed, freeze_phi_s
from pipeline.cache.layout.cached_teacher import load_codecs
from pipeline.cache.layout.phi_s import load_phi_s
from pipeline.cache.layout.stats import merge_all
from pipeline.cache.maintain.values import decode
from pipeline.errors import UserError
from pipeline.storage.store import Store
from tests.fakes import fill_in_process


def made(tmp_path, photo_config, codec):
    teachers = "teachers=[{model: 'tests.fakes:colours', args: {dim: 24}}]"
    plan, _ = fill_in_process(plan_cache(photo_config(f"cache.codec={codec}", teachers), Store.at(tmp_path / "cache")))
    return plan.split("train").dataset, plan.teachers[0]


@pytest.mark.parametrize("codec", ["float32", "int8", "pca-int8-zstd", "pca3-float16"])
@pytest.mark.parametrize("batch", [1, 16])
def test_the_rotation_equalises_the_variances_of_the_stored_features(tmp_path, photo_config, monkeypatch, codec, batch):
    """Against the covariance of all decoded features at once, in float64."""
    monkeypatch.setattr("pipeline.cache.fill.second_moments.BATCH", batch)
    dataset, teacher = made(tmp_path, photo_config, codec)
    folder, store = dataset.parts[0].teacher(teacher.id), dataset.statistics(teacher.id)
    assert not store.exists("phi_s.npz")
    freeze_phi_s(dataset, teacher)
    rotations, codecs = load_phi_s(store.get("phi_s.npz")), load_codecs(dataset.cache, teacher)
    tables = [folder.read(record) for record in folder.records().values()]
    for kind, feature_codec in codecs.items():
        parts = [decode(table[kind], feature_codec).flatten(0, -2).double().numpy() for table in tables]
        features = np.concatenate(parts)
        covariance = np.cov(features.T, bias=True)
        phi = rotations[kind]
        np.testing.assert_allclose(phi.mean, features.mean(axis=0), atol=1e-4)
        assert phi.scale == pytest.approx(np.sqrt(np.trace(covariance) / 24), rel=1e-4)
        rotated = phi.rotation @ covariance @ phi.rotation.T / phi.scale**2
        np.testing.assert_allclose(np.diagonal(rotated), np.ones(24), rtol=1e-2)


def test_it_is_computed_once_and_from_complete_features(tmp_path, photo_config):
    dataset, teacher = made(tmp_path, photo_config, "int8")
    folder, store = dataset.parts[0].teacher(teacher.id), dataset.statistics(teacher.id)
    freeze_phi_s(dataset, teacher)
    first = store.get("phi_s.npz")
    store.put("phi_s.npz", first + b" ")
    freeze_phi_s(dataset, teacher)
    assert store.get("phi_s.npz") == first + b" "
    store.delete("phi_s.npz")
    folder.store.delete(folder.records()[0].file)
    with pytest.raises(UserError, match="shard-00000"):
        freeze_phi_s(dataset, teacher)
    dataset.parts[0].refresh()
    with pytest.raises(UserError, match="lacks shards"):
        freeze_phi_s(dataset, teacher)
    assert not store.exists("phi_s.npz")


@pytest.mark.usefixtures("ray_session")
def test_shards_are_summed_on_ray_to_the_same_moments_and_rotation(tmp_path, photo_config, monkeypatch):
    dataset, teacher = made(tmp_path, photo_config, "int8")
    store, rotations = dataset.statistics(teacher.id), {}
    for batch in (16, 1):  # one batch is summed in this process
        monkeypatch.setattr("pipeline.cache.fill.second_moments.BATCH", batch)
        freeze_phi_s(dataset, teacher)
        rotations[batch] = load_phi_s(store.get("phi_s.npz"))
        store.delete("phi_s.npz")
    (part,) = dataset.parts
    folder = part.teacher(teacher.id)
    codecs, records = load_codecs(dataset.cache, teacher), [*folder.records().values()]
    merged = merge_all(_summed(dataset, teacher, [[(0, record)] for record in records]))
    for kind, codec in codecs.items():
        tables = [decode(folder.read(record)[kind], codec) for record in records]
        features = np.concatenate([table.flatten(0, -2).double().numpy() for table in tables])
        deviations = features - features.mean(axis=0)
        assert merged[kind].count == len(features)
        np.testing.assert_allclose(merged[kind].mean, features.mean(axis=0), rtol=1e-9)
        np.testing.assert_allclose(merged[kind].scatter, deviations.T @ deviations, rtol=1e-7, atol=1e-7)
        for phi in (rotations[16][kind], rotations[1][kind]):
            assert phi.scale == pytest.approx(np.sqrt(features.var(axis=0).mean()), rel=1e-9)
            rotated = deviations @ phi.rotation.T.astype(float) / phi.scale
            np.testing.assert_allclose(rotated.std(axis=0), np.ones(24), rtol=1e-3)
