"""Reward-model benchmarks from local files: RewardBench 1 and 2, RM-Bench, LLMBar, beside what length alone scores."""

from __future__ import annotations

from telltale.align.judge.evaluation.scores import WEIGHTS
from telltale.align.judge.evaluation.suites import SUITES, Evaluation, evaluate

__all__ = ["SUITES", "WEIGHTS", "Evaluation", "evaluate"]
