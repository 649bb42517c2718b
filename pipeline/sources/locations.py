"""Locations as users write them: folders, files, glob and brace patterns."""

import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence

from pipeline.errors import UserError
from pipeline.sources.left_out import is_system

SAMPLES = "samples"
"""Location of the generated sample scenes; a folder of that name is `./samples`."""

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_SPLIT = re.compile(r"(?:^|[-_.])(train|val|test)(?:ing|id|idation)?\d*(?=$|[-_.])", re.IGNORECASE)
"""A split's name within the name of a file, such as `train-00001-of-00003`."""
_SPLIT_FOLDER = re.compile(r"(train|val|test)(?:ing|id|idation)?[-_]?\d*", re.IGNORECASE)


def absolute(location: str) -> str:
    """Absolute path of a location, valid in workers with another working folder; UserError if it is a URI."""
    if "://" in location:
        raise UserError(f"{location}: images are read from paths; mount the store, or copy the data to a local folder")
    return os.path.abspath(os.path.expanduser(location))


def below(folder: str, name: str) -> str:
    """Path of a file that an annotation names, within its folder. Links in the folder are the user's own and are followed.

    Raises:
        UserError: if the name leads out of the folder.
    """
    if not name or os.path.isabs(name) or ".." in name.replace("\\", "/").split("/") or "\0" in name:
        raise UserError(f"{folder}: the annotations name {name!r}, which is not a file below it; correct that entry")
    return os.path.join(folder, name)


def expand(path: str) -> tuple[str, ...]:
    """The files that match a path, glob (`*.parquet`) or brace pattern (`x-{000..012}.tar`, `{a,b}.tar`), sorted.

    Raises:
        UserError: if a file is missing or a pattern matches nothing.
    """
    if os.path.exists(path):
        return (path,)
    files: list[str] = []
    for name in _expand_braces(path):
        found = glob.glob(name) if glob.has_magic(name) else list(filter(os.path.exists, [name]))
        if not found:
            raise UserError(f"{name}: no such file or folder; correct the path")
        files += found
    return tuple(sorted(set(files)))


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
    try:
        with os.scandir(folder) as entries:
            return any(entry.is_dir() and not is_system(entry.name) for entry in entries)
    except OSError:
        return False  # the index refuses it by name
