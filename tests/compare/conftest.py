from itertools import count
from types import SimpleNamespace

import pytest

from pipeline.compare.comparison import Comparison
from pipeline.tracking.reading import read_experiment
from tests.compare.experiments import HOSTILE, STUDENTS, TEACHERS, Store


@pytest.fixture(scope="session")
def stores(tmp_path_factory):
    """Experiments of one store, each for one test: making a store takes seconds."""
    folder, numbers = tmp_path_factory.mktemp("stores"), count()
    return lambda: Store(folder, f"experiment-{next(numbers)}")


@pytest.fixture
def store(stores):
    return stores()


@pytest.fixture
def read(store):
    """The experiment as it is now."""
    return lambda filter_string="": read_experiment(store.uri, store.experiment, filter_string)


@pytest.fixture(scope="session")
def proof(stores):
    """Two students times three teacher sets times two seeds, with evaluations, a benchmark, and what does not count."""
    store, trained = stores(), {}
    for student, (*_, more) in STUDENTS.items():
        for teacher, (size, gain) in TEACHERS.items():
            for seed in range(2):
                knn = 20 + more + gain + (0.3, -0.2)[seed] + 0.02 * seed * len(teacher)
                hostile = (student, teacher, seed) == ("regla_t", "hog", 0)
                name = HOSTILE if hostile else f"{student}-{teacher[:3]}-{seed}"
                teachers = list(dict.fromkeys(["hog", teacher]))
                run = store.distil(student, teachers, seed, knn, name=name, cache_bytes=size)
                trained[student, teacher, seed] = run.run_id
                if seed == 0:
                    store.judge("linear", run.run_id, {"top1": knn + 5, "top5": 60.0})
    store.distil("regla_s", ["hog"], 2, 99.0, name="broken", status="FAILED")
    store.benchmark({"regla_t/fused/float32/1x64/ms": 3.2, "regla_s/fused/float32/1x64/ms": 5.1})
    return SimpleNamespace(store=store, uri=store.uri, experiment=store.experiment, trained=trained)


@pytest.fixture(scope="session")
def comparison(proof):
    return Comparison.of(read_experiment(proof.uri, proof.experiment))
