import time
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.sources.open import open_source
from tests.sources.noise_images import encode


@pytest.mark.parametrize("location", ["nowhere", "nowhere.tar", "nowhere/*.parquet", "x-{0..3}.tar"])
def test_a_missing_path_is_named(tmp_path: Path, location: str) -> None:
    with pytest.raises(UserError, match=rf"{tmp_path}/(nowhere|x-0\.tar).*: no such file or folder"):
        open_source(str(tmp_path / location), split="train")


def test_a_uri_with_credentials_is_refused() -> None:
    with pytest.raises(UserError, match=r"credentials in an address are refused") as raised:
        open_source("s3://key:secret@bucket/train", split="train")
    assert "secret" not in str(raised.value)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(UserError, match=r"matches \.zip; give"):
        open_source(str(tmp_path / "a.zip"), split="train")


@pytest.mark.parametrize("other", ["b.parquet", "photo.jpg", "class/photo.jpg"])
def test_a_folder_of_mixed_kinds_is_refused(tmp_path: Path, other: str) -> None:
    (tmp_path / "a.tar").write_bytes(b"")
    (tmp_path / other).parent.mkdir(exist_ok=True)
    (tmp_path / other).write_bytes(b"")
    with pytest.raises(UserError, match=r"and other data; name the files you mean, such as .*/\*\.tar"):
        open_source(str(tmp_path), split="train")


def test_a_large_folder_is_indexed_fast(tmp_path: Path) -> None:
    for label in range(20):
        folder = tmp_path / f"class{label:02d}"
        folder.mkdir()
        for number in range(500):
            (folder / f"{number}.jpg").touch()
    (tmp_path / "class00" / "0.jpg").write_bytes(encode(0))
    start = time.process_time()
    assert open_source(str(tmp_path), split="train").index().num_rows == 10_000
    assert time.process_time() - start < 2
