"""The main job: one small model from training to fast decoding, and a report of what happened."""

from __future__ import annotations

from telltale.tour.tour import run_tour

__all__ = ["run_tour"]
