"""How good a backbone is without training anything on top."""
