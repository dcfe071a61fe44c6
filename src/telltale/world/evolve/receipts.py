"""A gate's receipt: what was checked of one candidate, on which evidence, against which incumbent, and with which outcome.

A receipt is sealed by a hash of its content and written to the registry's log whether it passed or not, so that the error
which a family of candidates may spend is counted over all who tried. A registry promotes on nothing else.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from telltale.errors import TelltaleError
from telltale.runs.files import strict_json
from telltale.world.evolve.chain import digest

PASS, FAIL, SKIPPED = "pass", "fail", "not run"


class PromotionRefused(TelltaleError):
    """A version may not become active; says what is missing."""


class ApprovalMissing(PromotionRefused):
    """All that a version lacks is a person's word."""


@dataclass(frozen=True)
class Check:
    """One check: ``status`` pass, fail or not run (an earlier one failed), why, and the figures that decided it."""

    status: str
    reason: str
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Receipt:
    """One trial of a candidate. ``trial`` counts all trials of the registry from 1, ``alpha`` is what this one may spend.

    ``evidence``: ids of the gate's transitions; ``batches``: where they are kept; ``sources``: who supplied them. ``settings``:
    of the gate. ``seal`` is set by :meth:`sealed`.
    """

    candidate: str
    incumbent: str
    trial: int
    alpha: float
    checks: dict[str, Check]
    evidence: list[str]
    batches: list[str]
    sources: list[str]
    settings: dict[str, Any] = field(default_factory=dict)
    seal: str = ""

    @property
    def passed(self) -> bool:
        """Whether there were checks, and each passed."""
        return bool(self.checks) and all(check.status == PASS for check in self.checks.values())

    def failed(self) -> list[str]:
        """Names of the checks that failed."""
        return [name for name, check in self.checks.items() if check.status == FAIL]

    def content(self) -> dict[str, Any]:
        """JSON values without the seal."""
        return {key: value for key, value in asdict(self).items() if key != "seal"}

    def sealed(self) -> Receipt:
        """The same with its seal, its figures as a log keeps them: JSON has no infinite numbers."""
        checks = {name: Check(c.status, c.reason, strict_json(c.figures)) for name, c in self.checks.items()}
        clean = replace(self, checks=checks)
        return replace(clean, seal=digest(clean.content()))

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Receipt:
        """The receipt of a log entry. Raises :class:`PromotionRefused` if the seal is not that of the content."""
        checks = {name: Check(**check) for name, check in document["checks"].items()}
        found = cls(**{**document, "checks": checks})
        check_seal(found)
        return found


def check_seal(receipt: Receipt) -> None:
    """Raise :class:`PromotionRefused` unless the receipt is as it was sealed."""
    if receipt.seal != digest(receipt.content()):
        raise PromotionRefused(
            f"the receipt for {receipt.candidate[:12]} was changed after it was sealed; let a gate judge the candidate again."
        )


REQUIRED = ("independence", "gain", "interventions", "regression", "laws", "robustness", "asr")
"""Checks without which a receipt promotes nothing."""


def spent(trial: int, alpha: float) -> float:
    """What the ``trial``-th candidate (from 1) may spend: alpha * 6 / (pi^2 trial^2), which sums to alpha over all trials."""
    return alpha * 6 / (math.pi**2 * trial**2)


def overspent(receipt: Receipt) -> bool:
    """Whether a receipt took more error than its trial may, by the alpha that its gate's settings state."""
    return receipt.trial < 1 or (
        "alpha" in receipt.settings and receipt.alpha > 1.000001 * spent(receipt.trial, receipt.settings["alpha"])
    )
