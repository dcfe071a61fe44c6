"""The GSM8K reader, segmenter and step checker on all of the public text, no model needed.

Round trip of every solution's bytes; what the checker says of reference solutions, where a wrong verdict is its own mistake; and on
the four real model solutions of each test problem, whether a wrong step before the answer goes with a wrong answer. Intervals are
percentiles of a bootstrap over problems, because the four solutions of one problem are not independent. ``--data`` is the folder
with ``train.jsonl``, ``test.jsonl`` and ``example_model_solutions.jsonl`` of openai/grade-school-math.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from measurement import write_result
from telltale.tasks.gsm8k import AnsweredProblem, Problem, linewise, read, read_model_solutions, segment, stepwise
from telltale.tasks.gsm8k_checker import ERRORS, SolutionVerdict, Verdict, check_solution

RESAMPLES = 2000
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    data = parser.parse_args().data
    splits = {name: read(data / f"{name}.jsonl") for name in ("train", "test")}
    answered = read_model_solutions(data / "example_model_solutions.jsonl")
    started = time.process_time()
    gold = {name: reference(problems) for name, problems in splits.items()}
    models = model_solutions(answered)
    write_result(
        "gsm8k_realism",
        round_trip={name: round_trip([p.solution for p in problems]) for name, problems in splits.items()}
        | {"model solutions": round_trip([a.solution for item in answered for a in item.answers])},
        reference=gold,
        model_solutions=models,
        checker_cpu_seconds=time.process_time() - started,
        bootstrap={"resamples": RESAMPLES, "seed": SEED, "unit": "problem"},
    )


def round_trip(texts: Sequence[str]) -> dict[str, int]:
    """How many texts come back byte for byte from their steps."""
    exact = sum(linewise("\n\n".join(segment(stepwise(text)))).encode() == text.encode() for text in texts)
    return {"solutions": len(texts), "exact": exact, "bytes": sum(len(text.encode()) for text in texts)}


def reference(problems: Sequence[Problem]) -> dict[str, Any]:
    """Coverage and verdicts on reference solutions: every step is right there, or nearly."""
    verdicts = [check_solution(problem, stepwise(problem.solution)) for problem in problems]
    kinds = Counter(step.kind for verdict in verdicts for step in verdict.steps)
    computing = kinds["marked"] + kinds["unmarked"]
    return {
        "problems": len(problems),
        "steps": dict(kinds),
        "marked_share_of_computing_steps": kinds["marked"] / computing,
        "verdicts": tally(verdicts),
        "solutions_with_a_wrong_step": sum(verdict.wrong > 0 for verdict in verdicts),
        "solutions_with_an_untraced_operand": sum(verdict.untraced > 0 for verdict in verdicts),
        "answers_extracted_and_equal": sum(verdict.correct for verdict in verdicts),
    }


def model_solutions(answered: Sequence[AnsweredProblem]) -> dict[str, Any]:
    """Verdicts against the dataset's own ``is_correct``."""
    names = [answer.model for answer in answered[0].answers]
    flags = np.array([[answer.correct for answer in item.answers] for item in answered])
    verdicts = [
        [check_solution(item.problem, stepwise(answer.solution)) for answer in item.answers] for item in answered
    ]
    flat = [verdict for row in verdicts for verdict in row]
    agreed = np.array([[verdict.correct for verdict in row] for row in verdicts]) == flags
    found: dict[str, Any] = {
        "problems": len(answered),
        "solutions": len(flat),
        "correct": int(flags.sum()),
        "answer_agrees_with_is_correct": int(agreed.sum()),
        "steps": dict(Counter(step.kind for verdict in flat for step in verdict.steps)),
        "verdicts": tally(flat),
    }
    # The verdict on an answer's own line knows the true answer, so it has no say here.
    rules: dict[str, Callable[[SolutionVerdict], bool]] = {
        "a wrong step": lambda verdict: any(step.right is False for step in _computing(verdict)),
        "an untraced operand": lambda verdict: verdict.untraced > 0,
        "a wrong step or an untraced operand": lambda verdict: any(
            step.right is False or bool(step.untraced) for step in _computing(verdict)
        ),
    } | {f"a wrong step: {error}": _has(error) for error in ERRORS if error != "grounding"}
    for name, rule in rules.items():
        suspect = np.array([[rule(verdict) for verdict in row] for row in verdicts])
        found[name] = association(suspect, flags)
    found["a wrong step, by model"] = {
        model: table(
            np.array([rules["a wrong step"](row[index]) for row in verdicts]),
            flags[:, index],
        )
        for index, model in enumerate(names)
    }
    return found


def tally(verdicts: Sequence[SolutionVerdict]) -> dict[str, int]:
    """Steps by verdict: "right", "open", and each error."""
    steps = [step for verdict in verdicts for step in verdict.steps]
    return dict(
        Counter("right" if s.right else "open" if s.right is None else str(s.error) for s in steps).most_common()
    )


def association(suspect: np.ndarray, correct: np.ndarray) -> dict[str, Any]:
    """The 2x2 table with phi and odds ratio, and their 95% intervals from resampled problems (rows)."""
    chance = np.random.default_rng(SEED)
    draws = []
    for _ in range(RESAMPLES):
        rows = chance.integers(len(suspect), size=len(suspect))
        draws.append(_strength(suspect[rows], correct[rows]))
    low, high = np.percentile(np.array(draws), [2.5, 97.5], axis=0)
    phi, odds = _strength(suspect, correct)
    return table(suspect, correct) | {
        "phi": phi,
        "phi_interval": [low[0], high[0]],
        "odds_ratio_of_a_wrong_answer": math.exp(odds),
        "odds_ratio_interval": [math.exp(low[1]), math.exp(high[1])],
    }


def table(suspect: np.ndarray, correct: np.ndarray) -> dict[str, Any]:
    """Counts, and how often the answer is correct with and without suspicion."""
    cells = {
        "suspect_and_incorrect": int((suspect & ~correct).sum()),
        "suspect_and_correct": int((suspect & correct).sum()),
        "clean_and_incorrect": int((~suspect & ~correct).sum()),
        "clean_and_correct": int((~suspect & correct).sum()),
    }
    rates = {
        "correct_if_suspect": float(correct[suspect].mean()) if suspect.any() else None,
        "correct_if_clean": float(correct[~suspect].mean()),
    }
    return cells | rates


def _strength(suspect: np.ndarray, correct: np.ndarray) -> tuple[float, float]:
    """Phi of suspicion with a wrong answer, and the log odds ratio, half a case added to each cell."""
    bad, good = int((suspect & ~correct).sum()), int((suspect & correct).sum())
    missed, passed = int((~suspect & ~correct).sum()), int((~suspect & correct).sum())
    scale = math.sqrt(float((bad + good) * (missed + passed)) * float((bad + missed) * (good + passed)))
    phi = (bad * passed - good * missed) / scale if scale else 0.0
    return phi, math.log((bad + 0.5) * (passed + 0.5) / ((good + 0.5) * (missed + 0.5)))


def _has(error: str) -> Callable[[SolutionVerdict], bool]:
    return lambda verdict: any(step.error == error for step in _computing(verdict))


def _computing(verdict: SolutionVerdict) -> list[Verdict]:
    return [step for step in verdict.steps if step.kind != "answer"]


if __name__ == "__main__":
    main()
