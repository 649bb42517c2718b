"""Location of a job's cache."""

from __future__ import annotations

from pipeline.cache.config import CacheJobConfig
from pipeline.errors import naming
from pipeline.runs.folder import work_folder
from pipeline.storage.store import Store


def cache_store(config: CacheJobConfig) -> Store:
    """The folder or object store of the cache.

    Raises:
        UserError: if the object store cannot be used.
    """
    with naming("cache.uri"):
        store = Store.at(config.cache.uri or work_folder(config) / "cache")
        store.check()
    return store
