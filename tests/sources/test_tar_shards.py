import io
import json
import tarfile
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.sources.left_out import notes_of
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


@pytest.mark.parametrize(
    ("member", "text"),
    [
        ("a.cls", b"cat"),
        ("a.label", b"3.5"),
        ("a.class.txt", b"1_000"),
        ("a.cls", b"\xff"),
        ("a.cls", b"1" * 30),
        ("a.json", b'{"label": "cat"}'),
        ("a.json", b'{"label": 0.5}'),
        ("a.json", b'{"label": [1]}'),
        ("a.json", b'{"label": Infinity}'),
        ("a.json", b"{"),
    ],
)
def test_a_bad_label_names_tar_and_member(tmp_path: Path, member: str, text: bytes) -> None:
    path = write_tar(tmp_path / "x.tar", {"a.jpg": encode(0), member: text})
    with pytest.raises(UserError, match=rf"x\.tar: .*'{member}'"):
        open_source(str(path), split="train").index()


def test_members_of_a_sample_may_be_anywhere(tmp_path: Path) -> None:
    members = {f"{n}.jpg": encode(n) for n in range(4)} | {f"{n}.cls": str(n % 2).encode() for n in (3, 0, 2, 1)}
    source = open_source(str(write_tar(tmp_path / "x.tar", members)), split="train")
    index = source.index()
    assert index["label"].to_pylist() == [0, 1, 0, 1]
    assert list(source.read(index)) == [encode(n) for n in range(4)]


def test_what_is_not_used_is_counted_and_named(tmp_path: Path) -> None:
    members = {
        "a.jpg": encode(0),
        "lonely.cls": b"1",
        "a.png": encode(1, "PNG"),
        "a.seg.png": encode(2, "PNG"),
        "b.jpg": encode(3),
        "b.json": b'{"class": "cat", "caption": "a cat"}',
        "readme.txt": b"x",
    }
    source = open_source(str(write_tar(tmp_path / "x.tar", members)), split="train")
    index = source.index()
    assert list(source.read(index)) == [encode(0), encode(3)]
    assert index["label"].to_pylist() == [None, None]
    assert notes_of(index) == [
        "1 labels without an image: x.tar/lonely",
        "1 images of samples that have another: .png 1",
        "JSON fields that hold no class number: class in 1 members",
        "2 members that are no images by their ending: .seg.png 1, .txt 1",
    ]


def test_a_member_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "x.tar", {"a.jpg": encode(0), "b.jpg": encode(1)})
    with tarfile.open(file, "a") as tar:
        again = tarfile.TarInfo("a.jpg")
        again.size = len(encode(9))
        tar.addfile(again, io.BytesIO(encode(9)))
    with pytest.raises(UserError, match=r"x\.tar: member 'a\.jpg' occurs twice"):
        open_source(str(file), split="train").index()


def test_members_that_differ_only_in_case_are_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {"a.jpg": encode(0), "a.JPG": encode(1)})
    with pytest.raises(UserError, match=r"members 'a\.jpg' and 'a\.JPG' differ only in upper and lower case"):
        open_source(str(path), split="train").index()


def test_what_systems_add_to_a_tar_is_ignored_at_any_depth(tmp_path: Path) -> None:
    names = ("__MACOSX/a.jpg", "x/@eaDir/a.jpg", ".cache/a.jpg", "x/._a.jpg", "lost+found/a.cls", "x/Thumbs.db")
    members = {"./x/a.jpg": encode(0), **{name: encode(1) for name in names}}
    index = open_source(str(write_tar(tmp_path / "x.tar", members)), split="train").index()
    assert index["sample_id"].to_pylist() == ["x.tar/x/a"]
    assert notes_of(index) == []


@pytest.mark.parametrize(
    ("member", "text", "label"),
    [
        ("a.cls", "3\n", 3),
        ("a.cls", "3.0", 3),
        ("a.cls", "", None),
        ("a.cls.txt", "3", 3),
        ("a.CLASS", "3", 3),
        ("a.label.txt", " 3 ", 3),
        ("a.target", "3", 3),
        ("a.json", '{"label": "3"}', 3),
        ("a.json", '{"label": 3.0}', 3),
        ("a.json", '{"label": true}', 1),
        ("a.json", '{"label": null, "class_id": 3}', 3),
        ("a.json", '{"caption": "x", "category_id": "3"}', 3),
        ("a.json", '{"class": "cat", "target": 3}', 3),
        ("a.json", '{"label": NaN}', None),
        ("a.json", '["a", "list"]', None),
        ("a.cls.json", "3", 3),
        ("a.cls", "-1", None),
    ],
)
def test_labels_as_people_write_them(tmp_path: Path, member: str, text: str, label: int | None) -> None:
    path = write_tar(tmp_path / "x.tar", {member: text.encode(), "a.jpg": encode(0)})
    assert open_source(str(path), split="train").index()["label"].to_pylist() == [label]


def test_a_shard_that_vanished_or_shrank_fails_only_its_own_rows(shards: Path) -> None:
    source = open_source(str(shards), split="train")
    index = source.index()
    (shards / "train-000.tar").unlink()
    last = shards / "train-002.tar"
    last.write_bytes(last.read_bytes()[: index["offset"][11].as_py() + 10])
    results = list(source.read(index))
    assert [isinstance(result, OSError) for result in results] == [True] * 4 + [False] * 7 + [True]
    assert "train-002.tar: ends after 10 of" in str(results[11])
