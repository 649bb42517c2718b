import io
import json
import tarfile
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.sources.open import open_source
from pipeline.sources.tar_shards import TarShards
from tests.sources.noise_images import encode


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for shard in range(3):
        members = {}
        for number in range(shard * 4, shard * 4 + 4):
            members[f"{number:05d}.jpg"] = encode(number)
            members[f"{number:05d}.cls"] = f"{number % 3}\n".encode()
        write_tar(tmp_path / f"train-{shard:03d}.tar", members)
    return tmp_path


def test_samples_are_indexed_with_their_bytes_in_the_tar(shards: Path) -> None:
    source = open_source(str(shards), split="train")
    assert isinstance(source, TarShards)
    index = source.index()
    assert index["sample_id"].to_pylist()[:2] == ["train-000.tar/00000", "train-000.tar/00001"]
    assert index["label"].to_pylist() == [number % 3 for number in range(12)]
    assert list(source.read(index)) == [encode(number) for number in range(12)]
    assert list(source.read(index.take([11, 0, 5]))) == [encode(11), encode(0), encode(5)]


def test_brace_and_glob_patterns_name_shards(shards: Path) -> None:
    def count(pattern: str) -> int:
        return open_source(str(shards / pattern), split="train").index().num_rows

    assert count("train-{000..001}.tar") == 8
    assert count("train-{000,002}.tar") == 8
    assert count("train-*.tar") == 12
    assert count("train-002.tar") == 4
    assert open_source(str(shards / "train-{000..001}.tar"), split="train").name == f"{shards.name}-train-000-001"
    with pytest.raises(UserError, match=r"train-003\.tar: no such file"):
        count("train-{000..003}.tar")


def test_json_labels_other_members_and_extensions_in_any_case(tmp_path: Path) -> None:
    members = {
        "./deep/a.json": json.dumps({"label": 7}).encode(),
        "./deep/a.JPEG": encode(0),
        "./deep/a.seg.png": encode(1, "PNG"),
        "./deep/b.png": encode(2, "PNG"),
        "./deep/c.txt": b"no image here",
        "./deep/._d.jpg": b"a hidden file of macOS",
    }
    source = open_source(str(write_tar(tmp_path / "x.tar", members)), split="train")
    index = source.index()
    assert index["sample_id"].to_pylist() == ["x.tar/deep/a", "x.tar/deep/b"]
    assert index["label"].to_pylist() == [7, None]
    assert list(source.read(index)) == [encode(0), encode(2, "PNG")]


def test_an_image_that_would_be_lost_for_a_dot_in_its_name_is_named(tmp_path: Path) -> None:
    members = {"a.jpg": encode(0), "Screenshot at 10.15.23.jpg": encode(1)}
    source = open_source(str(write_tar(tmp_path / "x.tar", members)), split="train")
    with pytest.raises(UserError, match=r"x\.tar: member 'Screenshot at 10\.15\.23\.jpg' is not an image"):
        source.index()


def test_a_member_whose_name_is_not_utf8_is_named(tmp_path: Path) -> None:
    file = tmp_path / "x.tar"
    with tarfile.open(file, "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as tar:
        member = tarfile.TarInfo("caf\xe9/a.jpg")
        member.size = len(encode(0))
        tar.addfile(member, io.BytesIO(encode(0)))
    with pytest.raises(
        UserError, match=r"x\.tar: the name of member b'caf\\xe9/a.jpg' is not valid UTF-8; correct or remove"
    ):
        open_source(str(file), split="train").index()


def test_a_truncated_tar_is_named_wherever_it_is_cut(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", {f"{n}.jpg": encode(n) for n in range(3)})
    data = whole.read_bytes()
    with tarfile.open(whole) as tar:
        offsets = [member.offset for member in tar] + [tar.offset]
    for cut in (0, 100, offsets[1], offsets[1] + 100, offsets[1] + 600, offsets[3]):
        damaged = tmp_path / "cut.tar"
        damaged.write_bytes(data[:cut])
        with pytest.raises(UserError, match=r"cut\.tar: truncated"):
            open_source(str(damaged), split="train").index()


def test_a_damaged_header_does_not_end_the_archive_early(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {f"{n}.jpg": encode(n) for n in range(3)})
    with tarfile.open(path) as tar:
        second = tar.getmembers()[1].offset
    data = bytearray(path.read_bytes())
    data[second : second + 8] = b"\xff" * 8
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"x\.tar: truncated"):
        open_source(str(path), split="train").index()


def test_a_compressed_tar_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="compressed"):
        open_source(str(write_tar(tmp_path / "x.tar", {"a.jpg": encode(0)}, "w:gz")), split="train").index()


@pytest.mark.parametrize(("member", "text"), [("a.cls", b"cat"), ("a.json", b'{"label": "cat"}'), ("a.json", b"{")])
def test_a_bad_label_names_tar_and_member(tmp_path: Path, member: str, text: bytes) -> None:
    path = write_tar(tmp_path / "x.tar", {"a.jpg": encode(0), member: text})
    with pytest.raises(UserError, match=rf"x\.tar: .*'{member}'"):
        open_source(str(path), split="train").index()


def test_one_key_in_two_places_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {"a.jpg": encode(0), "b.jpg": encode(1), "a.png": encode(2, "PNG")})
    with pytest.raises(UserError, match=r"'x\.tar/a' occurs more than once"):
        open_source(str(path), split="train").index()


def test_a_shard_that_vanished_or_shrank_fails_only_its_own_rows(shards: Path) -> None:
    source = open_source(str(shards), split="train")
    index = source.index()
    (shards / "train-000.tar").unlink()
    last = shards / "train-002.tar"
    last.write_bytes(last.read_bytes()[: index["offset"][11].as_py() + 10])
    results = list(source.read(index))
    assert [isinstance(result, OSError) for result in results] == [True] * 4 + [False] * 7 + [True]
    assert "train-002.tar: ends after 10 of" in str(results[11])
