"""Three ways to run a decoder's layers: the family's own modules, fused PyTorch, and a native step compiled on first use."""
