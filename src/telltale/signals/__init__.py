"""Pure functions of tensors and numbers: what a model's outputs and derivatives say about it. No input or output."""
