"""The stop file and SIGTERM."""

import os
import signal
import sys
import threading
from contextvars import ContextVar

import pytest

from pipeline.storage.store import Store
from pipeline.training.stopping import call_in_thread, on_sigterm


def test_the_first_sigterm_writes_the_stop_file_and_the_second_ends_the_process(tmp_path, capsys):
    before, store = signal.getsignal(signal.SIGTERM), Store.at(tmp_path)
    store.delete("stop")
    with on_sigterm(lambda: store.put("stop", b"")):
        assert not store.exists("stop")
        os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == before
    assert store.exists("stop")
    assert "saving a checkpoint" in capsys.readouterr().out
    store.delete("stop")
    assert not (tmp_path / "stop").exists()


def test_a_call_in_a_thread_returns_raises_and_sees_the_callers_context():
    seen = ContextVar("seen")
    seen.set("here")
    assert call_in_thread(lambda: (seen.get(), threading.current_thread() is threading.main_thread())) == (
        "here",
        False,
    )
    with pytest.raises(KeyError, match="inside"):
        call_in_thread(lambda: {}["inside"])
    with pytest.raises(SystemExit):
        call_in_thread(lambda: sys.exit(3))


@pytest.fixture
def default_sigint():
    """xdist's workers ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_sigint")
def test_ctrl_c_ends_the_wait_at_once():
    release = threading.Event()

    def interrupted():
        os.kill(os.getpid(), signal.SIGINT)
        release.wait(60)

    with pytest.raises(KeyboardInterrupt):
        call_in_thread(interrupted)
    assert not release.is_set()
    release.set()
