"""Open the images at a location: folders, tar shards, Parquet files, or generated sample scenes."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from pipeline.errors import UserError
from pipeline.imaging.decode import IMAGE_EXTENSIONS
from pipeline.sources.base import Source
from pipeline.sources.config import DataConfig
from pipeline.sources.hold_out import HoldOut, Split
from pipeline.sources.image_folder import ImageFolder
from pipeline.sources.left_out import is_system
from pipeline.sources.locations import SAMPLES, absolute, expand, refuse_split_files
from pipeline.sources.parquet_images import ParquetImages
from pipeline.sources.sample_scenes import SampleScenes, SceneSettings
from pipeline.sources.tar_shards import TarShards
from pipeline.storage.files import NO_LISTING, THREADS, is_folder, list_folder
from pipeline.storage.remote import is_uri, is_web

_ARCHIVES = (".tar", ".parquet")


def open_images(data: DataConfig, split: Split, seed: int) -> Source:
    """Open the training images, or the held-out ones, if there are any; `seed` is that of generated scenes.

    Raises:
        UserError: as `open_source`.
    """
    location = data.train if split == "train" else data.held_out
    assert location is not None
    source = open_source(
        location,
        split=split,
        image_column=data.image_column,
        label_column=data.label_column,
        samples=SceneSettings(getattr(data.samples, split), data.samples.size, seed),
    )
    return HoldOut(source, data.share, split) if data.share else source


def open_source(
    location: str,
    *,
    split: str,
    image_column: str | None = None,
    label_column: str | None = None,
    samples: SceneSettings | None = None,
) -> Source:
    """Open the images at a location, whose content decides the kind of source.

    Args:
        location: `samples` for generated scenes; a folder of class folders or images, or a glob or brace pattern of class
            folders, for `ImageFolder`; a folder, file, glob or brace pattern of `.tar` or `.parquet` files for `TarShards`
            or `ParquetImages`. Each by local path or URI; http:// and https:// name files alone, and patterns of braces.
        split: of the generated scenes.
        image_column, label_column: of Parquet files; None: found by type and name.

    Raises:
        UserError: if nothing is found, kinds or splits are mixed, or no column holds images.
    """
    if location == SAMPLES:
        settings = samples or SceneSettings()
        return SampleScenes(split, settings.count, settings.size, settings.seed)
    if location.startswith("cache://"):
        raise UserError(
            f"{location}: a version of the cache serves precompute, distill and evaluate; name its images here"
        )
    path = absolute(location)
    files = _archives_in(path) if is_folder(path) else expand(path)
    if not files:
        return ImageFolder.open(path)
    if folders := _class_folders(files):
        return ImageFolder.of_classes(path, folders)
    kinds = {os.path.splitext(file)[1].lower() for file in files}
    if kinds == {".tar"}:
        return TarShards(path, files)
    if kinds == {".parquet"}:
        return ParquetImages.open(path, files, image_column, label_column)
    if is_web(path):
        raise UserError(f"{path}: {NO_LISTING}")
    raise UserError(
        f"{path}: matches {', '.join(sorted(kind or 'folders' for kind in kinds))}; "
        "give a folder of images, or .tar files, or .parquet files"
    )


def _class_folders(matches: Sequence[str]) -> list[str]:
    """The folders that a pattern matches; none if it matches archives or images too."""
    data = (*IMAGE_EXTENSIONS, *_ARCHIVES)
    if any(match.lower().endswith(data) and not is_folder(match) for match in matches):
        return []
    with ThreadPoolExecutor(THREADS) as pool:
        folders = [*pool.map(is_folder, matches)] if is_uri(matches[0]) else [*map(is_folder, matches)]
    named = zip(matches, folders, strict=True)
    return [match for match, folder in named if folder and not is_system(os.path.basename(match))]


def _archives_in(folder: str) -> tuple[str, ...]:
    """The tar or Parquet files directly in a folder; empty if it contains only images or class folders."""
    names = _names_in(folder)
    found = {kind: [name for name in names if name.lower().endswith(kind)] for kind in _ARCHIVES}
    archives = [kind for kind, matches in found.items() if matches]
    if not archives:
        return ()
    data = ("/", *IMAGE_EXTENSIONS)
    others = any(name.lower().endswith(data) or os.path.isdir(os.path.join(folder, name)) for name in names)
    kind = archives[0]
    if others or len(archives) > 1:
        raise UserError(
            f"{folder}: contains {kind} files and other data; name the files you mean, such as {folder}/*{kind}"
        )
    refuse_split_files(folder, found[kind], kind)
    return tuple(os.path.join(folder, name) for name in found[kind])


def _names_in(folder: str) -> list[str]:
    """The names of all entries of a folder but the system's, sorted; those of folders in a store end in a slash."""
    if is_uri(folder):
        entries = list_folder(folder)
        names = [os.path.basename(entry.path) + "/" * entry.is_folder for entry in entries]
    else:
        try:
            names = os.listdir(folder)
        except OSError as error:
            raise UserError(f"{folder}: cannot be listed ({error.strerror}); check its permissions") from error
    return sorted(name for name in names if not is_system(name.rstrip("/")))
