"""Published weights: whether they can be had, and loading them from the hub or its local cache."""

import socket
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import huggingface_hub
import torch
from huggingface_hub import constants, errors

from teachers.base import TeacherError, WeightsNotFoundError
from teachers.errors import one_line

LONGEST_REASON = 1000
"""Characters of a library's error that are shown; none of the known ones is that long."""

T = TypeVar("T")


@dataclass(frozen=True)
class HubFile:
    """A file of published weights.

    Attributes:
        repository: on the hub, `<owner>/<name>[@<revision>]`; "" for an address.
        names: file names in the repository; the first that exists is loaded.
        url: the address of a file elsewhere.
    """

    repository: str
    names: tuple[str, ...] = ()
    url: str = ""

    @classmethod
    def of_timm(cls, published: Mapping[str, Any]) -> "HubFile | None":
        """Where timm finds the weights of a pretrained configuration; None if there are none."""
        if repository := published.get("hf_hub_id"):
            name = published.get("hf_hub_filename")
            return cls(repository, (name,) if name else ("model.safetensors", "pytorch_model.bin"))
        return cls("", url=published["url"]) if published.get("url") else None

    @classmethod
    def of_open_clip(cls, published: Mapping[str, Any]) -> "HubFile | None":
        """Where open_clip finds the weights of a tag; None if there are none."""
        if not published.get("hf_hub"):
            return cls("", url=published["url"]) if published.get("url") else None
        repository, _, name = published["hf_hub"].rpartition("/")
        name = name or "open_clip_pytorch_model.bin"
        return cls(repository, (str(Path(name).with_suffix(".safetensors")), name))

    def __str__(self) -> str:
        return f"{' or '.join(self.names)} of {constants.ENDPOINT}/{self.repository}" if self.repository else self.url

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that serve the file."""
        parts = urlsplit(constants.ENDPOINT if self.repository else self.url)
        return parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)

    def cached(self) -> Path | None:
        """The file on this machine, or None."""
        if not self.repository:
            path = Path(torch.hub.get_dir(), "checkpoints", Path(urlsplit(self.url).path).name)
            return path if path.is_file() else None
        repository, _, revision = self.repository.partition("@")
        found = (
            huggingface_hub.try_to_load_from_cache(repository, name, constants.HF_HUB_CACHE, revision or None)
            for name in self.names
        )
        return next((Path(path) for path in found if isinstance(path, str)), None)

    def size(self) -> int | None:
        """Bytes of the file, here or as its server tells; None if it does not."""
        if path := self.cached():
            return path.stat().st_size
        if constants.HF_HUB_OFFLINE or not _answers(self.address):
            return None
        repository, _, revision = self.repository.partition("@")
        for name in self.names or ("",):
            url = huggingface_hub.hf_hub_url(repository, name, revision=revision or None) if repository else self.url
            try:
                return huggingface_hub.get_hf_file_metadata(url).size
            except (errors.HfHubHTTPError, OSError):
                continue
        return None

    def fetch(self) -> str:
        """Path of the file of a repository in the local cache, after downloading it if need be; raises the client's errors."""
        repository, _, revision = self.repository.partition("@")
        for name in self.names[:-1]:
            try:
                return huggingface_hub.hf_hub_download(repository, name, revision=revision or None)
            except errors.EntryNotFoundError:
                continue
        return huggingface_hub.hf_hub_download(repository, self.names[-1], revision=revision or None)

    def exists(self) -> bool:
        """Ask the hub; raises its client's errors."""
        repository, _, revision = self.repository.partition("@")
        return any(huggingface_hub.file_exists(repository, name, revision=revision or None) for name in self.names)


def check_available(teacher: str, file: HubFile) -> None:
    """Raise a WeightsNotFoundError for published weights that are not on this machine and cannot be downloaded.

    What only the download can tell is left to it.
    """
    if file.cached():
        return
    if constants.HF_HUB_OFFLINE or not _answers(file.address):
        raise _not_found(teacher, file, _no_connection(file))
    try:
        if file.repository and not file.exists():
            raise _not_found(teacher, file, "there is no such file or repository")
    except errors.GatedRepoError as error:
        raise _not_found(teacher, file, _reason(error, file)) from error
    except (errors.HfHubHTTPError, OSError):
        return


def load_from_hub(teacher: str, fetch: Callable[[], T], file: HubFile | None) -> T:
    """Call `fetch`, which finds weights in the hub's local cache or downloads them.

    Raises:
        WeightsNotFoundError: for any failure, naming the file; if none is published (`file` is None).
    """
    if file is None:
        raise WeightsNotFoundError(
            f"teacher {teacher}: no weights of it are published; set weights=<path of a file>, or weights=random for an "
            "untrained network"
        )
    try:
        with _offline_if_unreachable(file):
            return fetch()
    except TeacherError:
        raise
    except Exception as error:
        raise _not_found(teacher, file, _reason(error, file)) from error


def _not_found(teacher: str, file: HubFile, reason: str) -> WeightsNotFoundError:
    return WeightsNotFoundError(
        f"teacher {teacher}: its pretrained weights are neither in the local hub cache ({constants.HF_HUB_CACHE}) nor can "
        f"they be downloaded ({reason}): put {file} on this machine and set weights=<path of the file>, or "
        "weights=random for an untrained network"
    )


def _no_connection(file: HubFile) -> str:
    return "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"no connection to {file.address[0]}"


def _reason(error: BaseException, file: HubFile) -> str:
    """Why a download failed, in few words; libraries wrap the hub's own error."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, errors.GatedRepoError):
            return f"access to {file.repository} is restricted: request it on its page, then run `hf auth login`"
        if isinstance(cause, errors.LocalEntryNotFoundError):
            return _no_connection(file)
        if isinstance(cause, errors.EntryNotFoundError | errors.RepositoryNotFoundError):
            return "there is no such file or repository"
        cause = cause.__cause__ or cause.__context__
    return one_line(f"{type(error).__name__}: {error}", LONGEST_REASON)


def _answers(address: tuple[str, int]) -> bool:
    """Whether a connection opens; behind a proxy, the client finds out."""
    if urllib.request.getproxies():
        return True
    try:
        socket.create_connection(address, timeout=3).close()
    except OSError:
        return False
    return True


@contextmanager
def _offline_if_unreachable(file: HubFile) -> Iterator[None]:
    """Use only the local cache if the hub does not answer: its client would retry for most of a minute."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _answers(file.address)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
