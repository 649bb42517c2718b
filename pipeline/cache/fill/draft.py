"""A version of a data set in the making: images come in waves, and get their places in parts."""

from dataclasses import replace

import pyarrow as pa

from pipeline.cache.fill.compose import Placer, take_lost
from pipeline.cache.fill.digest import KEYED_SCHEMA
from pipeline.cache.fill.plan import SplitPlan
from pipeline.cache.layout.dataset import BAD_SCHEMA, make_dataset, write_samples
from pipeline.cache.layout.part import Part
from pipeline.sources.base import INDEX_SCHEMA

WAVE_IMAGES = 1 << 20
"""Images of a wave, and of samples that wait for their files: some 200 bytes each, names, places and keys."""


class VersionDraft:
    """The samples of a split by part. The samples of complete waves lie in files, so that the memory is that of a wave.

    Args:
        split: its new images are those that `add` gets.
        shard_size: images per shard of new parts.
        made: the parts that this job has made, to which those made here are added.
    """

    def __init__(self, split: SplitPlan, shard_size: int, made: dict[str, Part]) -> None:
        self.split = split
        self.listing, self.lost = take_lost(split.listing)
        self.known, self.kept, self.bad = dict(self.listing.known), dict(self.listing.kept), [self.listing.bad]
        self.parts = {part.id: part for part in (*self.listing.parts, *split.dataset.parts)}
        self.placer = Placer(split.dataset, self.parts, shard_size, made)
        self.added = 0

    def add(self, images: pa.Table, bad: pa.Table, scatter: bool) -> list[tuple[Part, pa.Table]]:
        """Give images with keys (`KEYED_SCHEMA`) a place; the parts that hold them, with their samples there.

        Args:
            bad: samples that cannot be used (`BAD_SCHEMA`).
            scatter: as of :meth:`~pipeline.cache.fill.compose.Placer.place`.
        """
        images = pa.concat_tables([images.select(KEYED_SCHEMA.names), self.lost])
        self.lost = KEYED_SCHEMA.empty_table()
        if self.added and self.added + images.num_rows > WAVE_IMAGES:
            self.write()
        placed = []
        for part, rows in self.placer.place(images, scatter):
            listed = replace(self.listing, known=self.known, kept=self.kept).samples(part.id)
            self.known[part.id] = pa.concat_tables([listed, rows])
            self.kept.pop(part.id, None)
            placed.append((part, rows))
        self.bad.append(bad)
        self.added += images.num_rows
        return placed

    def write(self) -> None:
        """Write the files of the samples so far, which the version will name unless images are added to their parts."""
        empty = BAD_SCHEMA.empty_table()
        written = make_dataset(self.split.dataset, self.parts.values(), self.known, empty)
        write_samples(written, self.listing.damaged)
        written = replace(written, draft={})
        self.kept |= {chosen.part: (chosen, written) for chosen in written.selections}
        self.known, self.added = {}, 0

    def finish(self, notes: tuple[str, ...] = ()) -> SplitPlan:
        """The plan of the split, all of whose images have a place; `notes`: what its source has passed over besides."""
        bad = pa.concat_tables(self.bad)
        complete = make_dataset(self.split.dataset, self.parts.values(), self.known, bad, self.kept)
        found = replace(
            self.listing,
            known=self.known,
            kept=self.kept,
            bad=bad,
            new=INDEX_SCHEMA.empty_table(),
            unopened=(),
            notes=tuple(dict.fromkeys((*self.listing.notes, *notes))),
            parts=complete.parts,
        )
        return replace(self.split, listing=found, dataset=complete)
