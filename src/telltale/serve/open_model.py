"""From checkpoints on disk to what is served: the models, how they decode together, and in words what was chosen and why."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from telltale.config import check_choice
from telltale.decode.costs_report import TUNING_ROWS, tune
from telltale.decode.decoders import StepVerified
from telltale.decode.method import METHODS, MethodOptions, StepMethod
from telltale.decode.planner import Plans
from telltale.decode.sampling import Sampling
from telltale.decode.step_config import StepVerifiedConfig
from telltale.errors import ConfigError
from telltale.models.loading import load
from telltale.models.open import open_decoder

if TYPE_CHECKING:
    from telltale.decode.calibration.calibration import Calibration
    from telltale.decode.calibration.monitor import GuardMonitor
    from telltale.decode.verification import Step

    Checker = Callable[[Step], bool | None]

Automatic = int | None
"""None is "auto"."""


@dataclass(frozen=True)
class ServedModel:
    """``decode``: one of :data:`~telltale.decode.method.METHODS`. ``about``: what was chosen and why, for ``/v1/models``."""

    name: str
    decoder: StepVerified
    decode: str
    about: dict[str, Any] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))
    calibration: Calibration | None = None
    """What the decoder's configuration was calibrated for, if it was."""
    shared: bool = True
    """Whether others in this process hold the models and may write into their weights; ``telltale serve`` is alone with them."""

    def __post_init__(self) -> None:
        if not self.name or not self.name.isprintable():
            raise ConfigError(f"name={self.name!r}; expected a name that clients can send.")

    @property
    def context(self) -> int:
        """Positions of the shorter model: prompt and answer together."""
        return min(decoder.max_positions for decoder in self._decoders)

    @property
    def tokens(self) -> int:
        """Token ids below this can be in a prompt: both models embed them."""
        sizes = [int(decoder.parts.embedding.weight.shape[0]) for decoder in self._decoders]
        return min([self.decoder.vocabulary, *sizes])

    @property
    def eos(self) -> list[int]:
        """Tokens that end an answer: the generation configuration's, or the tokenizer's if it names none."""
        defaults = getattr(self.decoder.target.model, "generation_config", None)
        found = getattr(defaults, "eos_token_id", None)
        if found is None:
            found = getattr(self.decoder.tokenizer, "eos_token_id", None)
        if found is None:
            return []
        return [int(token) for token in found] if isinstance(found, (list, tuple)) else [int(found)]

    def covered(self, config: StepVerifiedConfig, sampling: Sampling, prompt: Sequence[int]) -> bool:
        """Whether the calibration's promise holds for an answer: its configuration, its sampling, its form of prompts, and nothing
        overridden."""
        if self.calibration is None:
            return False
        form = self.calibration.prompts
        if form is not None and not form.covers(prompt):
            return False
        asked = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        calibrated = self.calibration.sampling
        # Clients send top_p = 1 for no top_p.
        same = all(
            calibrated.get(name) == value or {calibrated.get(name), value} == {None, 1.0}
            for name, value in asked.items()
        )
        return same and config == self.calibration.config

    @property
    def fingerprint(self) -> str:
        """Changes when the configuration that answers does; the same seed means the same answer as long as it stays."""
        target = self.decoder.target
        parts = [self.name, self.decode, self.decoder.config, target.backend, target.dtype, target.device]
        return "fp_" + hashlib.blake2b(repr(parts).encode(), digest_size=6).hexdigest()

    def entry(self) -> dict[str, Any]:
        """As ``/v1/models`` lists it."""
        about = {"decode": self.decode, "policy": self.decoder.config.policy, "context": self.context} | self.about
        if self.calibration is not None:
            one = self.calibration
            about["calibration"] = {
                "method": one.method,
                "risk": one.risk,
                "alpha": one.alpha,
                "problems": one.n,
                "labeler": one.labeler,
                "coverage": None if one.coverage is None else dict(one.coverage),
                "prompts": None if one.prompts is None else one.prompts.describe(),
                "sampling": dict(one.sampling),
                "feasible": one.feasible,
            }
        about |= self.promises()
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "telltale",
            "telltale": about,
        }

    def promises(self) -> dict[str, list[str]]:
        """What answers keep to, and what nobody has promised of them, in words."""
        exact, config = self.decoder.target.exact, self.decoder.config
        promised = [
            "a text does not depend on whether it is streamed, nor on what was read before",
            "the same seed gives the same text" + (", bit for bit" if exact else ", up to rounding at near-ties"),
        ]
        open_ = []
        if not config.drafts:
            own = "every token is the model's own"
            if config.policy == "speculative":
                own += ": drafts change neither the greedy text" + ("" if exact else ", up to rounding at near-ties,")
                own += " nor the distribution of sampled ones"
            promised.append(own)
        elif self.calibration is None or not self.calibration.feasible:
            open_.append(
                "how often an accepted step is worse than the model's own: nothing is calibrated for these models"
            )
        else:
            one = self.calibration
            promised.append(
                f"{one.risk} risk up to {one.alpha:g} by {one.method}, judged by {one.labeler}, for the calibration's own sampling "
                f"and form of prompts; an answer that it covers says calibrated: true"
            )
            open_.append("the calibration's risk for other prompts, sampling or settings than its own")
        open_ += ["that an answer is right", "the same text from another backend, data type or machine"]
        return {"promised": promised, "not_promised": open_}

    @property
    def _decoders(self) -> list[Any]:
        return [self.decoder.target] if self.decoder.draft is None else [self.decoder.target, self.decoder.draft]


def open_monitor(
    served: ServedModel,
    *,
    share: float,
    by: str = "target",
    limit: float | None = None,
    on_drift: str = "withdraw",
    seed: int = 0,
) -> tuple[GuardMonitor, Checker | None]:
    """The monitor of a served guard, and the checker for audits ``by`` "gsm8k" (marked arithmetic; None for the "target").

    ``limit`` None is the calibration's alpha, where that is about steps and labelled in the same way: by a checker, or by the
    target's agreement. Raises :class:`~telltale.errors.ConfigError` if the model drafts no steps, or for options that do not go
    together.
    """
    from telltale.decode.calibration.monitor import GuardMonitor

    check_choice("by", by, AUDITORS)
    found = served.calibration
    if not served.decoder.config.drafts:
        raise ConfigError("audits are of drafted steps, and this server drafts none; leave --audit-share out.")
    if limit is None and found is not None and found.risk == "steps":
        agreement = "Agreement" in found.labeler
        limit = found.alpha if agreement == (by == "target") else None
    if limit is None and on_drift == "raise":
        raise ConfigError(
            "--on-drift raise needs a limit, and no calibration gives one for these audits; give --audit-limit."
        )
    monitor = GuardMonitor(
        share=share,
        kind="disagreement" if by == "target" else "wrong",
        limit=limit,
        thresholds=[] if found is None else [one.threshold for one in found.tried if one.threshold > found.threshold],
        on_drift=on_drift,
        unknown="skip" if found is None else found.unknown,
        seed=seed,
    )
    return monitor, None if by == "target" else _marked_arithmetic


AUDITORS = ("target", "gsm8k")
"""Who audits accepted steps: the target, which may disagree, or the arithmetic that is marked as in GSM8K, which may be wrong."""


def _marked_arithmetic(step: Step) -> bool | None:
    """Whether the marked calculations of a step hold; without a reference that is all that can be checked."""
    from telltale.tasks.gsm8k import Problem
    from telltale.tasks.gsm8k_checker import check_step

    return check_step(Problem(step.prompt_text, ""), step.accepted, step.text).right


def open_served(
    model: str | Path,
    *,
    draft: str | Path | None = None,
    guard: str | Path | None = None,
    decode: str | None = None,
    exit_layer: Automatic = None,
    draft_length: Automatic = None,
    drafter: str | None = None,
    settings: Mapping[str, Any] | None = None,
    name: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    weights: str | None = None,
    backend: str = "auto",
) -> ServedModel:
    """Open the checkpoint ``model`` and describe how it decodes.

    ``decode`` None is "step-verified" with a ``draft`` or a ``guard`` (a calibration's file), else "autoregressive". ``exit_layer``
    and ``draft_length`` are for drafts by the model's own first layers; what is None is chosen by :func:`tune` for
    "self-speculative", and greedy answers go on adapting it. ``drafter`` is for "self-speculative", too: "exit" (None), "ngram"
    (drafts copied from the text) or "both". ``settings``: fields of :class:`~telltale.decode.step_verified.StepVerifiedConfig` for
    "step-verified". Raises :class:`~telltale.errors.ConfigError` for options that do not go together, and what
    :func:`telltale.load` raises.
    """
    if decode is None:
        decode = "autoregressive" if draft is None and guard is None else "step-verified"
    check_choice("decode", decode, METHODS)
    options = MethodOptions(
        exit_layer=exit_layer,
        draft_length=draft_length,
        drafter=drafter,
        draft=draft,
        guard=guard,
        settings=settings or {},
    )
    options.check(decode)
    method = StepMethod.of(options) if decode == "step-verified" else None
    loaded, tokenizer = load(model, dtype=dtype, device=device, weights=weights)
    name = Path(model).resolve().name if name is None else name
    if decode == "autoregressive":
        plain = StepVerified(loaded, None, tokenizer, StepVerifiedConfig(policy="target"), backend=backend)
        return ServedModel(name, plain, decode, _about(plain, "every token by the whole model"))
    if method is None:
        return _self_speculative(name, loaded, tokenizer, exit_layer, draft_length, drafter or "exit", backend)
    opened = method.open(loaded, tokenizer, draft, dtype=dtype, device=device, weights=weights, backend=backend)
    return _step_verified(name, opened, method.calibration, None if draft is None else Path(draft).resolve().name)


def _self_speculative(
    name: str,
    model: Any,
    tokenizer: Any,
    exit_layer: Automatic,
    draft_length: Automatic,
    drafter: str,
    backend: str,
) -> ServedModel:
    decoder = open_decoder(model, backend=backend)
    config = StepVerifiedConfig(policy="speculative", exit_layer=exit_layer)
    if draft_length is not None:
        config = replace(config, draft_length=draft_length)
    plans = Plans(
        decoder,
        "auto" if exit_layer is None else exit_layer,
        "auto" if draft_length is None else draft_length,
        drafter,
    )
    about: dict[str, Any] = {"drafter": drafter}
    pays = True
    if plans.fixed:
        words = "drafts as given, verified token by token"
    elif drafter == "ngram":
        words = "drafts copied from the text, verified token by token"
    else:
        tuned = tune(decoder, tokenizer, exit_layer=exit_layer, draft_length=draft_length)
        config = replace(config, exit_layer=tuned.exit_layer, draft_length=tuned.draft_length)
        about |= {"predicted_speedup": round(tuned.predicted, 3), "measured_speedup": round(tuned.measured, 3)}
        words = tuned.describe()
        pays = exit_layer is not None or tuned.pays
        if not pays and drafter == "exit":
            config = replace(config, policy="target")
            words = f"no exit pays, so every token is by the whole model; the best was {words}"
    plan = plans.plan(1) if plans.fixed else plans.by_size((1, TUNING_ROWS))
    opened = StepVerified(decoder, None, tokenizer, config, plan=plan)
    return ServedModel(name, opened, "self-speculative", _about(opened, words) | about)


def _step_verified(name: str, opened: StepVerified, calibration: Calibration | None, draft: str | None) -> ServedModel:
    config = opened.config
    drafted = draft or f"the first {config.exit_layer} layers"
    words = f"steps of {drafted}, accepted by {config.score} at {config.threshold:g}"
    if config.policy != "specguard":
        words = f"the policy {config.policy!r}, drafts of {drafted}"
    elif calibration is None:
        words += ", which is not calibrated for these models"
    else:
        words += f", calibrated for {calibration.risk} risk {calibration.alpha:g} ({calibration.method})"
        if not calibration.feasible:
            words += ": no threshold kept it, so nothing is accepted"
    return ServedModel(name, opened, "step-verified", _about(opened, words) | {"draft": draft}, calibration=calibration)


def _about(opened: StepVerified, words: str) -> dict[str, Any]:
    config = opened.config
    found: dict[str, Any] = {
        "chosen": words,
        "backend": opened.target.backend,
        "dtype": str(opened.target.dtype).removeprefix("torch."),
        "weights": opened.target.weight_format,
        "layers": opened.target.layers,
    }
    if config.exit_layer is not None:
        found |= {"exit_layer": config.exit_layer, "draft_length": config.draft_length}
    if config.policy == "specguard":
        threshold = config.threshold if abs(config.threshold) != float("inf") else str(config.threshold)
        found |= {
            "score": config.score,
            "threshold": threshold,
            "candidates": config.samples(greedy=False),
        }
    return found
