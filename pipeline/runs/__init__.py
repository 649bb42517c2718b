"""A job under MLflow, its run folder, and what it leaves behind."""
