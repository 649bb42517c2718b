"""Locations as users write them: folders, files, glob and brace patterns."""

import fnmatch
import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from pipeline.errors import UserError
from pipeline.sources.left_out import is_system
from pipeline.storage.files import NO_LISTING, THREADS, exists, list_folder
from pipeline.storage.remote import is_uri, is_web
from pipeline.storage.store import Store

SAMPLES = "samples"
"""Location of the generated sample scenes; a folder of that name is `./samples`."""

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_SPLIT = re.compile(r"(?:^|[-_.])(train|val|test)(?:ing|id|idation)?\d*(?=$|[-_.])", re.IGNORECASE)
"""A split's name within the name of a file, such as `train-00001-of-00003`."""
_SPLIT_FOLDER = re.compile(r"(train|val|test)(?:ing|id|idation)?[-_]?\d*", re.IGNORECASE)


def absolute(location: str) -> str:
    """Absolute path of a location, valid in workers with another working folder; a URI as it is.

    Raises:
        UserError: if a URI contains credentials or options.
    """
    return Store.at(location).uri if is_uri(location) else os.path.abspath(os.path.expanduser(location))


def below(folder: str, name: str) -> str:
    """Path of a file that an annotation names, within its folder. Links in the folder are the user's own and are followed.

    Raises:
        UserError: if the name leads out of the folder.
    """
    if not name or os.path.isabs(name) or ".." in name.replace("\\", "/").split("/") or "\0" in name:
        raise UserError(f"{folder}: the annotations name {name!r}, which is not a file below it; correct that entry")
    return os.path.join(folder, name)


def expand(path: str) -> tuple[str, ...]:
    """The files that match a path, URI, glob (`*.parquet`) or brace pattern (`x-{000..012}.tar`, `{a,b}.tar`), sorted.

    Raises:
        UserError: if a file is missing or a pattern matches nothing.
    """
    if not is_uri(path) and os.path.exists(path):
        return (path,)
    names = list(_expand_braces(path))
    with ThreadPoolExecutor(THREADS) as pool:  # a store answers each question after a while
        found = list(pool.map(_matches, names) if is_uri(path) else map(_matches, names))
    for name, matches in zip(names, found, strict=True):
        if not matches:
            raise UserError(f"{name}: no such file or folder; correct the path")
    return tuple(sorted({match for matches in found for match in matches}))


def _matches(pattern: str) -> list[str]:
    """The files and folders that match a path, URI or glob."""
    if not glob.has_magic(pattern):
        return [pattern] if exists(pattern) else []
    if not is_uri(pattern):
        return glob.glob(pattern)
    if is_web(pattern):
        raise UserError(f"{pattern}: {NO_LISTING}")
    parts = pattern.split("/")
    first = next(place for place, part in enumerate(parts) if glob.has_magic(part))
    found = ["/".join(parts[:first])]
    for place, part in enumerate(parts[first:], first):
        if glob.has_magic(part):
            entries = [entry for folder in found for entry in list_folder(folder) if _fits(entry.path, part)]
            found = [entry.path for entry in entries if entry.is_folder or place == len(parts) - 1]
        else:
            found = [path for folder in found if exists(path := f"{folder}/{part}")]
    return found


def _fits(path: str, part: str) -> bool:
    """Whether the name of a file matches one component of a pattern; a hidden one only where the pattern says so."""
    name = os.path.basename(path)
    return fnmatch.fnmatchcase(name, part) and (part.startswith(".") or not name.startswith("."))


def _expand_braces(pattern: str) -> Iterator[str]:
    match = _BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    for tail in _expand_braces(pattern[match.end() :]):
        for option in _options(match[1]):
            yield pattern[: match.start()] + option + tail


def _options(body: str) -> list[str]:
    bounds = _RANGE.fullmatch(body)
    if bounds is None:
        return body.split(",") if "," in body else ["{" + body + "}"]
    first, last = bounds.groups()
    width = len(first) if first.startswith("0") else 0
    return [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]


def readable_name(path: str) -> str:
    """A name from the last two path components, safe as a file name: `/d/cifar/train.parquet` gives `cifar-train`."""
    stem = re.sub(r"\.(tar|parquet)$", "", path, flags=re.IGNORECASE)
    parts = [part for part in stem.split(os.sep) if part][-2:]
    return re.sub(r"[^\w.]+|\.{2,}", "-", "-".join(parts)).strip("-._") or "images"


def refuse_split_files(location: str, names: Iterable[str], extension: str) -> None:
    """Refuse a folder with the files of several splits, which would leak training data into the evaluation.

    Raises:
        UserError: if the names contain different split names (train, val, test).
    """
    splits = sorted({match[1].lower() for name in names if (match := _SPLIT.search(name.removesuffix(extension)))})
    if len(splits) > 1:
        raise UserError(
            f"{location}: contains several splits ({', '.join(splits)}); name one of them, such as "
            f"{location}/{splits[0]}*{extension}"
        )


def refuse_split_folders(location: str, names: Sequence[str]) -> None:
    """Refuse folders that are splits, and no classes.

    Raises:
        UserError: if several are named as different splits are, and either all are, or one of them contains folders itself.
    """
    splits = {name: match[1].lower() for name in names if (match := _SPLIT_FOLDER.fullmatch(name))}
    if len(set(splits.values())) < 2:
        return
    if len(splits) == len(names) or any(_has_folders(os.path.join(location, name)) for name in splits):
        listed = sorted(splits)
        raise UserError(
            f"{location}: contains several splits ({', '.join(listed)}); name one of them, such as {location}/{listed[0]}, "
            f"or {location}/* if these folders are classes"
        )


def _has_folders(folder: str) -> bool:
    if is_uri(folder):
        return any(entry.is_folder and not is_system(os.path.basename(entry.path)) for entry in list_folder(folder))
    try:
        with os.scandir(folder) as entries:
            return any(entry.is_dir() and not is_system(entry.name) for entry in entries)
    except OSError:
        return False  # the index refuses it by name
