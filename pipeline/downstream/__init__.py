"""What a backbone is worth afterwards: classification, semantic segmentation, detection."""
