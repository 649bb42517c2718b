"""Images as pixels: decoding, view geometry, and the pool that does both ahead of use."""
