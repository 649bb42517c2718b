"""Where runs are tracked."""

from pydantic import Field

from pipeline.config.tree import Section


class TrackingConfig(Section):
    """MLflow."""

    uri: str | None = Field(None, description="tracking URI; none: MLFLOW_TRACKING_URI, else SQLite in the work folder")
    experiment: str = Field("regla-distill", description="MLflow experiment")
