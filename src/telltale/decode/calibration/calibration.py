"""What a calibration found, as a file: the configuration to run, what it promises, and which pair of models it holds for."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from telltale.config import check_choice, check_integer, check_range, from_mapping
from telltale.decode.calibration.prompts import PromptForm
from telltale.decode.calibration.risk import RealisedRisk, Tried
from telltale.decode.calibration.trials import UNKNOWN
from telltale.decode.decoders import StepVerified
from telltale.decode.step_config import Normaliser, StepVerifiedConfig
from telltale.errors import CalibrationError, ConfigError, TelltaleError
from telltale.models.loading import model_fingerprint, tokenizer_fingerprint
from telltale.runs.files import strict_json, write_json

FORMAT = 2
METHODS = ("crc", "ltt")
RISKS = ("steps", "accuracy-drop")


@dataclass(frozen=True)
class Calibration:
    """A calibrated configuration. ``config`` is ready to use; :meth:`guard` uses it on the models it was made for."""

    config: StepVerifiedConfig
    method: str
    """"crc" or "ltt"."""
    risk: str
    """"steps": accepted and wrong; "accuracy-drop": right answers lost against the target alone."""
    alpha: float
    """The bound of the risk."""
    loss: str
    """For "steps", the loss of a problem: "mean" or "any"."""
    unknown: str
    """How steps that the labeler could not judge were counted: "skip", "wrong" or "right"."""
    confidence: float | None
    """Probability that the risk is below alpha, for "ltt"; "crc" bounds the expected loss."""
    n: int
    """Problems that the threshold was chosen on."""
    fingerprints: Mapping[str, str | None]
    """Of "target", "draft" (None if the target's first layers draft) and "tokenizer", its chat template included."""
    prompts: PromptForm | None = None
    """How problems were put to the models; prompts of another form are not covered. None: made by hand, for any form."""
    labeler: str = ""
    """Who said which steps are right, and how."""
    coverage: Mapping[str, float] | None = None
    """What the labeler saw of mistakes (:class:`~telltale.decode.calibration.trials.Coverage`); None if answers were not judged."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """How steps were sampled; other settings are not covered."""
    seed: int = 0
    tried: tuple[Tried, ...] = ()
    """The thresholds at which the policy was run, in order."""
    realised: RealisedRisk | None = None
    """On the check problems; None if there were none, or nothing is ever accepted."""
    answers: Mapping[str, float] | None = None
    """For "accuracy-drop", on the same problems: "target", "policy", "drop", "problems"."""
    signals: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """AUROC for right steps at fixed length, on pilot problems, of each signal that the score reads."""
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        check_choice("risk", self.risk, RISKS)
        check_range("alpha", self.alpha, low=0.0, high=1.0)
        check_choice("loss", self.loss, ("mean", "any"))
        check_choice("unknown", self.unknown, UNKNOWN)
        check_integer("n", self.n, low=1)
        for name in ("target", "draft", "tokenizer"):
            given = self.fingerprints.get(name)
            if not isinstance(given, str) and (given is not None or name != "draft"):
                raise ConfigError(f"the fingerprint of the {name} is {given!r}; expected its digits.")

    @property
    def threshold(self) -> float:
        """Accept iff score >= threshold; inf accepts nothing."""
        return self.config.threshold

    @property
    def feasible(self) -> bool:
        """Whether any threshold kept the promise; otherwise the target writes everything."""
        return self.threshold < math.inf

    def guard(self, target: Any, draft: Any, tokenizer: Any, **options: Any) -> StepVerified:
        """A :class:`StepVerified` of these models under ``config``, after :meth:`check`; options as for that class."""
        opened = StepVerified(target, draft, tokenizer, self.config, **options)
        self.check(opened)
        return opened

    def check(self, decoder: StepVerified) -> None:
        """Raise :class:`~telltale.errors.CalibrationError`, naming what differs, unless ``decoder`` has the calibrated models."""
        found = fingerprints_of(decoder)
        for name, here in found.items():
            there = self.fingerprints.get(name)
            if here == there:
                continue
            if name == "draft" and None in (here, there):
                wanted = "the target's first layers" if there is None else "a draft model"
                raise CalibrationError(
                    f"the calibration was made with {wanted} drafting, which is not what was given; calibrate for this pair."
                )
            raise CalibrationError(
                f"the {name} is not the one that was calibrated ({_also(name)}"
                f"fingerprint {_short(here)}, calibrated {_short(there)}); give "
                f"that one, or calibrate for this pair."
            )
        if decoder.draft is None and decoder.exit_layer != self.config.exit_layer:
            raise CalibrationError(
                f"exit_layer={decoder.exit_layer} was given, exit_layer={self.config.exit_layer} was calibrated; calibrate for it."
            )

    def save(self, path: str | Path) -> Path:
        """Write the calibration as JSON, whole or not at all. Raises :class:`~telltale.errors.CheckpointError`."""
        document = self.to_dict()
        write_json(path, document | {"digest": _digest(document)})
        return Path(path)

    def to_dict(self) -> dict[str, Any]:
        """As :meth:`save` writes it, the digest aside: infinite numbers are texts, "inf" and "-inf"."""
        found: dict[str, Any] = {"telltale_calibration": FORMAT, "threshold": self.threshold, "beta": self.config.beta}
        found |= {one.name: getattr(self, one.name) for one in fields(self)}
        found["config"] = config_to_dict(self.config)
        found["prompts"] = None if self.prompts is None else asdict(self.prompts)
        strict: dict[str, Any] = strict_json(found, infinity_as_text=True)
        return strict

    @staticmethod
    def load(path: str | Path) -> Calibration:
        """Read what :meth:`save` wrote. Raises :class:`~telltale.errors.CalibrationError` for anything else, edits included.

        :meth:`check` compares the models.
        """
        file = Path(path)
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise CalibrationError(
                f"{file} cannot be read: {error.strerror}; expected a calibration (JSON)."
            ) from error
        except (ValueError, RecursionError) as error:
            raise CalibrationError(f"{file} is not valid JSON: {error}.") from error
        if not isinstance(raw, dict) or raw.get("telltale_calibration") != FORMAT:
            raise CalibrationError(
                f"{file} is no calibration of format {FORMAT}; expected what `telltale specguard calibrate` writes."
            )
        try:
            return _from_dict(raw)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            reason = str(error) if isinstance(error, TelltaleError) else f"{type(error).__name__} {error}"
            raise CalibrationError(f"{file} cannot be used: {reason}") from error


def fingerprints_of(decoder: StepVerified) -> dict[str, str | None]:
    """Of the target, the draft (None if it is part of the target) and the tokenizer."""
    return {
        "target": model_fingerprint(decoder.target.model),
        "draft": None if decoder.draft is None else model_fingerprint(decoder.draft.model),
        "tokenizer": tokenizer_fingerprint(decoder.tokenizer),
    }


def config_to_dict(config: StepVerifiedConfig) -> dict[str, Any]:
    """``config`` in plain values."""
    found = {one.name: getattr(config, one.name) for one in fields(config)}
    return found | {
        "normaliser": config.normaliser.to_dict(),
        "position_quantiles": [list(table) for table in config.position_quantiles],
    }


def config_from_dict(values: Mapping[str, Any]) -> StepVerifiedConfig:
    """What :func:`config_to_dict` gave. Raises :class:`~telltale.errors.ConfigError` for unknown or bad fields."""
    found = dict(values)
    found["normaliser"] = Normaliser.from_dict(found.get("normaliser", {}))
    found["position_quantiles"] = tuple(tuple(map(float, table)) for table in found.get("position_quantiles", ()))
    found["threshold"] = _number(found.get("threshold"))
    return from_mapping(StepVerifiedConfig, found)


def _from_dict(raw: dict[str, Any]) -> Calibration:
    tried = tuple(Tried(**(one | {"threshold": _number(one["threshold"])})) for one in raw["tried"])
    prints = raw["fingerprints"]
    if not isinstance(prints, dict) or not all(isinstance(prints.get(name), str) for name in ("target", "tokenizer")):
        raise ConfigError("it names no fingerprints of target and tokenizer; expected both.")
    config = config_from_dict(raw["config"])
    found = Calibration(
        config=config,
        method=str(raw["method"]),
        risk=str(raw["risk"]),
        alpha=float(raw["alpha"]),
        loss=str(raw["loss"]),
        unknown=str(raw["unknown"]),
        confidence=None if raw["confidence"] is None else float(raw["confidence"]),
        n=int(raw["n"]),
        fingerprints=prints,
        prompts=None if raw["prompts"] is None else PromptForm.from_dict(raw["prompts"]),
        labeler=str(raw["labeler"]),
        coverage=raw["coverage"],
        sampling=dict(raw["sampling"]),
        seed=int(raw["seed"]),
        tried=tried,
        realised=None if raw["realised"] is None else RealisedRisk(**raw["realised"]),
        answers=raw["answers"],
        signals=dict(raw["signals"]),
        warnings=tuple(map(str, raw["warnings"])),
    )
    # Last, so that an error about a value comes first.
    if _digest({name: value for name, value in raw.items() if name != "digest"}) != raw["digest"]:
        raise ConfigError("its contents do not match its digest; expected a file that was not edited.")
    return found


def _digest(document: Mapping[str, Any]) -> str:
    """32 hexadecimal digits of a file's contents: the promise holds for these numbers only."""
    return hashlib.blake2b(json.dumps(document, sort_keys=True).encode(), digest_size=16).hexdigest()


def _number(value: Any) -> float:
    """A number, or "inf" or "-inf", which JSON has no numbers for."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ConfigError(f"threshold={value!r} is not a number; expected one, or 'inf'.")
    return float(value)


def _also(name: str) -> str:
    """What a fingerprint covers besides what its name says."""
    return "its chat template counts, too; " if name == "tokenizer" else ""


def _short(digest: str | None) -> str:
    return "none" if digest is None else digest[:12]
