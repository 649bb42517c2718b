"""MLflow: every run, metric, lineage and model. The only package that imports it."""

from __future__ import annotations

import os

# Read when MLflow is imported: no telemetry, and a server that does not answer is an error soon.
for _name, _value in {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "4",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # Large files in parts, straight to the store behind the server where that store can do it, and through it elsewhere.
    "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "true",
    "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "true",
}.items():
    os.environ.setdefault(_name, _value)
