"""The plan of a cache: what the sources list, what the cache has of it, and which teachers are asked; made without writing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.cache.config import CacheJobConfig, PrecomputeJobConfig
from pipeline.cache.fill.listing import Listing, list_source
from pipeline.cache.fill.pinned import SCHEME, PinnedImages, find_version
from pipeline.cache.layout.cached_teacher import CachedTeacher, make_teacher
from pipeline.cache.layout.codec import Codec
from pipeline.cache.layout.dataset import Dataset
from pipeline.cache.layout.keys import teacher_id
from pipeline.cache.layout.part import Part
from pipeline.cache.layout.snapshot import RecordSnapshot
from pipeline.errors import UserError, blame_field
from pipeline.imaging.geometry import WHOLE, ViewPolicy
from pipeline.imaging.gpu_decode import NO_MIXUP
from pipeline.imaging.photometric import PhotometricPolicy
from pipeline.sources.base import Source
from pipeline.sources.hold_out import HoldOut, Split
from pipeline.sources.open import open_images
from pipeline.sources.streamed import streamed
from pipeline.storage.files import Entry
from pipeline.storage.names import folder_name
from pipeline.storage.store import Store


@dataclass(frozen=True)
class SplitPlan:
    """One split of the data (``train`` or ``val``): its source, its index, and its data set as far as the cache knows it.

    Attributes:
        listing: what the source lists beside what the cache knows; `dataset` lacks the rows that are new.
    """

    split: str
    source: Source
    listing: Listing
    dataset: Dataset

    @property
    def left_out(self) -> Sequence[str]:
        """What the source has passed over, in phrases."""
        return self.listing.notes

    @property
    def pinned(self) -> bool:
        """Whether the data set is a version by its address, whose source is not read."""
        return isinstance(self.source, PinnedImages)

    @property
    def new(self) -> pa.Table:
        """Rows of the index whose images are still to be read."""
        return self.listing.new

    @property
    def unopened(self) -> tuple[Entry, ...]:
        """Archives that are still to be read, whose images are not counted."""
        return self.listing.unopened

    @property
    def unopened_bytes(self) -> int:
        """Bytes of the archives that are still to be read."""
        return sum(archive.size for archive in self.unopened)

    @property
    def counted(self) -> int:
        """Samples that can be used, without those of unopened archives."""
        return self.dataset.count + self.new.num_rows

    @property
    def expected(self) -> int:
        """The images of unopened archives: as they say, or about as many as are as large as the others; 0 without others."""
        if self.listing.expected:
            return self.listing.expected[0]
        part = self.source.part if isinstance(self.source, HoldOut) else 1
        return round(part * self.unopened_bytes / self.image_bytes) if self.image_bytes else 0

    @property
    def is_counted(self) -> bool:
        """Whether the number of images is known, but for those that cannot be read."""
        return not self.unopened or self.listing.expected is not None

    @property
    def is_estimated(self) -> bool:
        """Whether the number of images is known at all, if only about."""
        return self.is_counted or bool(self.image_bytes)

    @property
    def images(self) -> int:
        """Samples that can be used, as far as known or expected."""
        return self.counted + self.expected

    @property
    def labelled(self) -> bool:
        """Whether an image has a label, or may have one."""
        source = streamed(self.source) if self.unopened else None
        may_have = source is not None and source.may_have_labels
        return bool(self.dataset.labelled) or may_have or self.new["label"].null_count < self.new.num_rows

    @property
    def image_bytes(self) -> float:
        """Mean bytes of an image in the source; 0 for generated scenes, and if none is known."""
        known = sum(chosen.bytes for chosen in self.dataset.selections)
        return float((known + (pc.sum(self.new["size"]).as_py() or 0)) / max(1, self.counted))

    def sample_ids(self) -> list[str]:
        """Names of all samples that can be used, as far as known; none of unopened archives."""
        known = [self.listing.samples(part.id)["sample_id"] for part in self.dataset.parts]
        return [name for column in (*known, self.new["sample_id"]) for name in column.to_pylist()]

    def missing(self, teacher: CachedTeacher) -> list[tuple[Part, int]]:
        """Shards of a teacher that are missing, of the images that the cache knows."""
        return self.dataset.missing(teacher.id)

    def missing_views(self, teacher: CachedTeacher) -> int:
        """Views that a teacher has still to encode, at most: some of the new images may be in the cache under another name.

        Those of unopened archives count as `expected`. Of a teacher's share they are that share, which is expected, not counted.
        """
        known = sum(part.shard_rows(shard) for part, shard in self.missing(teacher))
        return round(teacher.share * (known + self.new.num_rows + self.expected) * self.dataset.policy.rows_per_image)

    def views(self, teacher: CachedTeacher) -> int:
        """Views that a teacher is asked about, cached or not, as far as known or expected."""
        return round(teacher.share * self.images * self.dataset.policy.rows_per_image)


@dataclass(frozen=True)
class CachePlan:
    """What a job needs from the cache; made without writing anything, before anything expensive starts.

    Attributes:
        shard_size: images per shard of new parts.
    """

    store: Store
    splits: tuple[SplitPlan, ...]
    teachers: tuple[CachedTeacher, ...]
    shard_size: int = 512

    def split(self, name: str) -> SplitPlan | None:
        """The plan of ``train`` or ``val``."""
        return next((split for split in self.splits if split.split == name), None)


def plan_cache(
    config: PrecomputeJobConfig,
    store: Store,
    snapshot: RecordSnapshot | None = None,
    pins: Mapping[str, str] | None = None,
) -> CachePlan:
    """Index the sources and find out what the cache has of them; plans may share a snapshot.

    Args:
        pins: versions, by data set, that are used as they are; their sources are not listed.

    Raises:
        UserError, TeacherError: if a source, a teacher or the cache does not match the configuration.
    """
    cached = tuple(_cached_teacher(config, index) for index in range(len(config.teachers)))
    ids = [teacher.id for teacher in cached]
    for twin in {name for name in ids if ids.count(name) > 1}:
        raise UserError(f"teachers: {twin} is listed {ids.count(twin)} times; list each teacher once")
    splits = plan_splits(config, store, view_policy(config), snapshot, pins)
    return CachePlan(store, splits, cached, config.cache.shard_size)


def view_policy(config: PrecomputeJobConfig) -> ViewPolicy:
    """The views of the training images; UserError for changes of whole images, whose features all recipes share."""
    views = config.views
    photometric = PhotometricPolicy(**views.photometric.model_dump())
    if photometric and not views.crops:
        raise UserError(
            "views.photometric changes crops, and views.crops is 0: set views.crops (with views.min_area=1 a crop is the whole "
            "image)"
        )
    if views.mixup and views.crops < 2:
        raise UserError("views.mixup mixes all crops of an image but the first: set views.crops to 2 or more")
    if views.mixup and config.cache.decoder != "cpu":
        raise UserError(f"cache.decoder: {NO_MIXUP}")
    drawn = views.model_dump(exclude={"per_step", "photometric", "mixup"})
    return ViewPolicy(**drawn, seed=config.seed, photometric=photometric or None, mixup=views.mixup or None)


def plan_splits(
    config: CacheJobConfig,
    store: Store,
    policy: ViewPolicy = WHOLE,
    snapshot: RecordSnapshot | None = None,
    pins: Mapping[str, str] | None = None,
    only: Sequence[Split] = ("train", "val"),
) -> tuple[SplitPlan, ...]:
    """As `plan_cache`, without teachers; `policy` is for the training images, held-out images are always whole.

    Args:
        only: those that are planned, if there are any such images.
    """
    snapshot = snapshot or RecordSnapshot()
    splits = {"train": (config.data.train, policy), "val": (config.data.held_out, WHOLE)}
    given = [(split, at, views) for split in only for at, views in (splits[split],) if at]
    return tuple(_plan_split(config, store, split, at, views, snapshot, pins or {}) for split, at, views in given)


def _cached_teacher(config: PrecomputeJobConfig, index: int) -> CachedTeacher:
    teacher, cache = config.teachers[index], config.cache
    field, name = (f"teachers.{index}.codec", teacher.codec) if teacher.codec else ("cache.codec", cache.codec)
    with blame_field(field):
        codec = Codec.parse(name)
    spec = make_teacher(teacher).spec
    if codec.components and codec.components > spec.patch_dim:
        raise UserError(f"{field}: {name} keeps more components than the {spec.patch_dim} channels of {spec.name}")
    if teacher.basis and not codec.pca:
        raise UserError(
            f"teachers.{index}.basis: {name} has no projection; leave it out, or choose a codec that begins with pca"
        )
    identity = teacher_id(spec, name, cache.precision, teacher.basis, cache.decoder, teacher.share)
    return CachedTeacher(teacher, spec, identity, name, cache.precision, decoder=cache.decoder)


def _plan_split(
    config: CacheJobConfig,
    store: Store,
    split: Split,
    location: str,
    policy: ViewPolicy,
    snapshot: RecordSnapshot,
    pins: Mapping[str, str],
) -> SplitPlan:
    data = config.data
    with blame_field(f"data.{split}"):
        if location.startswith(SCHEME):
            return SplitPlan(split, *find_version(store, location.removeprefix(SCHEME), policy, snapshot))
        source = open_images(data, split, config.seed)
    name = f"{data.name}-{split}" if data.name else source.name
    if data.name and isinstance(source, HoldOut):
        name = source.called(name)
    if pinned := pins.get(folder_name(name)):
        return SplitPlan(split, *find_version(store, f"{folder_name(name)}/{pinned}", policy, snapshot))
    empty = Dataset(store, name, source.location, tuple(source.classes), policy=policy, snapshot=snapshot)
    return SplitPlan(split, source, *list_source(source, empty))


def check_weights(*plans: CachePlan) -> None:
    """Find out whether the weights that are still needed can be loaded, as far as a plan can know.

    Raises:
        TeacherError: if they cannot be had, or are those of another network.
    """
    pairs = ((split, teacher) for plan in plans for split in plan.splits for teacher in plan.teachers)
    needed = {teacher.id: teacher for split, teacher in pairs if split.unopened or split.missing_views(teacher)}
    for teacher in needed.values():
        teacher.create().check()


def versions_of(*plans: CachePlan) -> dict[str, str]:
    """The versions of these plans by data set, as `plan_cache` takes them."""
    datasets = [split.dataset for plan in plans for split in plan.splits]
    return {folder_name(dataset.name): dataset.fingerprint[:16] for dataset in datasets}


def all_parts(splits: Sequence[SplitPlan]) -> dict[str, Part]:
    """The parts of all splits, in order, by part and view."""
    return {part.key: part for split in splits for part in split.dataset.parts}
