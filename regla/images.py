"""Images in memory as a Parquet file, which the pipeline reads like any other."""

import hashlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Images = str | Path | Sequence[Any]
"""A folder, .tar or .parquet files; or a list of image files, PIL images and RGB arrays uint8 [H, W, 3]."""


def locate(images: Images, folder: Path) -> str:
    """Give the location of images; a list is written to `<folder>/<digest>.parquet` unless that file exists."""
    if isinstance(images, str | Path):
        return str(images)
    encoded = [*_encode(images)]
    digest = hashlib.sha256(b"".join(hashlib.sha256(data).digest() for data in encoded)).hexdigest()
    file = folder / f"{digest[:16]}.parquet"
    return str(file if file.exists() else _write(encoded, file, None))


def write_images(images: Sequence[Any], file: str | Path, labels: Sequence[int] | None = None) -> Path:
    """Write images to a Parquet file with the columns `image` (encoded bytes) and, with labels, `label`.

    Args:
        images: image files, which are copied byte for byte; PIL images and RGB arrays uint8 [H, W, 3], stored as PNG.
        file: the output; missing folders are created.
        labels: class of every image, from 0; kNN needs them.

    Returns:
        The path of the file, for `images` and `held_out` of :func:`regla.distill`.

    Raises:
        UserError: for an array of another shape or type, an unreadable file, or a wrong number of labels.
    """
    from pipeline.errors import UserError

    encoded = [*_encode(images)]
    if labels is not None and len(labels) != len(encoded):
        raise UserError(f"{len(labels)} labels for {len(encoded)} images: give one label for each image")
    return _write(encoded, Path(file), labels)


def _write(encoded: Sequence[bytes], file: Path, labels: Sequence[int] | None) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipeline.storage.atomic import atomic_write

    columns: dict[str, Any] = {"image": pa.array(encoded, pa.binary())}
    if labels is not None:
        columns["label"] = pa.array([int(label) for label in labels], pa.int64())
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as stream:
        pq.write_table(pa.table(columns), stream, row_group_size=256, compression="none")
    return file


def _encode(images: Sequence[Any]) -> Iterator[bytes]:
    from pipeline.errors import UserError
    from pipeline.predict.images import opened

    for image in images:
        if isinstance(image, str | Path):
            try:
                yield Path(image).read_bytes()
            except OSError as error:
                raise UserError(f"{image}: {error.strerror}") from error
        else:
            buffer = io.BytesIO()
            opened(image).save(buffer, "PNG")
            yield buffer.getvalue()
