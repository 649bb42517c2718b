"""Typed configuration: sections next to the code that they configure, recipes, overrides."""
