"""Foundation models as teachers. Imports nothing of the pipeline."""
