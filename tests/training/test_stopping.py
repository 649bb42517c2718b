"""The stop file and SIGTERM."""

import os
import signal

from pyarrow import fs

from pipeline.training.stopping import SharedFile, on_sigterm


def test_the_first_sigterm_writes_the_stop_file_and_the_second_ends_the_process(tmp_path, capsys):
    before, stop = signal.getsignal(signal.SIGTERM), SharedFile(fs.LocalFileSystem(), str(tmp_path / "stop"))
    stop.remove()
    with on_sigterm(stop.write):
        assert not stop.exists()
        os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == before
    assert stop.exists()
    assert "saving a checkpoint" in capsys.readouterr().out
    stop.remove()
    assert not (tmp_path / "stop").exists()
