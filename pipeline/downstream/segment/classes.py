"""The classes of label maps: their names from a file, and which values of a map mean which class or nothing."""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.downstream.text import read_text
from pipeline.errors import UserError, did_you_mean
from pipeline.sources.label_maps import UNLABELLED

IGNORE = UNLABELLED
"""Label of pixels that neither the loss nor the metrics count, and always so in a label map's file."""
MAX_VALUE = 2**16 - 1
"""Largest value in a label map's file."""
_UNKNOWN = -1
_INDEX_COLUMNS = ("idx", "index", "id")
_BLANKS = ' \t\ufeff"'


class ClassList(NamedTuple):
    """Names by mask value, and whether the file gives the values (or they follow from its order)."""

    names: dict[int, str]
    numbered: bool


@dataclass(frozen=True)
class MaskValues:
    """What the values in a label map's file mean.

    Attributes:
        names: of the classes, by mask value in ascending order; labels count them from 0.
        ignored: values whose pixels do not count; always with `IGNORE`.
        numbered: whether the file of names gives the values.
        zero_ignored: whether 0 is ignored as `segment.reduce_zero_label` says.
    """

    names: dict[int, str]
    ignored: frozenset[int] = frozenset({IGNORE})
    numbered: bool = False
    zero_ignored: bool = False

    @classmethod
    def of(cls, path: str | Path, *, zero_ignored: bool, ignore: Sequence[int | str]) -> "MaskValues":
        """The values that a file of names, `segment.reduce_zero_label` and `segment.ignore` describe.

        Raises:
            UserError: if the file cannot be used, or does not have an ignored name.
        """
        listed = read_classes(path, int(zero_ignored))
        values = {IGNORE, *({0} if zero_ignored else ())}
        for item in ignore:
            found = [value for value, name in listed.names.items() if name == item] if isinstance(item, str) else [item]
            if not found:
                hint = did_you_mean(str(item), listed.names.values())
                raise UserError(f"segment.ignore: {path} names no class {item}{hint}")
            values.update(found)
        names = {value: name for value, name in listed.names.items() if value not in values - {IGNORE}}
        if IGNORE in names:
            raise UserError(
                f"segment.classes: {path} names value {IGNORE} ({names[IGNORE]}), which always means ignored; give it another"
            )
        if not names:
            raise UserError(f"segment.ignore: every class of {path} is ignored")
        return cls(names, frozenset(values), listed.numbered, zero_ignored)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names by label."""
        return tuple(self.names.values())

    @cached_property
    def table(self) -> np.ndarray:
        """Label by mask value: int16 [MAX_VALUE + 1], `IGNORE` for ignored ones, -1 for unknown ones."""
        labels = np.full(MAX_VALUE + 1, _UNKNOWN, np.int16)
        labels[list(self.names)] = np.arange(len(self.names))
        labels[list(self.ignored)] = IGNORE
        return labels

    def labels(self, mask: np.ndarray) -> np.ndarray:
        """Labels uint8 [H, W] of a label map.

        Raises:
            ValueError: naming a value that is neither a class nor ignored.
        """
        mask = mask.astype(np.int64)
        known = self.table[mask.clip(0, MAX_VALUE)]
        if (odd := (known == _UNKNOWN) | (mask < 0) | (mask > MAX_VALUE)).any():
            raise ValueError(f"holds value {mask[odd][0]}, which is neither a class nor ignored")
        return known.astype(np.uint8)

    def check(self, values: Iterable[int], where: str, training: bool) -> list[str]:
        """Notes on the values seen in all label maps of a folder `where`, all of which are known.

        Raises:
            UserError: if no class occurs in them; for training, if only one does, or the names seem to be shifted.
        """
        seen, count = set(values), len(self.names)
        held = f"values seen: {ranges(seen, self.ignored)}"
        if not (occurring := seen & set(self.names)):
            raise UserError(f"{where}: every pixel is ignored ({held}); no class of segment.classes occurs")
        shifted = self.zero_ignored and not self.numbered and seen - (self.ignored - {0}) == set(range(count))
        if training and shifted:
            raise UserError(
                f"segment.reduce_zero_label=true gives the {count} names of segment.classes to the values 1 to {count}, but "
                f"the label maps in {where} hold 0 to {count - 1}, so that every name would be shifted by one: leave it out, or, "
                f"if 0 means no class and `{self.names[count]}` does not occur, number the names in a table (idx, name)"
            )
        absent = {value: name for value, name in self.names.items() if value not in occurring}
        named = ", ".join(f"`{name}` ({value})" for value, name in [*absent.items()][:5])
        more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        if training and len(occurring) == 1 and absent:
            (only,) = occurring
            hint = (
                f"; {IGNORE} always means ignored: give those pixels the value of their class" if IGNORE in seen else ""
            )
            raise UserError(
                f"{where}: only `{self.names[only]}` ({only}) occurs in the label maps, not {named}{more}; {held}{hint}"
            )
        if not absent:
            return []
        return [f"{len(absent)} of {count} classes occur in no label map: {named}{more}; {held}"]

    def refuse_unknown(self, value: int, where: str, values: Iterable[int]) -> None:
        """Raise a UserError for a value in the map `where` that is neither a class nor ignored.

        Args:
            values: all values seen in the folder, from which the remedy follows.
        """
        seen, count = set(values), len(self.names)
        known = ranges(self.names)
        fault = f"{where}: holds value {value}, but segment.classes has {count} classes, for the values {known}"
        unknown = sorted(seen - set(self.names) - self.ignored)
        ignore = f"segment.ignore=[{', '.join(map(str, unknown[:8]))}{', ...' if len(unknown) > 8 else ''}]"
        held = f"values seen: {ranges(seen, self.ignored)}"
        one_more = unknown == [count] and not self.numbered and self.ignored == {IGNORE}
        if one_more and 0 in seen:
            raise UserError(
                f"{fault} ({held}): if {value} means no class, set {ignore}; if 0 does, segment.reduce_zero_label=true; else "
                "a name is missing in segment.classes"
            )
        if one_more:
            raise UserError(f"{fault} ({held}): if they count from 1, set segment.reduce_zero_label=true")
        raise UserError(f"{fault} ({held}): add their names to segment.classes, or set {ignore}")


def ranges(values: Iterable[int], ignored: Iterable[int] = ()) -> str:
    """Whole numbers as text, such as `0-4, 7, 255 (ignored)`."""
    parts: list[list[int]] = []
    for value in sorted(values):
        if parts and value == parts[-1][-1] + 1 and (value in ignored) == (parts[-1][-1] in ignored):
            parts[-1][1:] = [value]
        else:
            parts.append([value])
    shown = ["-".join(map(str, part)) + (" (ignored)" if part[0] in ignored else "") for part in parts]
    return ", ".join(shown[:12]) + (f" and {len(shown) - 12} more ranges" if len(shown) > 12 else "")


def read_classes(path: str | Path, first: int) -> ClassList:
    """Names of the classes with mask values from `first` on.

    A table (.csv, .tsv, or text whose first line has several columns, one of them `name`; separated by tabs, semicolons or
    commas, as spreadsheets write them) has a column `name` and optionally `idx`, `index` or `id` with the mask value. Any
    other file has one name per line, in order.

    Raises:
        UserError: naming the line, if the file is missing, has no such column, or leaves doubt about a class.
    """
    try:
        text = read_text(path).replace("\r\n", "\n").replace("\r", "\n")
    except UserError as error:
        raise UserError(f"segment.classes: {error}") from error
    if (rows := _table(path, text)) is None:
        names, numbered = dict(enumerate(_lines(path, text), start=first)), False
    else:
        names, numbered = _columns(path, rows, first)
    if not 1 <= len(names) <= IGNORE:
        raise UserError(f"segment.classes: {path} has {len(names)} classes; there can be 1 to {IGNORE}")
    if max(names) > MAX_VALUE:
        raise UserError(f"segment.classes: {path} names value {max(names)}; there can be 0 to {MAX_VALUE}")
    return ClassList(names, numbered)


def _lines(path: str | Path, text: str) -> list[str]:
    """One name per line, without the quotes that a spreadsheet adds."""
    lines = [line.strip() for line in text.strip("\n").split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    if "" in lines:
        raise UserError(
            f"segment.classes: {path}: an empty line before `{lines[lines.index('') + 1]}` leaves doubt about the number of "
            "the classes after it; remove it, or name that class"
        )
    quoted = re.compile(r'"(.*)"')
    return [match[1].replace('""', '"') if (match := quoted.fullmatch(line)) else line for line in lines]


def _table(path: str | Path, text: str) -> list[tuple[int, list[str]]] | None:
    """The rows of a table, each with its line, header first; None if the file is a list of names."""
    lead, _, rest = text.lstrip("\n").partition("\n")
    stated = re.fullmatch(r"sep=(.)\s*", lead)  # as Excel reads and writes it
    if stated:
        text, lead = rest, rest.partition("\n")[0]
    headers = {mark: [_key(cell) for cell in next(csv.reader([lead], delimiter=mark), [])] for mark in "\t;,"}
    marks = [stated[1]] if stated else [mark for mark, cells in headers.items() if "name" in cells]
    if not marks or (
        len(headers.get(marks[0], ())) < 2 and Path(path).suffix.lower() not in (".csv", ".tsv") and not stated
    ):
        if Path(path).suffix.lower() in (".csv", ".tsv") or "\t" in lead:
            raise UserError(f"segment.classes: {path} has no column `name` in its first line ({lead.strip()[:60]})")
        return None
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=marks[0], strict=True)
    rows = []
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                rows.append((reader.line_num + bool(stated), [" ".join(cell.split()) for cell in cells]))
    except csv.Error as error:
        raise UserError(f"segment.classes: {path}: line {reader.line_num + bool(stated)}: {error}") from error
    return rows


def _key(cell: str) -> str:
    return cell.strip(_BLANKS).lower()


def _columns(path: str | Path, rows: list[tuple[int, list[str]]], first: int) -> tuple[dict[int, str], bool]:
    """Names by mask value, and whether the table gives the values."""
    header = [_key(cell) for cell in rows[0][1]] if rows else []
    if "name" not in header:
        raise UserError(f"segment.classes: {path} has no column `name`")
    index = next((header.index(column) for column in _INDEX_COLUMNS if column in header), None)
    named: dict[int, str] = {}
    lines: dict[int, int] = {}
    for order, (line, cells) in enumerate(rows[1:]):
        where = f"segment.classes: {path}: line {line}"
        if len([*filter(None, cells[len(header) :])]):
            raise UserError(
                f"{where} has more cells than the first line; put a name that contains the separator in quotes"
            )
        name = cells[header.index("name")] if len(cells) > header.index("name") else ""
        if not name:
            raise UserError(f"{where} has no name")
        value = order + first
        if index is not None:
            shown = cells[index] if len(cells) > index else ""
            if not re.fullmatch(r"[0-9]{1,9}", shown):
                raise UserError(f"{where} has `{shown}` in `{header[index]}`, which must be a whole number from 0 on")
            value = int(shown)
        if value in named:
            raise UserError(f"{where} (`{name}`) repeats {value}, which is `{named[value]}` in line {lines[value]}")
        named[value], lines[value] = name, line
    if index is None:
        return named, False
    names = {value: named[value] for value in sorted(named) if value >= first}
    if [*names] != [*range(first, first + len(names))]:
        raise UserError(f"segment.classes: {path} leaves gaps between {first} and {max(names, default=first)}")
    return names, True
