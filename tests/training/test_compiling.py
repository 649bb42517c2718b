"""Where torch.compile is used, and that training under it resumes and accumulates as without it."""

import logging

import pytest
import torch
from torch._inductor import config as inductor_config

from pipeline.errors import UserError
from pipeline.training import compiling
from pipeline.training.compiling import MIN_STEPS, is_compiled, missing_for
from pipeline.training.worker import Worker
from tests.training.engine import PLAIN, PLAIN_STEP, assert_equal_states, losses_of, run_training, train_config
from tests.training.tiny_task import TinyTask

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Fixed(TinyTask):
    compiles_by_default = True


@pytest.fixture
def inductor(tmp_path, monkeypatch):
    """Its own cache of compiled code."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))


@pytest.fixture(autouse=True)
def _compile_anew():
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("task", "chosen", "worker", "steps", "expected"),
    [
        (Fixed, None, Worker(device=CUDA), MIN_STEPS, True),
        (Fixed, None, Worker(device=CUDA), MIN_STEPS - 1, False),
        (Fixed, None, Worker(device=CPU), MIN_STEPS, False),
        (Fixed, None, Worker(0, 2, CUDA), MIN_STEPS, False),
        (Fixed, False, Worker(device=CUDA), MIN_STEPS, False),
        (TinyTask, None, Worker(device=CUDA), MIN_STEPS, False),
        (TinyTask, True, Worker(device=CUDA), 1, True),
        (TinyTask, True, Worker(0, 2, CPU), 1, True),
    ],
)
def test_long_runs_of_fixed_steps_on_one_gpu_are_compiled_unless_the_recipe_decides(
    task, chosen, worker, steps, expected, monkeypatch
):
    monkeypatch.setattr(compiling, "missing_for", lambda device: "")
    assert is_compiled(task(), train_config(compile=chosen), worker, steps) is expected


def test_without_a_compiler_only_a_run_that_demands_it_is_refused(caplog):
    assert missing_for(CPU) == ""
    with inductor_config.patch({"cpp.cxx": ("no-such-compiler",)}):
        with pytest.raises(
            UserError, match=r"^train.compile=true: this machine has no C\+\+ compiler \(g\+\+\); install"
        ):
            run_training(TinyTask(), train_config(compile=True))
        with caplog.at_level(logging.WARNING):
            assert not is_compiled(Fixed(), train_config(), Worker(device=CUDA), MIN_STEPS)
    assert "the training is not compiled, and slower: this machine has no C++ compiler" in caplog.text


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("inductor")
def test_an_interrupted_compiled_run_ends_as_one_that_was_not(backend):
    config = train_config(checkpoint_steps=4, micro_batch=3, compile=True)
    whole = run_training(TinyTask(backend=backend), config)
    torch.compiler.reset()
    rest = run_training(TinyTask(backend=backend), config, whole[3].state)
    assert_equal_states(rest[-1].state, whole[-1].state)
    both = losses_of(whole[:4]) + losses_of(rest)
    assert [metrics["loss"] for _, metrics in both] == [metrics["loss"] for _, metrics in losses_of(whole)]


@pytest.mark.parametrize("micro", [None, 1, 3])
def test_compiled_micro_batches_train_as_whole_batches_that_are_not_compiled(micro):
    plain = run_training(TinyTask(**PLAIN), train_config(**PLAIN_STEP))
    config = train_config(**PLAIN_STEP, micro_batch=micro, compile=True)
    compiled = run_training(TinyTask(**PLAIN, backend="aot_eager"), config)
    for part in ("model", "ema"):
        torch.testing.assert_close(compiled[-1].state[part], plain[-1].state[part], rtol=1e-5, atol=1e-6)
