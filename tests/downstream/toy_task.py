"""A downstream task that lives in the tests alone: regression of the mean colour of an image."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor, resize

from pipeline.config.tree import Section
from pipeline.downstream.base import Column, DownstreamTask, ExportForm, Report, device_of, evenly
from pipeline.downstream.images import SourceImages, open_split
from pipeline.downstream.pictures import caption


class MeanColourConfig(Section):
    """Regression of the mean colour."""

    hidden: int = Field(8, ge=1, description="channels of the hidden layer of the head")
    notes: str | None = Field(None, description="a file that nothing reads")


class ColourBatch(NamedTuple):
    """images float32 [B, 3, S, S] RGB in [0, 1]."""

    keys: list[str]
    images: Tensor


class MeanColour(DownstreamTask[MeanColourConfig]):
    """Predicts the mean of red, green and blue."""

    name, headline, section = "mean_colour", "r2", MeanColourConfig
    locations = ("notes",)
    columns = (
        Column("r2", "colour_r2", "R2 of the colour", unit="", digits=2),
        Column("error", "colour_error", "colour error", unit="levels", factor=255.0, higher_is_better=False),
    )

    def open(self, split, classes=()):
        source = open_split(self.config, split)
        return None if source is None else SourceImages(source)

    def build(self, encoder, classes):
        hidden = self.settings.hidden
        return nn.Sequential(encoder, nn.Linear(encoder.dim, hidden), nn.ReLU(), nn.Linear(hidden, 3))

    def batch(self, examples, draws):
        rows = [draw.row for draw in draws]
        images = torch.cat([self._shown(pil_to_tensor(image)) for image in examples.images(rows)])
        return ColourBatch([examples.key(row) for row in rows], images)

    def loss(self, module, batch, device):
        images = batch.images.to(device)
        return F.mse_loss(module(images).float(), images.mean((2, 3))), {}

    @torch.inference_mode()
    def evaluate(self, model, examples, worker):
        own = []
        for row in worker.own_rows(len(examples)):
            image = pil_to_tensor(examples.images([row])[0])
            own.append((self.predict(model, [image], ())[0], image.float().mean((1, 2)) / 255))
        found, true = (torch.stack(colours) for colours in zip(*worker.all_gather_objects(own), strict=True))
        residual = (found - true).square().sum() / (true - true.mean(0)).square().sum()
        metrics = {"r2": float(1 - residual), "error": float((found - true).abs().mean())}
        pictures = {}
        for row in evenly(len(examples), self.config.finetune.pictures) if worker.rank == 0 else []:
            image = pil_to_tensor(examples.images([row])[0])
            pictures[examples.key(row)] = self.draw(image, self.predict(model, [image], ())[0], ())
        return Report(metrics, pictures=pictures)

    def predict(self, model, images, classes):
        return [model(self._shown(image).to(device_of(model)))[0].float().cpu() for image in images]

    def draw(self, image, result, classes):
        return caption(image / 255, [f"mean colour: {', '.join(f'{value:.2f}' for value in result)}"])

    def describe(self, image, result, classes, folder, stem):
        return {"colour": result.tolist()}

    def export_form(self, model):
        return ExportForm("colour", "mean colour of the image, RGB in [0, 1]")

    def _shown(self, image):
        side = self.config.student.input_size
        return resize(image, [side, side], antialias=True)[None].float() / 255


class WithoutExport(MeanColour):
    """The same, which is not exported."""

    def export_form(self, model):
        return None


class Clash(MeanColour):
    """A task with the name of another section."""

    name = "train"
