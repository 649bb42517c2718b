"""Images as pixels: decoding, geometry, and pools that do both ahead of use."""
