"""What decides over a step: one frozen configuration of one loop, from which every policy is made.

Defaults are SpecGuard's (arXiv 2604.15244, section 4) where the paper gives them. Where it does not, the option has a name and the
docs say why its default is what it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from telltale.config import check_choice, check_integer, check_range
from telltale.decode.step_verified.normalising import Normaliser
from telltale.errors import ConfigError
from telltale.signals.confidence import REDUCTIONS
from telltale.signals.grounding import LAST_LAYERS, ROWS

POLICIES = ("specguard", "target", "draft", "speculative", "random", "verifier")
SCORES = ("ensemble", "log-probability", "grounding", "agreement", "entropy", "likelihood-ratio")
FALLBACKS = ("k-sample", "plain", "spec")
SELECTORS = ("medoid", "majority", "log-probability", "first")
SAMPLES = 16
"""Candidates of a step when sampling (paper: n = 16)."""


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
    """Accept iff score >= threshold; inf never accepts, -inf always."""
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
    """For "position-ecdf": sorted groundings of calibrated tokens at each place, the last entry standing for all later ones."""
    delimiter: str = "\n\n"
    max_step_tokens: int = 256
    """Longest step. A draft that has not ended by then is rejected; the target's is kept and flagged as truncated."""
    repetition_limit: int | None = 8
    """Equal steps in a row after which an output ends with stop reason "repetition"; None lets it go on."""
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
        """Fields that text from a command line or a file could fill with something of another kind."""
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
        """The sentence that refuses ``given``, which leaves one candidate to :attr:`compares_candidates`."""
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
    def bar(self) -> float:
        """What a score must reach: the threshold; for the policy "random" what leaves ``accept_rate`` of uniform numbers."""
        return self.threshold if self.accept_rate is None or self.policy != "random" else 1.0 - self.accept_rate

    def accepts(self, score: float | None) -> bool:
        """Whether a step with this score passes; without one it does not, and nothing reaches a threshold of infinity."""
        return score is not None and self.bar < math.inf and score >= self.bar

    @property
    def drafts(self) -> bool:
        """Whether steps are drafted at all."""
        return self.policy not in ("target", "speculative")

    @property
    def streams_tokens(self) -> bool:
        """Whether tokens are final as soon as they are there, so that no step has to be waited for."""
        return not self.drafts

    def samples(self, *, greedy: bool) -> int:
        """Candidates of a step."""
        if greedy:
            return 1
        return SAMPLES if self.candidates is None else self.candidates


def paper(**overrides: Any) -> StepVerifiedConfig:
    """The paper's main run: 16 candidates, beta 0.3, threshold 0.7; sample with temperature 0.7 and top_p 0.8."""
    return StepVerifiedConfig(**({"candidates": SAMPLES} | overrides))
