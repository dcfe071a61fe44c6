"""Alignment: judges whose score can be read, and rewards for exploration."""
