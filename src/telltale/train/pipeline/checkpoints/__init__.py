"""Saving a pipeline and going on: parts per stage, exact resume, other plans, export."""
