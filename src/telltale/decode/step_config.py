"""How steps are drafted, scored and accepted: one frozen configuration from which every policy is made.

Defaults are SpecGuard's (arXiv 2604.15244, section 4) where the paper gives them. Where it does not, the docs give the
reason for the default.

SpecGuard writes (l - l_min) / (l_max - l_min) for the normalised signals and does not define the extremes. Here
they are constants fitted on held-out steps (by :func:`telltale.decode.step_verified.calibrate`); the other readings have names.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from telltale.config import check_choice, check_integer, check_range
from telltale.errors import ConfigError
from telltale.signals.confidence import REDUCTIONS
from telltale.signals.grounding import LAST_LAYERS, ROWS

POLICIES = ("specguard", "target", "draft", "speculative", "random", "verifier")
SCORES = ("ensemble", "log-probability", "grounding", "agreement", "entropy", "likelihood-ratio")
FALLBACKS = ("k-sample", "plain", "spec")
SELECTORS = ("medoid", "majority", "log-probability", "first")
SAMPLES = 16
"""Candidates of a step when sampling (paper: n = 16)."""


NORMALISERS = ("minmax", "ecdf", "running", "group")
"""Fitted extremes, clipped; fitted quantiles; extremes of the steps so far of the same row; extremes of the candidates."""


@dataclass(frozen=True)
class Scale:
    """How one signal is mapped to [0, 1]: ``low`` and ``high`` for "minmax", sorted ``quantiles`` for "ecdf"."""

    low: float
    high: float
    quantiles: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_range("low", self.low)
        check_range("high", self.high)
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ConfigError(
                f"the scale {self.low!r}..{self.high!r} is degenerate; expected finite numbers, the first below the second."
            )
        if any(a > b for a, b in zip(self.quantiles, self.quantiles[1:], strict=False)):
            raise ConfigError("the quantiles of a scale are not sorted; expected them to rise.")

    def linear(self, value: float) -> float:
        """(value - low) / (high - low), clipped to [0, 1]."""
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))

    def rank(self, value: float) -> float:
        """The share of fitted values that are not above ``value``."""
        return bisect_right(self.quantiles, value) / len(self.quantiles)


LOG_PROBABILITY = Scale(-5.0, 0.0)
"""Of the smallest log-probability of a step, nats, before anything is fitted."""
GROUNDING = Scale(0.0, 1.0)
"""Of the smallest grounding of a step, before anything is fitted."""


@dataclass(frozen=True)
class Normaliser:
    """``kind`` of normalisation, and the scales of both signals. Uncalibrated scales are wide guesses: see ``fitted``."""

    kind: str = "minmax"
    log_probability: Scale = LOG_PROBABILITY
    grounding: Scale = GROUNDING
    fitted: bool = False
    """Whether the scales come from a calibration."""

    def __post_init__(self) -> None:
        check_choice("normaliser", self.kind, NORMALISERS)
        if self.kind == "ecdf" and not (self.log_probability.quantiles and self.grounding.quantiles):
            raise ConfigError("normaliser='ecdf' needs fitted quantiles of both signals; calibrate first.")

    def normalised(self, signal: str, value: float, *, among: Sequence[float] = ()) -> float:
        """``value`` of ``signal`` ("log_probability" or "grounding") in [0, 1].

        ``among``: what "running" and "group" take the extremes over, ``value`` included. If these are all the same there is
        no scale yet, and the value reads as 0.5.
        """
        scale: Scale = getattr(self, signal)
        if self.kind == "minmax":
            return scale.linear(value)
        if self.kind == "ecdf":
            return scale.rank(value)
        low, high = min(among), max(among)
        return 0.5 if low == high else (value - low) / (high - low)

    def to_dict(self) -> dict[str, Any]:
        """As JSON writes it."""
        return {
            "kind": self.kind,
            "fitted": self.fitted,
            "log_probability": _plain(self.log_probability),
            "grounding": _plain(self.grounding),
        }

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Normaliser:
        """What :meth:`to_dict` wrote. Raises :class:`~telltale.errors.ConfigError` for anything else."""
        try:
            scales = {
                name: Scale(
                    float(values[name]["low"]),
                    float(values[name]["high"]),
                    tuple(map(float, values[name]["quantiles"])),
                )
                for name in ("log_probability", "grounding")
            }
            return Normaliser(kind=values["kind"], fitted=bool(values["fitted"]), **scales)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"the normaliser cannot be read: {error}; expected what a calibration wrote.") from error


def _plain(scale: Scale) -> dict[str, Any]:
    return {"low": scale.low, "high": scale.high, "quantiles": list(scale.quantiles)}


@dataclass(frozen=True)
class StepVerifiedConfig:
    """How steps are drafted, scored, accepted and redone. Raises :class:`~telltale.errors.ConfigError` naming the field."""

    policy: str = "specguard"
    """"specguard": draft, score by ``score``, redo what is below ``threshold``. "target", "draft": one model alone. "speculative":
    token-level speculative sampling. "random": accept at ``accept_rate``. "verifier": a callable scores each step (a process
    reward model is RSD, a judge SpecReason, a checker the oracle)."""
    score: str = "ensemble"
    """"ensemble" is beta * normalised log-probability + (1 - beta) * normalised grounding; the others are raw signals."""
    threshold: float = 0.7
    """Accept iff score >= threshold; -inf always accepts. inf never does: nothing is drafted, the output is the target's."""
    beta: float = 0.3
    """Weight of log-probability in the ensemble; 1 never looks at attention, 0 never at logits."""
    candidates: int | None = None
    """Candidates of a step; None is 16 when sampling and 1 when greedy."""
    signal_model: str = "draft"
    """Whose log-probabilities and attention are read: "draft" (the paper's cost model: the target runs only to redo a step),
    or "target" (one parallel pass over the chosen step, whose keys and values the target needs anyway)."""
    fallback: str = "k-sample"
    """How the target redoes a step: "k-sample" draws as many candidates as the draft and selects (paper), "plain" one,
    "spec" one by exact token-level speculative sampling with fresh drafts."""
    selector: str = "medoid"
    """"medoid" (paper), "majority" (the most frequent), "log-probability" (the best signal), "first" (no selection)."""
    encoder: str = "hashed"
    """Name of a registered encoder of candidates, for the medoid."""
    row: str = "self"
    """Whose attention row a token's grounding is read from: its own, or that of the position that predicted it."""
    residual: float = 0.0
    """Share of the identity in each layer of the rollout."""
    grounding_layers: int | None = LAST_LAYERS
    """Last layers of the rollout; None takes all."""
    sparsify: float = 0.0
    """Attention weights of a head below this are dropped (paper: 0.01); 0 keeps all."""
    renormalise: bool = False
    """Whether what is left after dropping is divided by its sum."""
    exclude_sinks: int = 0
    """First tokens of the prompt that do not count as grounds (attention sinks)."""
    log_probability_reduce: str = "min"
    grounding_reduce: str = "min"
    debias: str = "none"
    """"position-ecdf" replaces each token's grounding by its rank among calibrated tokens at the same place in a step."""
    normaliser: Normaliser = field(default_factory=Normaliser)
    position_quantiles: tuple[tuple[float, ...], ...] = ()
    """For "position-ecdf": sorted groundings of calibrated tokens at each place, the last entry is used for all later ones."""
    delimiter: str = "\n\n"
    max_step_tokens: int = 256
    """Longest step. A draft that has not ended by then is rejected; the target's is kept and flagged as truncated."""
    repetition_limit: int | None = 8
    """Equal steps in a row after which an output of drafted steps ends with stop reason "repetition"; None lets it go on."""
    accept_rate: float | None = None
    """For the policy "random"."""
    exit_layer: int | None = None
    """With one model in both roles: layers 0..E-1 draft."""
    draft_length: int = 4
    """Tokens per round of token-level speculation."""
    record_signals: bool = False
    """Read every signal of both models at every drafted step, whatever the score needs: for reports and calibration."""

    def __post_init__(self) -> None:
        check_choice("policy", self.policy, POLICIES)
        check_choice("score", self.score, SCORES)
        if (
            isinstance(self.threshold, bool)
            or not isinstance(self.threshold, (int, float))
            or math.isnan(self.threshold)
        ):
            raise ConfigError(f"threshold={self.threshold!r} is not a number; expected one, inf and -inf included.")
        check_range("beta", self.beta, low=0.0, high=1.0)
        if self.candidates is not None:
            check_integer("candidates", self.candidates, low=1)
        check_choice("signal_model", self.signal_model, ("draft", "target"))
        check_choice("fallback", self.fallback, FALLBACKS)
        check_choice("selector", self.selector, SELECTORS)
        check_choice("row", self.row, ROWS)
        check_range("residual", self.residual, low=0.0, high=1.0)
        if self.grounding_layers is not None:
            check_integer("grounding_layers", self.grounding_layers, low=1)
        check_range("sparsify", self.sparsify, low=0.0, below=1.0)
        check_integer("exclude_sinks", self.exclude_sinks, low=0)
        check_choice("log_probability_reduce", self.log_probability_reduce, REDUCTIONS)
        check_choice("grounding_reduce", self.grounding_reduce, REDUCTIONS)
        check_choice("debias", self.debias, ("none", "position-ecdf"))
        self._check_kinds()
        if self.debias == "position-ecdf" and not self.position_quantiles:
            raise ConfigError("debias='position-ecdf' needs position_quantiles; calibrate first.")
        if not isinstance(self.delimiter, str) or not self.delimiter:
            raise ConfigError(f"delimiter={self.delimiter!r}; expected the text that ends a step.")
        check_integer("max_step_tokens", self.max_step_tokens, low=1)
        if self.repetition_limit is not None:
            check_integer("repetition_limit", self.repetition_limit, low=2)
        if self.policy == "random":
            check_range("accept_rate", self.accept_rate, low=0.0, high=1.0)
        if self.exit_layer is not None:
            check_integer("exit_layer", self.exit_layer, low=1)
        check_integer("draft_length", self.draft_length, low=1)
        if self.normaliser.kind == "group":
            if self.policy != "specguard":
                raise ConfigError(
                    f"normaliser='group' was given for policy={self.policy!r}, which reads no signals; use 'specguard'."
                )
            if self.signal_model == "target":
                raise ConfigError(
                    "normaliser='group' reads every candidate's signals, the target scores only one; use draft."
                )

        if self.candidates == 1 and self.compares_candidates:
            raise ConfigError(self.needs_candidates("candidates=1"))

    def _check_kinds(self) -> None:
        """Check fields that a command line or a file could give another type."""
        for name in ("renormalise", "record_signals"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r} is not allowed; expected true or false.")
        if not isinstance(self.encoder, str):
            raise ConfigError(f"encoder={self.encoder!r} is not allowed; expected the name of an encoder.")
        if not isinstance(self.normaliser, Normaliser):
            raise ConfigError(
                f"normaliser={self.normaliser!r} is not allowed; expected a Normaliser, such as Normaliser(kind='running')."
            )
        tables = self.position_quantiles
        if not isinstance(tables, tuple) or not all(isinstance(table, tuple) and table for table in tables):
            raise ConfigError("position_quantiles is not allowed; expected tuples of numbers, none of them empty.")

    @property
    def compares_candidates(self) -> bool:
        """Whether the score of a step is made from its candidates, so that a single one has none."""
        if self.policy != "specguard":
            return False
        return self.score == "agreement" or (self.score == "ensemble" and self.normaliser.kind == "group")

    def needs_candidates(self, given: str) -> str:
        """The error for ``given``, which leaves a single candidate where :attr:`compares_candidates` needs several."""
        what = "score='agreement'" if self.score == "agreement" else "normaliser='group'"
        return (
            f"{what} compares candidates, and {given} leaves one; expected candidates >= 2 and a temperature above 0."
        )

    @property
    def reads_log_probability(self) -> bool:
        """Whether accepting depends on token log-probabilities of the signal model."""
        if self.policy != "specguard":
            return False
        return self.score in ("log-probability", "likelihood-ratio") or (self.score == "ensemble" and self.beta > 0)

    @property
    def reads_grounding(self) -> bool:
        """Whether accepting depends on attention."""
        if self.policy != "specguard":
            return False
        return self.score == "grounding" or (self.score == "ensemble" and self.beta < 1)

    @property
    def whole_rows(self) -> bool:
        """Whether grounding needs whole attention rows: dropped weights and sinks make prefix rows lose mass."""
        return (self.reads_grounding or self.record_signals) and (self.sparsify > 0 or self.exclude_sinks > 0)

    @property
    def target_scores(self) -> bool:
        """Whether the target reads each chosen step before it is accepted."""
        if self.record_signals:
            return self.drafts
        if self.policy != "specguard" or self.score == "agreement":
            return False
        return self.signal_model == "target" or self.score == "likelihood-ratio"

    @property
    def effective_threshold(self) -> float:
        """What a score must reach: the threshold; for the policy "random" what leaves ``accept_rate`` of uniform numbers."""
        return self.threshold if self.accept_rate is None or self.policy != "random" else 1.0 - self.accept_rate

    def accepts(self, score: float | None) -> bool:
        """Whether a step with this score passes; without one it does not, and nothing reaches a threshold of infinity."""
        return score is not None and self.effective_threshold < math.inf and score >= self.effective_threshold

    @property
    def never_accepts(self) -> bool:
        """Whether no drafted step can pass, so that every step is the target's."""
        if self.policy == "random":
            return self.accept_rate == 0.0
        return self.policy in ("specguard", "verifier") and self.threshold == math.inf

    @property
    def drafts(self) -> bool:
        """Whether steps are drafted at all. Drafts that cannot be accepted are made only to record their signals."""
        return self.policy not in ("target", "speculative") and (self.record_signals or not self.never_accepts)

    @property
    def streams_tokens(self) -> bool:
        """Whether every token is final at once, so that no step is waited for."""
        return not self.drafts

    def samples(self, *, greedy: bool) -> int:
        """Candidates of a step."""
        if greedy:
            return 1
        return SAMPLES if self.candidates is None else self.candidates

    def redone_samples(self, *, greedy: bool) -> int:
        """Candidates of a step that the target redoes; one where it redoes all of them, since the output is its own then."""
        return self.samples(greedy=greedy) if self.fallback == "k-sample" and not self.never_accepts else 1


def paper(**overrides: Any) -> StepVerifiedConfig:
    """The paper's main run: 16 candidates, beta 0.3, threshold 0.7; sample with temperature 0.7 and top_p 0.8."""
    return StepVerifiedConfig(**({"candidates": SAMPLES} | overrides))
