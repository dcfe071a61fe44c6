"""A judge with named objectives, a gate that weighs them by the prompt, and a score that adds up (arXiv 2406.12845)."""
