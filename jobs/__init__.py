"""Entry points: parse the configuration, call the pipeline, print a summary."""
