"""Computing what the cache lacks."""
