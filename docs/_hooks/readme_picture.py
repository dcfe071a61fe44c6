"""Draws the picture of the README from the committed results: ``python docs/_hooks/readme_picture.py``."""

from __future__ import annotations

from pathlib import Path

from layerskip import plain_sizes

if __name__ == "__main__":
    plain_sizes().svg(Path(__file__).parents[1] / "assets" / "tokens_per_second.svg")
