"""Typed configuration: sections that stand beside the code that they configure, recipes, overrides."""
