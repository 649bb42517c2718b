"""What every job runs on: the Ray session, logs, metrics, progress, threads."""
