"""The files of the cache: names, formats and meaning."""
