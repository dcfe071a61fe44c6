"""A judge that needs no files: a small backbone trained here, fitted on generated preferences whose labels favour length.

The paper starts from a reward model. Here a small Llama learns, on generated problems, to continue solutions and to predict their
ratings through a readout that is then dropped. Everything follows from one seed, on one core, in about two minutes.

The data are rated solutions of arithmetic chains; the task's checker computes every objective from the text. Half of the prompts
ask for brevity, so that what counts depends on the prompt. The labels of the pairs add a bonus for length, which the true
preference does not have.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from telltale.align.judge.data import Conversation, Pair, Ratings, Scale, label_matrix
from telltale.align.judge.features import extract, last_token, pad_id, padded, pair_conversations, pair_features
from telltale.align.judge.fitting import JudgeFit, fit, gate_accuracy
from telltale.align.judge.gate_fit import PairFeatures
from telltale.align.judge.head import GateConfig
from telltale.align.judge.judge import Judge
from telltale.align.judge.model import JudgeConfig, JudgeModel
from telltale.align.judge.templates import encode, template_pattern
from telltale.config import check_integer
from telltale.models.presets import build
from telltale.runs.progress import ProgressBar
from telltale.tasks.chain_checker import ERRORS, check_solution, corrupted
from telltale.tasks.chains import DELIMITER, Problem, generate
from telltale.tasks.chains import tokenizer as chain_tokenizer

NUISANCE = "verbosity"
GATE = GateConfig(hidden=64, layers=2, temperature=1.0, learning_rate=3e-3, steps=1000, batch_size=256)
LONGEST_TEXT = 256
RATE, BATCH, STEPS = 3e-3, 24, 900
OBJECTIVES = ("correct", "valid", "complete", "concise", "readable", "verbosity")
BRIEF = "please be brief ."
FULL = "please show every step ."
FILLER = ("so", "now", "let", "us", "look", "at", "this", "with", "care", "and", "go", "on")
EXTRA_WORDS = (*BRIEF.split(), *FULL.split(), *FILLER)
STEPS_PER_PROBLEM = (2, 3)
LONGEST = 80
"""Words from which a response's verbosity is 1."""
CONFOUND = 0.8
"""What the labels add for verbosity."""
SHORTER = 0.25
"""Difference of verbosity from which a pair counts as one of unequal lengths."""


def embedded_default(
    out: str | Path,
    *,
    prompts: int = 400,
    steps: int = STEPS,
    preset: str = "nano",
    scope: str = "within-prompt",
    method: str = "spearman",
    how: str = "sequential",
    intercept: bool = False,
    gate: GateConfig | None = None,
    seed: int = 0,
    progress: ProgressBar | None = None,
) -> EmbeddedDefault:
    """Train the backbone for ``steps``, compute features of generated responses in the folder ``out``, fit and compare.

    Problems for the backbone, the ratings, the preferences and the comparison are all different ones. The judge is not saved.
    """
    check_integer("prompts", prompts, low=20)
    check_integer("steps", steps, low=1)
    tokenizer = chain_tokenizer([*EXTRA_WORDS, ";"])
    backbone = trained_backbone(tokenizer, preset=preset, steps=steps, seed=seed, progress=progress)
    config = JudgeConfig(context_length=LONGEST_TEXT)
    folder = Path(out)
    known = rated(responses(prompts, seed=4 * seed + 1), seed=seed)
    features = extract(backbone, tokenizer, known.conversations, folder / "ratings", config, batch_size=32).load()
    sets = {
        "preferences": preferences(responses(prompts, seed=4 * seed + 2), seed=seed),
        "unseen": preferences(responses(max(20, prompts // 2), seed=4 * seed + 3), seed=seed, confound=0.0),
    }
    pairs = {
        name: pair_features(
            extract(backbone, tokenizer, pair_conversations(found), folder / name, config, batch_size=32).load()
        )
        for name, found in sets.items()
    }
    fitted = fit(
        features,
        known.labels,
        OBJECTIVES,
        preferences=pairs["preferences"],
        nuisances=(NUISANCE,),
        scope=scope,
        method=method,
        how=how,
        intercept=intercept,
        gate=gate or GATE,
        seed=seed,
    )
    model = JudgeModel.assembled(
        backbone,
        fitted.head,
        scales=known.scales,
        gating_pattern=template_pattern(tokenizer),
        context_length=LONGEST_TEXT,
        calibration=fitted.report.calibration.to_config(),
    )
    shorter = torch.tensor([_words(pair.chosen) < _words(pair.rejected) - SHORTER * 80 for pair in sets["unseen"]])
    return EmbeddedDefault(Judge(model, tokenizer), fitted, _accuracies(fitted, pairs["unseen"], shorter))


@dataclass(frozen=True)
class EmbeddedDefault:
    """The judge, its fit, and accuracies on pairs of unseen problems labelled by the true preference."""

    judge: Judge
    fit: JudgeFit
    accuracies: dict[str, dict[str, float]]
    """By model: over all pairs, and over those whose better response is clearly the shorter one ("shorter is better")."""


def trained_backbone(
    tokenizer: Any, *, preset: str = "nano", steps: int = STEPS, seed: int = 0, progress: ProgressBar | None = None
) -> Any:
    """A small Llama without its language-model head, trained on responses to problems of its own."""
    model = build(preset, vocabulary_size=len(tokenizer), seed=seed).train()
    data = responses(1500, seed=4 * seed)
    config = JudgeConfig(context_length=LONGEST_TEXT)
    rows = [encode(tokenizer, [*r.prompt, {"role": "assistant", "content": r.text}], config).ids for r in data]
    targets = torch.tensor([[r.ratings[name] for name in OBJECTIVES] for r in data])
    deviation = targets.std(0).clamp_min(1e-3)
    targets = (targets - targets.mean(0)) / deviation
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        readout = nn.Linear(model.config.hidden_size, len(OBJECTIVES))
    optimizer = torch.optim.AdamW([*model.parameters(), *readout.parameters()], lr=RATE, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    pad = pad_id(tokenizer)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        chosen = torch.randint(len(rows), (BATCH,), generator=generator)
        loss = _loss(model, readout, [rows[index] for index in chosen.tolist()], targets[chosen], pad)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if progress is not None:
            progress.update(step + 1, f"backbone, loss {float(loss.detach()):.3f}")
    return model.eval().model


@dataclass(frozen=True)
class Response:
    """One solution with what it is worth."""

    problem: Problem
    brief: bool
    text: str
    ratings: dict[str, float]

    @property
    def prompt(self) -> list[dict[str, str]]:
        """The user's turn."""
        return [{"role": "user", "content": f"{self.problem.prompt} {BRIEF if self.brief else FULL}"}]

    @property
    def worth(self) -> float:
        """The true preference: right, and in the style that is asked for: no idle words, or all steps on lines of their own."""
        rated = self.ratings
        style = rated["concise"] if self.brief else 0.5 * rated["complete"] + 0.5 * rated["readable"]
        return 0.5 * rated["correct"] + 0.5 * rated["valid"] + 1.5 * style


def responses(prompts: int, *, seed: int, per_prompt: int = 6) -> list[Response]:
    """``per_prompt`` different responses to each of ``prompts`` problems, prompt after prompt."""
    chance = random.Random(f"responses {seed}")
    found = []
    for problem in generate(prompts, seed=seed, steps=STEPS_PER_PROBLEM):
        brief = chance.random() < 0.5
        texts: list[str] = []
        while len(texts) < per_prompt:
            text = _text(problem, chance)
            if text not in texts:
                texts.append(text)
        found += [Response(problem, brief, text, rate(problem, text)) for text in texts]
    return found


def rate(problem: Problem, text: str) -> dict[str, float]:
    """Every objective of a response, in [0, 1]."""
    words = [word for word in text.replace(DELIMITER, f" {DELIMITER} ").split(" ") if word]
    spoken = [word for word in words if word != DELIMITER]
    body = " ".join(word for word in words if word not in FILLER)
    verdict = check_solution(problem, body.replace(f"; {DELIMITER}", DELIMITER).replace(" ;", f" {DELIMITER}"))
    breaks = words.count(DELIMITER)
    joints = breaks + words.count(";")
    return {
        "correct": float(verdict.correct),
        "valid": sum(step.right for step in verdict.steps) / max(1, len(verdict.steps)),
        "complete": verdict.complete,
        "concise": sum(word not in FILLER for word in spoken) / max(1, len(spoken)),
        "readable": breaks / joints if joints else 1.0,
        "verbosity": min(1.0, len(spoken) / LONGEST),
    }


def rated(found: Sequence[Response], *, missing: float = 0.2, seed: int = 0) -> Ratings:
    """Ratings of responses with a share of them missing at random, as people leave them."""
    chance = random.Random(f"missing {seed}")
    rows = [{name: value for name, value in r.ratings.items() if chance.random() >= missing} for r in found]
    conversations = [
        Conversation(f"response {index}", [*r.prompt, {"role": "assistant", "content": r.text}])
        for index, r in enumerate(found)
    ]
    scales = {name: Scale() for name in OBJECTIVES}
    return Ratings(conversations, label_matrix(rows, scales), scales)


def preferences(found: Sequence[Response], *, seed: int, confound: float = CONFOUND) -> list[Pair]:
    """Pairs of responses to one prompt, the better one by the true worth plus ``confound`` times verbosity."""
    chance = random.Random(f"pairs {seed}")
    by_prompt: dict[str, list[Response]] = {}
    for response in found:
        by_prompt.setdefault(response.problem.prompt, []).append(response)
    pairs: list[Pair] = []
    for group in by_prompt.values():
        order = chance.sample(group, len(group))
        for first, second in zip(order[0::2], order[1::2], strict=False):
            gain = first.worth - second.worth + confound * (first.ratings["verbosity"] - second.ratings["verbosity"])
            if abs(gain) < 1e-9:
                continue
            better, worse = (first, second) if gain > 0 else (second, first)
            pairs.append(Pair(f"pair {len(pairs)}", better.prompt, better.text, worse.text))
    return pairs


def _loss(model: Any, readout: nn.Linear, rows: Sequence[Sequence[int]], targets: Tensor, pad: int) -> Tensor:
    """Next token, and the ratings from the last token's state."""
    ids, mask = padded(rows, pad=pad, device="cpu")
    states = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
    logits = model.lm_head(states[:, :-1])
    labels = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    words = functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=-100)
    return words + functional.mse_loss(readout(last_token(states, mask)), targets)


def _accuracies(fitted: JudgeFit, pairs: PairFeatures, shorter: Tensor) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for name, rows in (("all", torch.ones_like(shorter)), ("shorter is better", shorter)):
        if not bool(rows.any()):
            continue
        part = pairs.take(rows)
        for model, value in (
            {"gate": gate_accuracy(fitted.head, part)} | fitted.baselines.accuracies(fitted.head, part)
        ).items():
            found.setdefault(model, {})[name] = value
    return found


def _words(text: str) -> int:
    return len(text.split())


def _text(problem: Problem, chance: random.Random) -> str:
    steps = problem.steps
    if chance.random() < 0.5:
        steps = corrupted(problem, chance.choice([e for e in ERRORS if e != "order"]), chance).split(f" {DELIMITER} ")
    if chance.random() < 0.25:
        steps = [*steps[: chance.randrange(len(steps) - 1)], steps[-1]]
    joint = ";" if chance.random() < 0.25 else DELIMITER
    if chance.random() < 0.5:
        steps = [" ".join([*chance.choices(FILLER, k=chance.randrange(4, 14)), step]) for step in steps]
    return f" {joint} ".join(steps)
