"""COCO's annotation and results files: every field that is read is checked, and the first wrong one is named."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pycocotools import mask as rle
from pydantic import BeforeValidator, FailFast, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic needs it below Python 3.12

from pipeline.downstream.detect.shapes import Finite, encoded, has_shape, shown, wrong_shape
from pipeline.downstream.text import read_text
from pipeline.errors import UserError


def _whole(value: Any) -> Any:
    return int(value) if type(value) is float and value.is_integer() else value


def _text(value: Any) -> Any:
    return str(value) if type(value) is int else value


Id = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63), BeforeValidator(_whole)]
Side = Annotated[int, Field(strict=True, gt=0, lt=2**16), BeforeValidator(_whole)]
"""In pixels; pycocotools counts the pixels of an image in 32 bits."""
Name = Annotated[str, Field(strict=True, min_length=1), BeforeValidator(_text)]


class CocoImage(TypedDict):
    """An image; `file_name` may be missing where no image is read."""

    id: Id
    width: Side
    height: Side
    file_name: NotRequired[Annotated[str, Field(strict=True, min_length=1)]]


class CocoCategory(TypedDict):
    """A category."""

    id: Id
    name: Name


class CocoAnnotation(TypedDict):
    """An object; null in an optional field means that it is missing. `id` only names it."""

    id: NotRequired[Any]
    image_id: Id
    category_id: Id
    bbox: NotRequired[list[Finite] | None]
    area: NotRequired[Annotated[Finite, Field(ge=0)] | None]
    iscrowd: NotRequired[Literal[0, 1, False, True] | None]
    segmentation: NotRequired[Any]


class CocoDataset(TypedDict):
    """Annotations; other fields are dropped."""

    images: Annotated[list[CocoImage], FailFast()]
    categories: Annotated[list[CocoCategory], FailFast()]
    annotations: Annotated[list[CocoAnnotation], FailFast()]


class CocoDetection(TypedDict):
    """An entry of a results file."""

    image_id: Id
    category_id: Id
    score: Finite
    bbox: NotRequired[list[Finite] | None]
    segmentation: NotRequired[Any]


_DATASET = TypeAdapter(CocoDataset)
_DETECTIONS = TypeAdapter(Annotated[list[CocoDetection], FailFast()])
_NOUNS = {"images": "image", "categories": "category", "annotations": "annotation"}


def read_annotations(path: str | Path, *, file_names: bool = False, masks: str | None = None) -> dict[str, Any]:
    """Read a file in COCO's format whose images, categories and annotations refer to each other.

    Every annotation has a `bbox`, that of its mask where the file gives none. Segmentations that cannot be used are dropped
    where nothing needs them.

    Args:
        file_names: whether every image needs a `file_name`.
        masks: remedy for an annotation without a segmentation; None: masks are not needed.

    Raises:
        UserError: naming the file and the first entry and field that is wrong.
    """
    dataset: dict[str, Any] = dict(_read(path, _DATASET))
    for part, entries in dataset.items():
        _refuse_repeated(path, _NOUNS[part], entries if part != "annotations" else ())
    images = {image["id"]: image for image in dataset["images"]}
    categories = {category["id"] for category in dataset["categories"]}
    if file_names and (unnamed := next((image for image in images.values() if "file_name" not in image), None)):
        raise UserError(f"{path}: image {unnamed['id']} has no file_name")
    for number, entry in enumerate(dataset["annotations"], start=1):
        image = images.get(entry["image_id"])
        where = f"{path}: {annotation_name(entry, number, image)}"
        if image is None:
            raise UserError(f"{where} is of image {entry['image_id']}, which is not listed")
        if entry["category_id"] not in categories:
            raise UserError(f"{where} has category {entry['category_id']}, which is not listed")
        _complete(entry, image, where, masks)
    return dataset


def annotation_name(entry: Mapping[str, Any], number: int, image: Mapping[str, Any] | None) -> str:
    """An annotation for people: its id, else its number from 1 on, with the file of its image."""
    name = entry.get("id") if isinstance(entry.get("id"), int | str) else number
    file = image.get("file_name", image.get("id")) if image else None
    return f"annotation {shown(name)}" + (f" ({shown(file)})" if file is not None else "")


def _complete(entry: dict[str, Any], image: Mapping[str, Any], where: str, masks: str | None) -> None:
    """Check box and segmentation against the image; compute the box if there is none."""
    box, shape = entry.get("bbox"), entry.get("segmentation")
    if box and len(box) != 4:
        raise UserError(f"{where} has a bbox of {len(box)} numbers instead of four (left, top, width, height)")
    if not has_shape(shape):
        if masks is not None:
            raise UserError(f"{where} has no segmentation{masks}")
        if not box:
            raise UserError(f"{where} has neither a box of four numbers nor a segmentation")
        entry.pop("segmentation", None)
        return
    if masks is None and box and entry.get("area") is not None:
        del entry["segmentation"]
        return
    if wrong := wrong_shape(shape, image["height"], image["width"]):
        if masks is not None or not box:
            raise UserError(f"{where} has a segmentation {wrong}")
        del entry["segmentation"]
    if not box:
        entry["bbox"] = rle.toBbox(encoded(shape, image["height"], image["width"])).tolist()


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """Read detections in COCO's results format; all have what the first has of `bbox` and `segmentation`, and nothing else.

    Raises:
        UserError: naming the file and the first detection and field that is wrong.
    """
    detections: list[dict[str, Any]] = [dict(entry) for entry in _read(path, _DETECTIONS)]
    fields = [name for name in ("bbox", "segmentation") if detections and has_shape(detections[0].get(name))]
    for number, entry in enumerate(detections):
        where = f"{path}: detection {number}"
        lacking = [name for name in fields if not has_shape(entry.get(name))]
        if lacking or not fields:
            raise UserError(f"{where} has no {(lacking or ['bbox or segmentation'])[0]}")
        if "bbox" in fields and len(entry["bbox"]) != 4:
            raise UserError(f"{where} has a bbox of {len(entry['bbox'])} numbers instead of four")
        for name in {"bbox", "segmentation"} - set(fields):
            entry.pop(name, None)
    return detections


def match_results(
    path: str | Path, detections: Sequence[dict[str, Any]], dataset: Mapping[str, Any], annotations: str | Path
) -> None:
    """Check that detections are of the images and categories of a dataset, and make their masks compressed run lengths.

    Raises:
        UserError: naming the files and the first detection that does not fit.
    """
    images = {image["id"]: image for image in dataset["images"]}
    categories = {category["id"] for category in dataset["categories"]}
    for number, entry in enumerate(detections):
        where = f"{path}: detection {number}"
        image = images.get(entry["image_id"])
        if image is None or entry["category_id"] not in categories:
            raise UserError(
                f"{where} is of image {entry['image_id']}, category {entry['category_id']}, which {annotations} does not have"
            )
        if (shape := entry.get("segmentation")) is not None:
            sides = image["height"], image["width"]
            if wrong := wrong_shape(shape, *sides):
                raise UserError(f"{where} has a segmentation {wrong}")
            entry["segmentation"] = encoded(shape, *sides)


def _read(path: str | Path, adapter: TypeAdapter[Any]) -> Any:
    text = read_text(path)
    try:
        return adapter.validate_json(text)
    except ValidationError as error:
        raise UserError(f"{path}: {_fault(error, text, adapter is _DETECTIONS)}") from None


def _fault(error: ValidationError, text: str, results: bool) -> str:
    """The first error for people: the entry, its field and value, and what that should be."""
    first = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        return f"cannot be read as JSON ({first['msg'].removeprefix('Invalid JSON: ')})"
    location = ["detections", *first["loc"]] if results else [*first["loc"]]
    if len(location) < 2 and (results or not location or first["type"] == "missing"):
        expected = (
            "results: expected a list of detections"
            if results
            else "annotations: expected images, annotations and categories"
        )
        return f"not COCO {expected}"
    part, *rest = location
    where = _entry_name(text, str(part), rest[0]) if rest else str(part)
    field = "".join(f"[{step}]" if isinstance(step, int) else str(step) for step in rest[1:])
    if first["type"] == "missing":
        return f"{where} has no {field}"
    value = shown(json.dumps(first["input"], default=str))
    verb = f"has {field} {value}" if field else f"is {value}"
    return f"{where} {verb}, which {re.sub(r'^[A-Z][a-z]+ should', 'should', first['msg'])}"


def _entry_name(text: str, part: str, number: Any) -> str:
    """An entry for people, by what the file says of it."""
    if part == "detections":
        return f"detection {number}"
    try:
        dataset = json.loads(text)
        entry = dataset[part][number]
    except (ValueError, LookupError, TypeError):  # such as a number of more digits than Python reads
        return f"{_NOUNS[part]} {number + 1}"
    if not isinstance(entry, dict):
        return f"{_NOUNS[part]} {number + 1}"
    if part == "annotations":
        listed: Iterable[Any] = dataset["images"] if isinstance(dataset["images"], list) else ()
        image = (item for item in listed if isinstance(item, dict) and item.get("id") == entry.get("image_id"))
        return annotation_name(entry, number + 1, next(image, None))
    names = (entry.get(field) for field in ("file_name", "name", "id"))
    return f"{_NOUNS[part]} {shown(next((name for name in names if name and isinstance(name, str | int)), number + 1))}"


def _refuse_repeated(path: str | Path, noun: str, entries: Sequence[Mapping[str, Any]]) -> None:
    found: set[int] = set()
    for entry in entries:
        if entry["id"] in found:
            name = entry.get("file_name") or entry.get("name") or entry["id"]
            raise UserError(f"{path}: {noun} {name} repeats id {entry['id']}")
        found.add(entry["id"])
