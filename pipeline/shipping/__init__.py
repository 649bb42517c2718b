"""Models in the formats of other runtimes, in folders that explain themselves."""
