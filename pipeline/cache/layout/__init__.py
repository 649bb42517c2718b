"""What lies where in the cache, and what it means."""
