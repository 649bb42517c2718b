import pytest

from pipeline.storage.atomic import atomic_write


def test_a_file_appears_when_its_writer_has_finished(tmp_path):
    path = tmp_path / "new/folder/file"
    with atomic_write(path) as file:
        file.write(b"all of it")
        assert not path.exists()
    assert path.read_bytes() == b"all of it"
    assert list(path.parent.iterdir()) == [path]


def _fail(path):
    with atomic_write(path) as file:
        file.write(b"half of the n")
        raise ZeroDivisionError


def test_a_writer_that_fails_leaves_what_was_there_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError):
        _fail(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
