"""Parameters, MACs, memory and latency of networks side by side."""
