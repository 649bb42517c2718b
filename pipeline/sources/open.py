"""Open the images at a location: folders, tar shards, Parquet files, or generated sample scenes."""

import os
from collections.abc import Sequence

from pipeline.errors import UserError
from pipeline.imaging.decode import IMAGE_EXTENSIONS
from pipeline.sources.base import Source
from pipeline.sources.image_folder import ImageFolder
from pipeline.sources.left_out import is_system
from pipeline.sources.locations import SAMPLES, absolute, expand, refuse_split_files
from pipeline.sources.parquet_images import ParquetImages
from pipeline.sources.sample_scenes import SampleScenes, SceneSettings
from pipeline.sources.tar_shards import TarShards

_ARCHIVES = (".tar", ".parquet")


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
            or `ParquetImages`.
        split: of the generated scenes.
        image_column, label_column: of Parquet files; None: found by type and name.

    Raises:
        UserError: if nothing is found, kinds or splits are mixed, or no column holds images.
    """
    if location == SAMPLES:
        settings = samples or SceneSettings()
        return SampleScenes(split, settings.count, settings.size, settings.seed)
    path = absolute(location)
    files = _archives_in(path) if os.path.isdir(path) else expand(path)
    if not files:
        return ImageFolder.open(path)
    if folders := _class_folders(files):
        return ImageFolder.of_classes(path, folders)
    kinds = {os.path.splitext(file)[1].lower() for file in files}
    if kinds == {".tar"}:
        return TarShards(path, files)
    if kinds == {".parquet"}:
        return ParquetImages.open(path, files, image_column, label_column)
    raise UserError(
        f"{path}: matches {', '.join(sorted(kind or 'folders' for kind in kinds))}; "
        "give a folder of images, or .tar files, or .parquet files"
    )


def _class_folders(matches: Sequence[str]) -> list[str]:
    """The folders that a pattern matches; none if it matches archives or images too."""
    data = (*IMAGE_EXTENSIONS, *_ARCHIVES)
    if any(match.lower().endswith(data) and not os.path.isdir(match) for match in matches):
        return []
    return [match for match in matches if os.path.isdir(match) and not is_system(os.path.basename(match))]


def _archives_in(folder: str) -> tuple[str, ...]:
    """The tar or Parquet files directly in a folder; empty if it contains only images or class folders."""
    try:
        names = sorted(name for name in os.listdir(folder) if not is_system(name))
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror}); check its permissions") from error
    found = {kind: [name for name in names if name.lower().endswith(kind)] for kind in _ARCHIVES}
    archives = [kind for kind, matches in found.items() if matches]
    if not archives:
        return ()
    others = any(name.lower().endswith(IMAGE_EXTENSIONS) or os.path.isdir(os.path.join(folder, name)) for name in names)
    kind = archives[0]
    if others or len(archives) > 1:
        raise UserError(
            f"{folder}: contains {kind} files and other data; name the files you mean, such as {folder}/*{kind}"
        )
    refuse_split_files(folder, found[kind], kind)
    return tuple(os.path.join(folder, name) for name in found[kind])
