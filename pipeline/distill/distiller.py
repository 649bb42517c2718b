"""The trained module: the student, and each teacher's heads, frozen standardisation and grid rule."""

from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.cache.layout.cached_teacher import CachedTeacher, teacher_labels
from pipeline.cache.layout.codec import FeatureCodec
from pipeline.cache.layout.shares import PRESENT
from pipeline.distill.balance import LOSS_KINDS, drop_coefficients, teacher_weights
from pipeline.distill.config import LossConfig
from pipeline.distill.grid import GridRule, patch_subsets
from pipeline.distill.loss import find_loss, image_loss
from pipeline.distill.masks import MaskTarget
from pipeline.distill.standardise import Standardiser
from pipeline.errors import UserError, one_line
from pipeline.student.model import Student, StudentOutput, distillation_head
from teachers.sam_masks import SamMasks


class SummaryQueue(nn.Module):
    """The latest `size` summaries as unit vectors [dim]; part of the state dict, so a resumed run continues identically."""

    rows: Tensor
    count: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(size, dim))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def entries(self) -> tuple[Tensor, Tensor]:
        """Summaries [Q, D], and [Q] bool, which of them are filled; `push` changes the summaries in place."""
        return self.rows, torch.arange(len(self.rows), device=self.rows.device) < self.count

    @torch.no_grad()
    def push(self, summaries: Tensor) -> None:
        """Replace the oldest entries by [B, D]."""
        latest = F.normalize(summaries.float(), dim=-1)[-len(self.rows) :]
        positions = (self.count + torch.arange(len(latest), device=latest.device)) % len(self.rows)
        self.rows[positions] = latest
        self.count += len(latest)


class StoredFeatures(nn.Module):
    """A teacher's features as cached for one input size of the student: decoders, grid rule, and subsets of patches.

    Args:
        grid: (h, w) of the student's feature map at that size.
    """

    patch_subsets: Tensor

    def __init__(
        self,
        teacher: CachedTeacher,
        standardisers: Mapping[str, Standardiser],
        codecs: Mapping[str, FeatureCodec],
        grid: tuple[int, int],
        max_patches: int | None,
    ) -> None:
        super().__init__()
        self.teacher, self.rule = teacher, GridRule(grid, teacher.spec.grid)
        self.register_buffer("patch_subsets", patch_subsets(self.rule.grid, max_patches), persistent=False)
        folded = {kind: standardisers[kind].fold(codecs[kind]) for kind in teacher.shapes}
        self.codecs = nn.ModuleDict({kind: decoder or codecs[kind] for kind, decoder in folded.items()})
        self.folded = {kind for kind, decoder in folded.items() if decoder}

    def positions(self, step: Tensor | None) -> Tensor | None:
        """[K] int64, the patches to compare in a step, a scalar int64; None: all."""
        if step is None or len(self.patch_subsets) == 1:
            return None
        # Indexing with a 0-d tensor forces a synchronisation with the GPU.
        return self.patch_subsets.index_select(0, (step % len(self.patch_subsets)).view(1)).squeeze(0)


class TeacherTarget(nn.Module):
    """One teacher's part of the loss: prediction heads, frozen statistics, cached features by the student's input size, and past
    summaries or SAM's decoder if a loss needs them.

    Attributes:
        stored: at the input size of the student's export.
    """

    stored: StoredFeatures

    def __init__(
        self,
        teacher: CachedTeacher,
        standardisers: Mapping[str, Standardiser],
        codecs: Mapping[str, FeatureCodec],
        student: Student,
        grid: tuple[int, int],
        hidden: int,
        loss: LossConfig,
        decoder: SamMasks | None = None,
    ) -> None:
        super().__init__()
        self.teacher, self.loss = teacher, loss
        self.standardisers = nn.ModuleDict({kind: standardisers[kind] for kind in teacher.shapes})
        self.stored = StoredFeatures(teacher, standardisers, codecs, grid, loss.max_patches)
        self.stored_at = nn.ModuleDict()  # by other input sizes
        dims = {"summary": student.encoder.dim, "patches": student.token_dim}
        self.heads = nn.ModuleDict(
            {kind: distillation_head(dims[kind], hidden, shape[-1]) for kind, shape in teacher.shapes.items()}
        )
        queued = {name: weight for name, weight in loss.summary.items() if find_loss(name).compares == "queue"}
        self.queue_losses = queued if "summary" in teacher.shapes else {}
        self.queue = SummaryQueue(loss.queue, *teacher.shapes["summary"]) if self.queue_losses else None
        self.masks = MaskTarget(decoder, loss.masks) if decoder else None

    def add_size(
        self, side: int, teacher: CachedTeacher, codecs: Mapping[str, FeatureCodec], grid: tuple[int, int]
    ) -> None:
        """Compare also at another input size, with the features of `teacher` there and the statistics of this one."""
        standardisers: Mapping[str, Standardiser] = dict(self.standardisers.items())  # type: ignore[arg-type]
        self.stored_at[str(side)] = StoredFeatures(teacher, standardisers, codecs, grid, self.loss.max_patches)

    def at(self, side: int) -> StoredFeatures:
        """The features for an input size of the student, in pixels."""
        found = self.stored_at[str(side)] if str(side) in self.stored_at else self.stored  # noqa: SIM401 it has no `get`
        assert isinstance(found, StoredFeatures)
        return found

    def predict(
        self, output: StudentOutput, positions: Tensor | None = None, stored: StoredFeatures | None = None
    ) -> dict[str, Tensor]:
        """Predicted standardised features: ``summary`` [B, D], and ``patches`` [B, gh, gw, D], or [B, K, D] with positions.

        Args:
            positions: [K] int64, row-major numbers of the patches to predict; None: all.
            stored: the features that they are compared with; None: those at the input size of the export.
        """
        features = (stored or self.stored).rule.align_student(output.feature_map)
        predicted = {"patches": self.heads["patches"](_select(features, positions))}
        if "summary" in self.heads:
            predicted["summary"] = self.heads["summary"](output.summary)
        return predicted

    def targets(
        self,
        raw: Mapping[str, Tensor],
        codecs: Mapping[str, FeatureCodec] | None = None,
        positions: Tensor | None = None,
        stored: StoredFeatures | None = None,
    ) -> dict[str, Tensor]:
        """Standardised features of the teacher by kind, in the shapes of `predict`.

        Args:
            raw: by kind, [B, row_bytes] uint8 as stored, on the student's device.
            codecs: decoders of the dataset of `raw`, each of which has its own projections; None: of the training images.
            positions: as in `predict`; other patches are not decoded, unless patches are averaged.
            stored: what `raw` is of; None: the features at the input size of the export.
        """
        stored = stored or self.stored
        averaged = stored.rule.grid != stored.rule.teacher
        # Autocast would run the projections in bfloat16, which is less precise than the stored features.
        with torch.autocast(raw["patches"].device.type, enabled=False):
            target = {
                kind: self._decode(
                    kind, raw[kind], stored, codecs, positions if kind == "patches" and not averaged else None
                )
                for kind in self.heads
            }
        if averaged:
            target["patches"] = _select(stored.rule.align_teacher(target["patches"]), positions)
        return target

    def _decode(
        self,
        kind: str,
        rows: Tensor,
        stored: StoredFeatures,
        codecs: Mapping[str, FeatureCodec] | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        decoder = stored.codecs[kind] if codecs is None else codecs[kind].to(rows.device)
        assert isinstance(decoder, FeatureCodec)
        features = decoder.decode(rows, positions)
        return features if codecs is None and kind in stored.folded else self.standardisers[kind](features)

    def embeddings(
        self,
        output: StudentOutput,
        raw: Mapping[str, Tensor],
        codecs: Mapping[str, FeatureCodec] | None = None,
        stored: StoredFeatures | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The student's prediction and the teacher's patches [B, D, h, w] float32, in the teacher's scale, each on its own grid.

        The student's is the one that exported heads give. Other arguments as in `targets`.
        """
        tokens = self.heads["patches"](output.feature_map.permute(0, 2, 3, 1))
        standardiser = self.standardisers["patches"]
        assert isinstance(standardiser, Standardiser)
        with torch.autocast(tokens.device.type, enabled=False):
            wanted = self._decode("patches", raw["patches"], stored or self.stored, codecs)
            pair = (standardiser.inverse(features).permute(0, 3, 1, 2) for features in (tokens.float(), wanted))
            return next(pair), next(pair)

    def losses(
        self,
        output: StudentOutput,
        raw: Mapping[str, Tensor],
        step: Tensor | None = None,
        prompts: Tensor | None = None,
        stored: StoredFeatures | None = None,
    ) -> dict[str, Tensor]:
        """[B] float32 by part: each kind of feature, in training each loss that needs the queue, and with prompts masks.

        Args:
            raw, stored: as in `targets`.
            step: scalar int64 that selects the subset of patches to compare; None: all patches.
            prompts: random numbers of :func:`~pipeline.distill.masks.draws_shape`, [B, ...]; None: no masks are compared.
        """
        stored = stored or self.stored
        positions = stored.positions(step)
        predicted = self.predict(output, positions, stored)
        target = self.targets(raw, positions=positions, stored=stored)
        parts = self.image_losses(predicted, target)
        if self.queue is not None and self.training:
            entries = self.queue.entries()
            for name in self.queue_losses:
                loss = find_loss(name)
                parts[name] = loss(predicted["summary"], target["summary"], *entries, self.loss.temperature)
        if self.masks is not None and prompts is not None:
            parts["masks"], parts["mask_iou"] = self.masks(*self.embeddings(output, raw, stored=stored), prompts)
        return parts

    def image_losses(self, predicted: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """[B] float32 by kind: the weighted losses that need nothing but the image."""
        weights = {"patches": self.loss.patches, "summary": self.loss.summary}
        return {
            kind: image_loss(weights[kind], predicted[kind], target[kind], self.loss.temperature) for kind in predicted
        }

    def push_summaries(self, rows: Tensor, stored: StoredFeatures | None = None, present: Tensor | None = None) -> None:
        """Append a step's teacher summaries to the queue: [B, row_bytes] uint8 as stored, on the device, where `present` [B]."""
        assert self.queue is not None
        known = rows if present is None else rows[present.bool()]
        self.queue.push(self._decode("summary", known, stored or self.stored))


class Distiller(nn.Module):
    """Student and targets; its forward is the loss, so that one DDP wrapper sees every parameter.

    Args:
        standardisers, codecs: by teacher id, then by kind of feature.
        image_size: side of the student's input in pixels.
        decoders: SAM's, by the id of each teacher whose masks are compared.
    """

    weights: Tensor
    mixing: Tensor
    owners: Tensor

    def __init__(
        self,
        student: Student,
        teachers: Sequence[CachedTeacher],
        standardisers: Mapping[str, Mapping[str, Standardiser]],
        codecs: Mapping[str, Mapping[str, FeatureCodec]],
        image_size: int,
        hidden: int,
        loss: LossConfig,
        decoders: Mapping[str, SamMasks] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.student, self.loss = student, loss
        self.labels = teacher_labels(teachers)
        grid = feature_map_size(student, image_size)
        self.targets = nn.ModuleList(
            TeacherTarget(
                teacher,
                standardisers[teacher.id],
                codecs[teacher.id],
                student,
                grid,
                hidden,
                loss,
                decoders.get(teacher.id),
            )
            for teacher in teachers
        )
        self.register_buffer("weights", teacher_weights(teachers), persistent=False)
        self.parts, mixing = self._mixing_table()
        self.register_buffer("mixing", mixing, persistent=False)
        labels = [*self.labels.values()]
        owners = torch.tensor([labels.index(part.rsplit("/", 1)[0]) for part in self.parts])
        self.register_buffer("owners", owners, persistent=False)

    def _mixing_table(self) -> tuple[list[str], Tensor]:
        """All parts of the loss, those of training only last, and the factor of each weight [T, 3] in each part: [P, T, 3]."""
        rows = []
        for number, (label, target) in enumerate(self.labelled_targets()):
            kinds = [*target.heads, *(["masks"] if target.masks else [])]
            image = {kind: [float(kind == column) for column in LOSS_KINDS] for kind in kinds}
            for part, factors in (
                image | {name: [weight, 0.0, 0.0] for name, weight in target.queue_losses.items()}
            ).items():
                table = torch.zeros_like(self.weights)
                table[number] = torch.tensor(factors)
                rows.append((part not in target.heads, f"{label}/{part}", table))
        rows.sort(key=itemgetter(0))
        return [name for _, name, _ in rows], torch.stack([table for *_, table in rows])

    def add_size(
        self, side: int, teachers: Sequence[CachedTeacher], codecs: Mapping[str, Mapping[str, FeatureCodec]]
    ) -> None:
        """Take batches of another input size too.

        Args:
            side: of the student's input in pixels.
            teachers: as cached for it, in the order of the targets.
            codecs: as in the constructor.
        """
        grid = feature_map_size(self.student, side)
        for (_, target), teacher in zip(self.labelled_targets(), teachers, strict=True):
            target.add_size(side, teacher, codecs[teacher.id], grid)

    def labelled_targets(self) -> Iterator[tuple[str, TeacherTarget]]:
        """Every teacher's label and target."""
        for target in self.targets:
            assert isinstance(target, TeacherTarget)
            yield self.labels[target.teacher.id], target

    def targets_with_queue(self) -> list[TeacherTarget]:
        """The targets that keep past summaries."""
        return [target for _, target in self.labelled_targets() if target.queue is not None]

    def forward(
        self,
        pixels: Tensor,
        features: Mapping[str, Mapping[str, Tensor]],
        weights: Tensor | None = None,
        draws: Tensor | None = None,
        step: Tensor | None = None,
        prompts: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch.

        Args:
            pixels: [B, 3, H, W] uint8, of one of the input sizes.
            features: by teacher id and kind, [B, row_bytes] uint8 as stored for this size; with ``present`` [B], factors of the
                images' losses, 0 for images that the teacher is not asked about.
            weights: [T, 3], current weights of summary, patches and masks by teacher; None: the initial ones.
            draws: [B, T] uniform in [0, 1) for teacher dropping; None: no teacher is dropped.
            step: scalar int64, the step's number, which selects the patches to compare; None: all patches.
            prompts: [B, ...], as in :meth:`TeacherTarget.losses`, given whenever a teacher's masks are compared.

        Returns:
            The weighted total, and every unweighted part as ``<teacher's label>/<part>``, detached; also
            ``<teacher's label>/mask_iou``, the IoU of the masks compared, and with dropping ``<teacher's label>/kept``, the share
            of the images that kept the teacher.
        """
        output = self.student(pixels)
        weights = self.weights if weights is None else weights
        found: dict[str, Tensor] = {}
        for label, target in self.labelled_targets():
            stored = target.at(pixels.shape[-1])
            losses = target.losses(output, features[stored.teacher.id], step, prompts, stored)
            found |= {f"{label}/{part}": loss for part, loss in losses.items()}
        # Stacked: operations on each part alone would be many small kernels.
        stacked = torch.stack([found.pop(name) for name in self.parts if name in found], dim=1)
        asked = self._asked(features, pixels.shape[-1])
        # Without features a loss may be anything.
        shares = None if asked is None else asked.index_select(1, self.owners[: stacked.shape[1]])
        means = (stacked if shares is None else torch.where(shares > 0, shares * stacked, 0.0)).mean(dim=0)
        parts = dict(zip(self.parts, means.detach().unbind(), strict=False))
        parts |= {name: self._mean(measure, name, asked) for name, measure in found.items()}
        factors = (self.mixing[: len(means)] * weights).sum(dim=-1)
        if draws is None:
            return (means * factors.sum(dim=1)).sum(), parts
        totals = (stacked.unsqueeze(-1) * factors).sum(dim=1)
        coefficients = drop_coefficients(totals, weights.sum(dim=1), draws, self.loss.drop, asked)
        kept = (coefficients > 0).float()
        if asked is not None:
            kept, coefficients, totals = kept * asked, coefficients * asked, torch.where(asked > 0, totals, 0.0)
        kept = kept.mean(dim=0)
        parts |= {f"{label}/kept": share for label, share in zip(self.labels.values(), kept, strict=True)}
        return (coefficients * totals).sum(dim=1).mean(), parts

    def _mean(self, measure: Tensor, name: str, asked: Tensor | None) -> Tensor:
        """The mean of a measure [B] of a teacher over the images that it is asked about."""
        if asked is None:
            return measure.mean()
        factors = asked[:, [*self.labels.values()].index(name.rsplit("/", 1)[0])]
        return torch.where(factors > 0, factors * measure, 0.0).mean()

    def _asked(self, features: Mapping[str, Mapping[str, Tensor]], side: int) -> Tensor | None:
        """Factors [B, T] of every image's losses by teacher; None if all teachers have features of all images."""
        present = [features[target.at(side).teacher.id].get(PRESENT) for _, target in self.labelled_targets()]
        known = next((factors for factors in present if factors is not None), None)
        if known is None:
            return None
        whole = torch.ones_like(known, dtype=torch.float32)
        return torch.stack([whole if factors is None else factors.float() for factors in present], dim=1)


def _select(patches: Tensor, positions: Tensor | None) -> Tensor:
    return patches if positions is None else patches.flatten(1, 2).index_select(1, positions)


@torch.no_grad()
def feature_map_size(student: Student, image_size: int) -> tuple[int, int]:
    """(h, w) of the student's feature map for a square input.

    Raises:
        UserError: if the student does not accept such an input.
    """
    training, device = student.training, next(student.parameters()).device
    pixels = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8, device=device)
    try:
        height, width = student.eval()(pixels).feature_map.shape[-2:]
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"student.input_size: the student takes no {image_size} x {image_size} images: {one_line(error)}"
        ) from error
    student.train(training)
    return height, width
