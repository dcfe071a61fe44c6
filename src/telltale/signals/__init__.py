"""Pure tensor functions: what a model tells. No input or output, no Transformers import."""
