"""Verifying, repairing and tidying up what the cache holds."""
