"""Folders, local or in an object store, by URI."""
