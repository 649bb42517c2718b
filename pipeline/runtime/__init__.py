"""What every job runs on: the Ray session, logs, metrics, progress, threads."""

from pipeline.runtime.compiler_import import defer_compiler

defer_compiler()
