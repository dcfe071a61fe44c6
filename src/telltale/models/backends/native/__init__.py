"""The native decoder step: one small C++ source, compiled on first use, that runs Llama-like layers at memory speed."""
