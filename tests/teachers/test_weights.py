"""Where weights come from, and what is refused: through the readers themselves and through whole teachers."""

import copy
import hashlib
import logging
import os
import pickle
import socket
import threading
import urllib.request
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import Mock

import pytest
import safetensors.torch
import torch
from huggingface_hub import constants, errors

from teachers.base import TeacherError, WeightsNotFoundError
from teachers.checkpoint import read_checkpoint
from teachers.fit import check_keys
from teachers.hub import HubFile, check_available, load_from_hub
from teachers.registry import create_teacher
from teachers.weights import parse_weights, seeded_init
from tests.teachers.plain import draw_pixels

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")

SMALL_VIT = {"embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 0}
SMALL = {
    "timm/vit_tiny_patch16_224": {"input_size": 32, "args": SMALL_VIT},
    "timm/resnet18": {"input_size": 32},
    "dinov2/vits14": {"input_size": 28, "args": {"embed_dim": 32, "depth": 1, "num_heads": 2}},
    "sam/vit_b": {"input_size": 32, "args": {"img_size": 32, "embed_dim": 32, "depth": 1, "num_heads": 2}},
    "clip/ViT-B-16": {"input_size": 32, "args": {"width": 32, "layers": 1, "head_width": 16}},
}


def small(weights, name="timm/vit_tiny_patch16_224"):
    return create_teacher(name, weights=str(weights), **SMALL[name])


@pytest.fixture
def tensors():
    """A small ViT in timm's layout."""
    teacher = small("random:5")
    teacher.load()
    return teacher.model.state_dict()


@pytest.fixture
def expected(tensors):
    """What that network says, by timm's own forward."""
    teacher = small("random:5")
    teacher.load()
    teacher.model.load_state_dict(tensors)
    return teacher.encode(draw_pixels(2, 32)).patches


def assert_loads(path, expected):
    teacher = small(path)
    teacher.load()
    assert torch.equal(teacher.encode(draw_pixels(2, 32)).patches, expected)
    assert len(teacher.weights_sha256) == 64


# Containers


def test_a_pytorch_file_loads(tmp_path, tensors, expected):
    torch.save(tensors, tmp_path / "file.pth")
    assert_loads(tmp_path / "file.pth", expected)


def test_a_pytorch_file_of_the_old_format_loads(tmp_path, tensors, expected):
    torch.save(tensors, tmp_path / "file.bin", _use_new_zipfile_serialization=False)
    assert_loads(tmp_path / "file.bin", expected)


def test_a_safetensors_file_loads(tmp_path, tensors, expected):
    safetensors.torch.save_file(tensors, tmp_path / "file.safetensors")
    assert_loads(tmp_path / "file.safetensors", expected)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tensors: {"model": tensors, "epoch": 3},
        lambda tensors: {"state_dict": tensors, "optimizer": {"lr": 0.1}},
        lambda tensors: {"teacher": tensors, "student": {}},
        lambda tensors: {"model": {"state_dict": tensors}},
        lambda tensors: {f"module.{key}": value for key, value in tensors.items()},
        lambda tensors: {"state_dict": {f"module.{key}": value for key, value in tensors.items()}},
    ],
    ids=["model", "state_dict", "teacher", "model and state_dict", "module.", "state_dict of module."],
)
def test_wrappers_of_training_are_taken_off(tmp_path, tensors, expected, wrap):
    torch.save(wrap(tensors), tmp_path / "file.pth")
    assert_loads(tmp_path / "file.pth", expected)


def test_a_prefix_that_not_every_key_has_is_kept(tmp_path):
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "file.pth")
    assert read_checkpoint(tmp_path / "file.pth", "test").keys() == {"module.a", "b"}


def test_plain_values_beside_the_tensors_are_left_out(tmp_path):
    torch.save({"a": torch.ones(1), "version": 3, "name": "x"}, tmp_path / "file.pth")
    assert read_checkpoint(tmp_path / "file.pth", "test").keys() == {"a"}


def test_half_precision_files_are_computed_in_float32(tmp_path, tensors, expected):
    torch.save({key: value.half() for key, value in tensors.items()}, tmp_path / "half.pth")
    teacher = small(tmp_path / "half.pth")
    teacher.load()
    assert all(value.dtype == torch.float32 for value in teacher.model.state_dict().values())
    torch.testing.assert_close(teacher.encode(draw_pixels(2, 32)).patches, expected, atol=1e-2, rtol=0)


# Strictness


def test_a_missing_key_is_named(tmp_path, tensors):
    del tensors["blocks.0.mlp.fc2.bias"]
    torch.save(tensors, tmp_path / "file.pth")
    with pytest.raises(
        TeacherError, match=r"timm/vit_tiny_patch16_224: weights: the file lacks blocks\.0\.mlp\.fc2\.bias"
    ):
        small(tmp_path / "file.pth").load()


def test_a_surplus_key_is_named(tmp_path, tensors):
    torch.save(tensors | {"head.weight": torch.ones(3, 32)}, tmp_path / "file.pth")
    with pytest.raises(TeacherError, match=r"the file has head\.weight, which this architecture does not have"):
        small(tmp_path / "file.pth").load()


def test_a_wrong_shape_is_named(tmp_path, tensors):
    tensors["norm.weight"] = torch.ones(1)  # would broadcast in silence
    torch.save(tensors, tmp_path / "file.pth")
    with pytest.raises(TeacherError, match=r"norm\.weight has shape \(1,\) in the file, \(32,\) in the architecture"):
        small(tmp_path / "file.pth").load()


def test_a_teacher_that_was_refused_its_file_says_nothing(tmp_path, tensors):
    del tensors["norm.bias"]
    torch.save(tensors, tmp_path / "file.pth")
    teacher = small(tmp_path / "file.pth")
    with pytest.raises(TeacherError):
        teacher.load()
    assert teacher.weights_sha256 == ""
    assert not hasattr(teacher, "model")


def test_only_the_prefixes_that_are_named_are_ignored():
    ones = torch.ones(1)
    assert check_keys({"a": ones, "text.b": ones}, {"a": ones}, "test", ("text.",)) == {"a": ones}
    with pytest.raises(TeacherError, match=r"has image\.b"):
        check_keys({"a": ones, "image.b": ones}, {"a": ones}, "test", ("text.",))


def test_many_keys_are_counted_not_listed():
    surplus = {f"key{number}": torch.ones(1) for number in range(8)}
    with pytest.raises(TeacherError, match=r"has key0, key1, key2, key3, key4 and 3 more keys, which"):
        check_keys(surplus, {}, "test")


# Archives


def deflate(path, pack, level=6):
    """Write an archive again, with the members that `pack` chooses deflated."""
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content, zipfile.ZIP_DEFLATED if pack(name) else zipfile.ZIP_STORED, level)


def test_an_archive_whose_code_is_deflated_and_that_unpacks_to_more_than_the_file_has_loads(tmp_path):
    # As OpenAI's: without alignment, what deflated code unpacks to is more than the archive's own overhead.
    module = torch.nn.Module()
    module.register_buffer("a", torch.ones(3))
    scripted = torch.jit.script(module)
    scripted.save(tmp_path / "script.pt", _extra_files={"notes.txt": " ".join(map(str, range(4000)))})
    deflate(tmp_path / "script.pt", lambda name: name.endswith((".py", ".txt", ".debug_pkl")))
    with zipfile.ZipFile(tmp_path / "script.pt") as archive:
        assert sum(member.file_size for member in archive.infolist()) > (tmp_path / "script.pt").stat().st_size
    assert read_checkpoint(tmp_path / "script.pt", "test").keys() == {"a"}


def test_a_member_that_unpacks_too_far_is_a_bomb(tmp_path):
    torch.save({"a": torch.zeros(1 << 18)}, tmp_path / "bomb.pth")
    deflate(tmp_path / "bomb.pth", lambda name: "/data/" in name)
    with pytest.raises(
        TeacherError, match=r"bomb\.pth is not .*data/0 unpacks from \d+ to 1048576 bytes; PyTorch stores"
    ):
        read_checkpoint(tmp_path / "bomb.pth", "test")


def test_deflated_members_are_bounded_together(tmp_path, monkeypatch):
    monkeypatch.setattr("teachers.checkpoint.DEFLATED_BYTES", 1 << 20)
    torch.save({str(i): torch.rand(1 << 17) for i in range(3)}, tmp_path / "many.pth")
    deflate(tmp_path / "many.pth", lambda name: "/data/" in name)
    with pytest.raises(TeacherError, match=r"its deflated members unpack to 15\d{5} bytes; code has less than 1 MiB"):
        read_checkpoint(tmp_path / "many.pth", "test")


def test_members_that_share_their_bytes_are_a_bomb(tmp_path):
    torch.save({"a": torch.rand(1 << 12)}, tmp_path / "shared.pth")
    with zipfile.ZipFile(tmp_path / "shared.pth", "a") as archive:
        tensor = next(member for member in archive.infolist() if "/data/" in member.filename)
        for number in range(3):
            twin = copy.copy(tensor)
            twin.filename = f"shared/data/{number + 1}"
            archive.filelist.append(twin)
            archive.NameToInfo[twin.filename] = twin
        archive._didModify = True
    with pytest.raises(
        TeacherError, match=r"shared\.pth is not .*its members take \d+ bytes, more than the \d+ of the file"
    ):
        read_checkpoint(tmp_path / "shared.pth", "test")


def test_a_member_packed_in_another_way_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "other.pth", "w") as archive:
        archive.writestr("other/data.pkl", b"x" * 10, zipfile.ZIP_BZIP2)
    with pytest.raises(TeacherError, match=r"other\.pth is not a readable checkpoint \(its member other/data\.pkl"):
        read_checkpoint(tmp_path / "other.pth", "test")


@pytest.mark.parametrize("name", ["file.pth", "file.safetensors"])
def test_a_plan_reads_names_and_shapes_alone(tmp_path, tensors, name):
    (safetensors.torch.save_file if name.endswith("safetensors") else torch.save)(tensors, tmp_path / name)
    read = read_checkpoint(tmp_path / name, "test", device="meta")
    assert all(value.is_meta for value in read.values())
    assert {key: value.shape for key, value in read.items()} == {key: value.shape for key, value in tensors.items()}
    small(tmp_path / name).check()


# Files that are no checkpoints


class Harmful:
    """Unpickled, it writes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, tensors, write):
    marker = tmp_path / "ran"
    write(tensors | {"extra": Harmful(marker)}, tmp_path / "harmful.pth")
    with pytest.raises(TeacherError, match=r"harmful\.pth is not a readable checkpoint"):
        small(tmp_path / "harmful.pth").load()
    assert not marker.exists()


@pytest.mark.parametrize("name", ["noise.pth", "noise.safetensors"])
@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", bytes(range(256)) * 8])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(
        TeacherError,
        match=f"{name} is not a readable checkpoint .*must be safetensors, a PyTorch file with tensors only",
    ):
        small(tmp_path / name).load()


@pytest.mark.parametrize("name", ["cut.pth", "cut.safetensors"])
def test_a_file_that_was_cut_off_is_named(tmp_path, tensors, name):
    whole = tmp_path / name
    (safetensors.torch.save_file if whole.suffix == ".safetensors" else torch.save)(tensors, whole)
    whole.write_bytes(whole.read_bytes()[:-1000])
    with pytest.raises(TeacherError, match=f"{name} is not a readable checkpoint"):
        small(whole).load()


@pytest.mark.parametrize(("value", "kind"), [([torch.ones(1)], "list"), (torch.ones(1), "Tensor"), (3, "int")])
def test_a_file_that_holds_something_else_says_what(tmp_path, value, kind):
    torch.save(value, tmp_path / "other.pth")
    with pytest.raises(TeacherError, match=rf"other\.pth contains a {kind}, not tensors by name"):
        small(tmp_path / "other.pth").load()


def test_a_file_that_is_not_there_names_path_and_remedies(tmp_path):
    with pytest.raises(WeightsNotFoundError, match="vit_tiny_patch16_224: weights: there is no file") as caught:
        small(tmp_path / "absent.pth")
    message = str(caught.value)
    assert str(tmp_path / "absent.pth") in message
    assert "`pretrained`" in message
    assert "`random`" in message
    assert "\n" not in message


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(WeightsNotFoundError, match="there is no file"):
        small(tmp_path)


# The field


def test_the_published_weights_are_known_by_their_tag():
    source = parse_weights("pretrained", "test", "lvd142m")
    assert (source.kind, source.identity) == ("hub", "hub:lvd142m")


def test_a_file_is_known_by_its_content(tmp_path, monkeypatch):
    path = tmp_path / "file.pth"
    path.write_bytes(b"one")
    source = parse_weights(str(path), "test", "")
    assert source.identity == f"file:{hashlib.sha256(b'one').hexdigest()}"
    (tmp_path / "copy.bin").write_bytes(b"one")
    assert parse_weights(str(tmp_path / "copy.bin"), "test", "").identity == source.identity
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse_weights("~/file.pth", "test", "") == source


def test_a_file_that_changes_is_another(tmp_path):
    path = tmp_path / "file.pth"
    path.write_bytes(b"one")
    before = parse_weights(str(path), "test", "").identity
    path.write_bytes(b"two")
    os.utime(path, ns=(1, 1))
    assert parse_weights(str(path), "test", "").identity == f"file:{hashlib.sha256(b'two').hexdigest()}" != before


@pytest.mark.parametrize("seed", ["", "x", "-1", "1.5", "1 2"])
def test_a_seed_is_a_whole_number(seed):
    if not seed:
        assert parse_weights("random:", "test", "").identity == "random:0"
        return
    with pytest.raises(TeacherError, match=f"the seed of random:{seed} must be a whole number"):
        parse_weights(f"random:{seed}", "test", "")


# Random weights


@pytest.mark.parametrize("name", SMALL)
def test_random_weights_are_reproducible_and_follow_the_seed(name):
    pixels = draw_pixels(1, SMALL[name]["input_size"])
    features, digests, identities = [], [], []
    for weights in ("random", "random:0", "random:1"):
        teacher = small(weights, name)
        torch.rand(3)  # the state that it was made in must not matter
        teacher.load()
        features.append(teacher.encode(pixels).patches)
        digests.append(teacher.weights_sha256)
        identities.append(teacher.spec.weights)
    assert torch.equal(features[0], features[1])
    assert not torch.equal(features[0], features[2])
    assert digests[0] == digests[1] != digests[2]
    assert identities == ["random:0", "random:0", "random:1"]


@pytest.mark.parametrize("name", SMALL)
def test_random_weights_leave_the_global_random_state_alone(name):
    before = torch.get_rng_state()
    small("random", name).load()
    assert torch.equal(torch.get_rng_state(), before)


def test_random_weights_leave_the_random_state_of_gpus_alone(monkeypatch):
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    with seeded_init(3, "test"):
        first = torch.rand(2)
    assert seeds == []
    assert torch.equal(first, torch.rand(2, generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("name", SMALL)
def test_random_weights_are_said_aloud(caplog, name):
    with caplog.at_level(logging.WARNING, logger="teachers"):
        small("random:7", name).load()
    said = [record.getMessage() for record in caplog.records if record.name == "teachers.weights"]
    assert len(said) == 1
    assert name in said[0]
    assert "random (seed 7)" in said[0]


def test_weights_of_a_file_are_not_called_random(tmp_path, tensors, caplog):
    torch.save(tensors, tmp_path / "file.pth")
    caplog.clear()
    small(tmp_path / "file.pth").load()
    assert "random" not in caplog.text


# The hub


FILE = HubFile("owner/model", ("model.safetensors",))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty local cache of the hub, and no network at all; the folder of the cache."""

    def refuse(*args, **kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


def keep(hub, repository, tensors):
    """Write a model into the local cache as the hub's client does."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = hub / f"models--{repository.replace('/', '--')}"
    for path, write in {
        folder / "refs" / "main": lambda path: path.write_text(commit),
        folder / "snapshots" / commit / "model.safetensors": lambda path: safetensors.torch.save_file(tensors, path),
    }.items():
        path.parent.mkdir(parents=True)
        write(path)


@pytest.mark.parametrize("find_out", ["check", "load"])
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("dinov2/vits14", "model.safetensors or pytorch_model.bin of {}/timm/vit_small_patch14_dinov2.lvd142m"),
        ("sam/vit_b", "model.safetensors or pytorch_model.bin of {}/timm/samvit_base_patch16.sa1b"),
        (
            "clip/ViT-B-32@openai",
            "open_clip_pytorch_model.safetensors or open_clip_pytorch_model.bin of {}/timm/vit_base_patch32_clip_224.openai",
        ),
        ("timm/mobilenetv2_100", "model.safetensors or pytorch_model.bin of {}/timm/mobilenetv2_100.ra_in1k"),
        ("timm/gcvit_xxtiny", "https://github.com/"),
    ],
)
def test_without_network_the_error_names_file_repository_and_flag(hub, name, file, find_out):
    teacher = create_teacher(name, input_size=SMALL.get(name, {}).get("input_size"))
    with pytest.raises(WeightsNotFoundError) as caught:
        getattr(teacher, find_out)()
    message = str(caught.value)
    assert file.format(constants.ENDPOINT) in message
    assert len(message) < 700
    assert message.startswith(f"teacher {name}: its pretrained weights are neither in the local hub cache ({hub})")
    assert "weights=<path of the file>" in message
    assert "weights=random" in message
    assert "\n" not in message
    assert constants.HF_HUB_OFFLINE is False


def test_weights_in_the_local_cache_load_without_network(hub, tmp_path):
    first = small("random:3", "dinov2/vits14")
    first.load()
    keep(hub, "timm/vit_small_patch14_dinov2.lvd142m", first.model.state_dict())
    second = create_teacher("dinov2/vits14", **SMALL["dinov2/vits14"])
    assert second.spec.weights == "hub:lvd142m"
    second.load()
    assert second.weights_sha256 == first.weights_sha256


def test_weights_in_the_local_cache_pass_the_plan_without_network(hub):
    keep(hub, "timm/vit_small_patch14_dinov2.lvd142m", {"a": torch.ones(1)})
    create_teacher("dinov2/vits14").check()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (False, "there is no such file or repository"),
        (True, None),
        (
            errors.GatedRepoError("401", response=Mock()),
            "request it on its page, then run `hf auth login`",
        ),
        (errors.HfHubHTTPError("500", response=Mock()), None),
    ],
    ids=["absent", "there", "restricted", "broken"],
)
def test_a_plan_asks_a_hub_that_answers(hub, monkeypatch, answer, message):
    def exists(*args, **kwargs):
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr("teachers.hub._answers", lambda address: True)
    monkeypatch.setattr("huggingface_hub.file_exists", exists)
    if message is None:
        check_available("test", FILE)
        return
    with pytest.raises(WeightsNotFoundError, match=message):
        check_available("test", FILE)


def test_a_plan_that_is_told_to_stay_offline_says_so(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        WeightsNotFoundError, match=r"HF_HUB_OFFLINE is set\): put model\.safetensors of .*/owner/model on"
    ):
        check_available("test", FILE)


def test_a_model_without_published_weights_says_so():
    with pytest.raises(TeacherError, match=r"timm publishes no weights of nf_seresnet26; set weights=<path of a file>"):
        create_teacher("timm/nf_seresnet26")
    assert create_teacher("timm/nf_seresnet26", weights="random").spec.grid == (7, 7)


def test_the_hub_is_asked_only_when_the_weights_are_loaded(hub):
    assert create_teacher("dinov2/vits14").spec.weights == "hub:lvd142m"
    assert not hub.exists()


@pytest.mark.parametrize(
    ("endpoint", "asked_for"),
    [
        (constants.ENDPOINT, (constants.ENDPOINT.removeprefix("https://"), 443)),
        ("http://mirror:8080", ("mirror", 8080)),
        ("http://mirror/hub", ("mirror", 80)),
    ],
)
def test_a_hub_that_answers_is_not_held_to_be_offline(monkeypatch, endpoint, asked_for):
    class Connection:
        def close(self):
            pass

    asked = []
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "create_connection", lambda address, timeout: asked.append(address) or Connection())
    assert load_from_hub("test", lambda: constants.HF_HUB_OFFLINE, FILE) is False
    assert asked == [asked_for]


def test_behind_a_proxy_the_client_decides(monkeypatch):
    monkeypatch.setattr(urllib.request, "getproxies", lambda: {"https": "http://proxy:3128"})
    monkeypatch.setattr(socket, "create_connection", lambda *args, **kwargs: pytest.fail("asked past the proxy"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert load_from_hub("test", lambda: constants.HF_HUB_OFFLINE, FILE) is False


def test_errors_of_the_teacher_itself_pass_through(hub):
    def fail():
        raise TeacherError("its own")

    with pytest.raises(TeacherError, match=r"^its own$"):
        load_from_hub("test", fail, FILE)


def test_paths_are_taken_as_paths(tmp_path, tensors):
    torch.save(tensors, tmp_path / "file.pth")
    assert read_checkpoint(Path(tmp_path / "file.pth"), "test").keys() == tensors.keys()
    assert read_checkpoint(str(tmp_path / "file.pth"), "test").keys() == tensors.keys()


def test_a_file_in_the_local_cache_tells_its_place_and_size(hub):
    assert FILE.cached() is None
    assert FILE.size() is None  # nobody answers
    keep(hub, "owner/model", {"a": torch.ones(3)})
    assert FILE.cached().name == "model.safetensors"
    assert FILE.size() == FILE.cached().stat().st_size > 12


def test_a_server_tells_the_size_of_a_file_that_is_not_here(tmp_path):
    (tmp_path / "weights-7c1a.pth").write_bytes(bytes(12345))
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert HubFile("", url=f"{address}/weights-7c1a.pth").size() == 12345
        assert HubFile("", url=f"{address}/missing-7c1a.pth").size() is None
        server.shutdown()
