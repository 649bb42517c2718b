"""The fields that all jobs share."""

from pydantic import Field

from pipeline.config.tree import JobRoot, operational
from pipeline.sources.config import DataConfig, scenes_of_any_seed
from pipeline.tracking.config import TrackingConfig
from pipeline.training.config import TrainConfig


class JobConfig(JobRoot):
    """The fields of every job."""

    name: str = operational("distill", description="name of the run")
    work: str | None = operational(
        None, description="folder for cache, runs and MLflow; none: ./work, or ~/regla-distill in a submitted job"
    )
    outputs: str | None = operational(
        None, description="folder or s3://, gs:// address for copies of a finished run's results; none: no copies"
    )
    seed: int = Field(0, ge=0, description="seed of initial weights, data order and generated scenes")
    tracking: TrackingConfig = operational(TrackingConfig())
    debug: bool = operational(
        False,
        description="whether to compute in the job's own process, without Ray, for breakpoints and plain tracebacks",
    )

    def title(self, job: str) -> str:
        """The title of a run: subject, seed, recipe and job; what differs between runs comes first, as lists cut the rest."""
        return " ".join([*self.subject(), f"seed{self.seed}", f"{self.name}-{job}"])

    def note(self, job: str) -> list[str]:
        """The description of a run, as paragraphs of Markdown."""
        return [f"**{self.title(job)}**", *self.details()]

    def subject(self) -> list[str]:
        """What the job works on, for titles."""
        return []

    def details(self) -> list[str]:
        """Paragraphs of a run's note, after its title."""
        return []

    def inputs(self) -> dict[str, str]:
        """Locations of images and weights that the job reads, by field; a URI is the same on every node."""
        return {}

    def name_held_out(self, identity: str) -> str:
        """The name of the held-out images with this identity, by which accuracies are compared."""
        return identity

    def shared_folders(self) -> dict[str, str]:
        """Folders and addresses that the job's processes share in addition to `work`, by field."""
        return {}

    def trainings(self) -> dict[str, TrainConfig]:
        """The settings of each training of a run, by the folder of its checkpoints in the run's."""
        return {}


class ImageJobConfig(JobConfig):
    """A job on images."""

    data: DataConfig = DataConfig()

    def details(self) -> list[str]:
        """The images."""
        held_out = f"{self.data.share:g} of them" if self.data.share else f"`{self.data.held_out or 'none'}`"
        return [f"Images: `{self.data.train}`, held out: {held_out}."]

    def inputs(self) -> dict[str, str]:
        """Images that are not generated."""
        locations = {"data.train": self.data.train, "data.val": self.data.held_out}
        return {field: location for field, location in locations.items() if location not in (None, "samples")}

    def name_held_out(self, identity: str) -> str:
        """The identity; as many generated scenes of one size count as one set, whichever seed made them."""
        scenes = self.data.samples
        return scenes_of_any_seed(scenes.val, scenes.size) if self.data.held_out == "samples" else identity
