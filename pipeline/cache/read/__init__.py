"""What training reads from the cache."""
