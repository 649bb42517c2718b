"""Students and fine-tuned models as files for other runtimes."""
