"""A pair of chain models opened for the policy benchmarks: its problems, its base configuration, and runs that are kept.

Runs go to a folder that is keyed by all that they depend on, so that a benchmark can be made in slices and resumed.
"""

from __future__ import annotations

import hashlib
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

import telltale
from telltale.decode.calibration.calibration_report import PolicyRuns
from telltale.decode.calibration.labelers import AgreementLabeler, Drafted
from telltale.decode.calibration.trials import SamplingSettings, TrialStore, oracle, prompt_ids, run, with_config
from telltale.decode.step_verified import StepVerified, StepVerifiedConfig
from telltale.decode.verification import Step
from telltale.tasks import chains
from telltale.tasks.chain_checker import ChainLabeler

BASE = {"candidates": 8, "fallback": "plain", "max_step_tokens": 16}
SAMPLED = SamplingSettings(max_new_tokens=100, temperature=0.7, top_p=0.8)
GREEDY = SamplingSettings(max_new_tokens=100, temperature=0.0, top_p=None)
TEST_SEED, CALIBRATION_SEED = 910_001, 910_002
"""Of the generated problems; far from the seeds that models are trained on."""
LABELER = ChainLabeler()
JUDGE_ERROR = 0.15
"""How often the noisy judge is wrong about a step."""
REWARD_NOISE = 1.0
"""Standard deviation of the reward's noise; right and wrong steps lie 3 apart in logits."""

Verifier = Callable[[Sequence[Step]], list[float]]


@dataclass
class Pair:
    """One model seed: guard, test and calibration problems."""

    model_seed: int
    guard: StepVerified
    test: list[Any]
    calibration: list[Any]
    store: TrialStore
    batch: int = 125
    clock: dict[str, float] = field(default_factory=dict)
    """CPU seconds that each run took, whenever it was made."""

    def runs(
        self,
        name: str,
        seeds: Sequence[int],
        *,
        problems: Sequence[Any] | None = None,
        sampling: SamplingSettings = SAMPLED,
        verifier: Verifier | None = None,
        **changes: Any,
    ) -> PolicyRuns:
        """The base configuration with ``changes`` on the test problems (or others), once for each sampling seed."""
        config = replace(self.guard.config, **changes)
        started = time.perf_counter()
        guard = with_config(self.guard, config, verifier=verifier)
        found = [
            run(
                guard,
                self.test if problems is None else problems,
                LABELER,
                sampling=sampling,
                seed=seed,
                batch=self.batch,
                name=name if verifier is not None else "",
                store=self.store,
            )
            for seed in seeds
        ]
        spent = sum(one.cost["cpu_seconds"] for one in found)
        self.clock[name] = self.clock.get(name, 0.0) + spent
        print(
            f"model seed {self.model_seed}  {name:<46} {len(found)} x {len(found[0].trials)} problems  "
            f"accuracy {np.mean([one.accuracy for one in found]):.3f}  share {np.mean([one.target_share for one in found]):.3f}  "
            f"{spent:.0f} CPU s, {time.perf_counter() - started:.0f} s now",
            file=sys.stderr,
            flush=True,
        )
        threshold = config.threshold if config.policy in ("specguard", "verifier") else None
        return PolicyRuns(name, found, threshold)

    def oracle(self) -> Verifier:
        """Accepts what the checker finds right."""
        return oracle(self.test, LABELER, self.guard.tokenizer)

    def noisy_judge(self) -> Verifier:
        """The checker's verdict, turned round for 15% of the steps (always the same ones): a judge of known quality."""
        return self._noisy(lambda right, chance: float(right != (chance.random() < JUDGE_ERROR)))

    def noisy_reward(self) -> Verifier:
        """A process reward in (0, 1) with Gaussian noise on its logit (the same for the same step)."""

        def reward(right: bool, chance: np.random.Generator) -> float:
            logit = (1.5 if right else -1.5) + REWARD_NOISE * chance.normal()
            return float(1 / (1 + np.exp(-logit)))

        return self._noisy(reward)

    def regenerating_judge(self) -> Verifier:
        """1 if the target, greedily, writes the same step, else 0: a judge that costs a step of the target each time."""
        labeler = AgreementLabeler(
            self.guard.target, self.guard.tokenizer, max_step_tokens=self.guard.config.max_step_tokens
        )

        def judge(steps: Sequence[Step]) -> list[float]:
            asked = [Drafted(None, tuple(s.prompt), tuple(s.before), (), tuple(s.tokens), s.text) for s in steps]
            return [float(bool(label.right)) for label in labeler.label_all(asked)]

        return judge

    def _noisy(self, score: Callable[[bool, np.random.Generator], float]) -> Verifier:
        exact = self.oracle()

        def verify(steps: Sequence[Step]) -> list[float]:
            found = []
            for step, right in zip(steps, exact(steps), strict=True):
                text = f"{step.prompt_text}|{step.before_text}|{step.text}"
                digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
                found.append(score(right > 0.5, np.random.default_rng(int.from_bytes(digest, "big"))))
            return found

        return verify


def open_pair(
    models: Path, model_seed: int, *, test: int, calibration: int, store: Path, exit_layer: int | None = None
) -> Pair:
    """``models``/seed<n>/target and draft; with ``exit_layer``, ``models``/seed<n>/layerskip in both roles."""
    folder = models / f"seed{model_seed}"
    config = StepVerifiedConfig(**BASE, exit_layer=exit_layer)
    target, tokenizer = telltale.load(folder / ("target" if exit_layer is None else "layerskip"), dtype="float32")
    draft = telltale.load(folder / "draft", dtype="float32")[0] if exit_layer is None else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* layers to read attention from")
        guard = StepVerified(target, draft, tokenizer, config)
    return Pair(
        model_seed,
        guard,
        chains.generate(test, seed=TEST_SEED),
        chains.generate(calibration, seed=CALIBRATION_SEED),
        TrialStore(store),
    )


def prompts(pair: Pair, count: int) -> list[list[int]]:
    """Token ids of the first test problems."""
    return [prompt_ids(pair.guard.tokenizer, problem) for problem in pair.test[:count]]
