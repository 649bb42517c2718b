"""How good a backbone is: frozen, under a vote of neighbours or a linear layer, and what it costs."""
