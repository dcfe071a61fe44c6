"""OGER: teachers' traces as a reference for exploration in reinforcement learning with a verifier (arXiv 2604.18530)."""
