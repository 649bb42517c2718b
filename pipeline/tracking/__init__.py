"""MLflow: every run, metric, lineage and model. The only package that imports it."""

import os

# MLflow reads these at import: no telemetry, and a server that does not answer fails soon.
for _name, _value in {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "4",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # Large files go in parts, directly to the store behind the server if that store supports it, else through the server.
    "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "true",
    "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "true",
}.items():
    os.environ.setdefault(_name, _value)
