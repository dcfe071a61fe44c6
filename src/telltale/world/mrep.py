"""The minimal reproducible evaluation package (MREP; arXiv 2604.22748, appendix E.6), which the paper proposes.

A bundle is a folder: ``manifest.json`` (versions, hashes, settings, seeds), ``traces/`` (one JSON line per step: observation,
action, prediction, outcome, law verdicts, the engine's receipt), ``stats.json`` (interquartile mean, intervals, profile, tail),
``failures.json`` (taxonomy), ``coverage.json`` (what was tested), ``certificate.json``, ``card.md`` and ``page.html``. Numbers are
written so that they read back bit for bit.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from telltale.errors import MissingExtraError
from telltale.runs.files import atomic_directory
from telltale.world.card import card, page
from telltale.world.failures import RULES, failures
from telltale.world.metrics import bootstrap, iqm, performance_profile, worst_decile
from telltale.world.worlds.base import World

VERSION = 1
MANIFEST = "manifest.json"


def write_bundle(
    evaluation: Any,
    path: str | Path,
    *,
    certificate: Any = None,
    model: Any = None,
    parent: str | None = None,
    evidence: list[str] | None = None,
    purpose: str = "plan in the world that it names, by the planner that it names",
) -> Path:
    """Write the bundle of ``evaluation`` to ``path``, whole or not at all.

    ``certificate`` adds the conditions, the oracle arm and, with ``model``, the failure taxonomy. ``parent`` and ``evidence`` are
    ids for a model that was revised. ``page.html`` needs Plotly; without it the card says that the page is missing.

    Raises :class:`~telltale.errors.CheckpointError` if it cannot be written.
    """
    world = evaluation.world
    found = failures(certificate, model, world) if certificate is not None and model is not None else []
    documents: dict[str, Any] = {
        "stats.json": statistics_of([trace_rows(world, record) for record in evaluation.records], evaluation.successes),
        "failures.json": {"rules": RULES, "failures": [asdict(failure) for failure in found],
                          "taxonomy": "applied" if certificate is not None and model is not None else "not applied"},
        "coverage.json": coverage_of(world, certificate),
    }  # fmt: skip
    if certificate is not None:
        documents["certificate.json"] = {**certificate.summary(), "curves": curves(certificate)}
    with atomic_directory(path) as folder:
        (folder / "traces").mkdir()
        for number, record in enumerate(evaluation.records):
            lines = [json.dumps(row) for row in trace_rows(world, record)]
            head = json.dumps({"seed": record.episode.seed, "success": record.success})
            (folder / "traces" / f"episode-{number:04d}.jsonl").write_text("\n".join([head, *lines]) + "\n")
        for name, document in documents.items():
            (folder / name).write_text(json.dumps(document, indent=1) + "\n")
        missing_page = None
        try:
            page(evaluation, certificate, found).save(folder / "page.html")
        except MissingExtraError as error:
            missing_page = str(error)
        (folder / "card.md").write_text(card(evaluation, certificate, found, missing_page))
        manifest = _manifest(evaluation, certificate, model, parent, evidence, purpose)
        manifest["files"] = {
            str(file.relative_to(folder)): file_hash(file) for file in sorted(folder.rglob("*")) if file.is_file()
        }
        manifest["seal"] = seal(manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return Path(path)


def _manifest(
    evaluation: Any, certificate: Any, model: Any, parent: str | None, evidence: list[str] | None, purpose: str
) -> dict[str, Any]:
    world = evaluation.world
    return {
        "version": VERSION,
        "world": {
            "id": world.id, "settings": world.settings(), "regime": world.regime, "task_hash": world.task_hash(),
            "deterministic": world.deterministic, "engines": world.versions(),
        },
        "packages": {name: importlib.metadata.version(name) for name in ("telltale", "torch", "numpy")},
        "python": platform.python_version(),
        "hardware": {"machine": platform.machine(), "threads": torch.get_num_threads()},
        "model": {"class": evaluation.model, "description_hash": _digest(evaluation.description), "weights_hash": _weights(model),
                  "parent": parent, "evidence": evidence or []},
        "planner": evaluation.planner,
        "laws": {"mode": evaluation.law_mode, "names": [law.name for law in world.laws]},
        "reward": evaluation.reward,
        "seeds": evaluation.seeds,
        "planning_seed": evaluation.seed,
        "budget": {"env_steps": evaluation.env_steps, "model_steps": evaluation.model_steps, "cpu_seconds": evaluation.cpu_seconds},
        "purpose": purpose,
        "level_claimed": certificate.level if certificate is not None else 0,
    }  # fmt: skip


def trace_rows(world: World, record: Any) -> list[dict[str, Any]]:
    """One JSON row per step."""
    episode = record.episode
    rows = []
    for t, action in enumerate(episode.actions):
        last = t == len(episode) - 1
        rows.append(
            {
                "t": t, "observation": plain_value(episode.observations[t]), "action": plain_value(action),
                "predicted": plain_value(record.predicted[t]) if t < len(record.predicted) else None,
                "next": plain_value(episode.observations[t + 1]), "reward": float(episode.rewards[t]),
                "terminated": bool(episode.terminated and last), "truncated": bool(episode.truncated and last),
                "broken": record.broken[t] if t < len(record.broken) else {},
                "plan_value": record.plan_value[t] if t < len(record.plan_value) else None,
                "receipt": plain_value(episode.receipts[t]),
            }
        )  # fmt: skip
    return rows


def plain_value(value: Any) -> Any:
    """JSON values that read back exactly: a float32 is written as the double that it equals."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return value.tolist()
    if isinstance(value, (np.integer, np.floating)):
        return value.item()
    if isinstance(value, dict):
        return {str(key): plain_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_value(item) for item in value]
    return value


def statistics_of(traces: list[list[dict[str, Any]]], successes: list[bool]) -> dict[str, Any]:
    """Statistics of the episodes, from their traces alone, so that a verifier can compute them again."""
    returns = [float(sum(row["reward"] for row in rows)) for rows in traces]
    spread = bootstrap(returns, seed=0)
    success = bootstrap([float(s) for s in successes], statistic=lambda values: float(values.mean()), seed=0)
    low, high = min(returns), max(returns)
    thresholds = [low + (high - low) * i / 10 for i in range(11)]
    rates = [max(row["broken"].values(), default=0.0) for rows in traces for row in rows]
    return {
        "returns": returns, "successes": [bool(s) for s in successes], "asr": sum(successes) / len(successes),
        "asr_interval": [success.low, success.high], "iqm": iqm(returns), "iqm_interval": [spread.low, spread.high],
        "profile": {"thresholds": thresholds, "share_above": performance_profile(returns, thresholds)},
        "worst_decile": worst_decile(returns), "raw_violation_rate": sum(rates) / len(rates) if rates else 0.0,
        "steps": [len(rows) for rows in traces],
    }  # fmt: skip


def coverage_of(world: World, certificate: Any) -> dict[str, Any]:
    """Per condition S (strong), M (medium), W (weak) or - (untested), with the test that justifies it; other regimes are -."""
    labels: dict[str, Any] = {}
    conditions = certificate.conditions if certificate is not None else {}
    for name in ("coherence", "sensitivity", "consistency"):
        condition = conditions.get(name)
        if condition is None or condition.status == "untested":
            labels[name] = {"label": "-", "test": None}
        elif condition.status == "inconclusive":
            labels[name] = {"label": "W", "test": f"certify:{name}"}
        else:
            strong = len(certificate.evaluation.records) >= 30
            labels[name] = {"label": "S" if strong else "M", "test": f"certify:{name}"}
    closed_loop = {
        "label": "S" if certificate is not None and certificate.oracle is not None else "M",
        "test": "evaluate",
    }
    tested = {**labels, "closed_loop": closed_loop}
    blank = {name: {"label": "-", "test": None} for name in tested}
    return {
        regime: tested if regime == world.regime else blank
        for regime in ("physical", "digital", "social", "scientific")
    }


def curves(certificate: Any) -> dict[str, Any]:
    """Error by horizon and the probes, for the page and for who wants to draw them again."""
    found = certificate.coherence
    probes = certificate.sensitivity
    return {
        "error": found.errors if found is not None else [],
        "floor": found.floor if found is not None else [],
        "divergence": probes.divergence if probes is not None else [],
        "engine_divergence": probes.oracle if probes is not None else [],
    }


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def seal(manifest: dict[str, Any]) -> str:
    """SHA-256 of the manifest without its seal."""
    return _digest({key: value for key, value in manifest.items() if key != "seal"})


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _weights(model: Any) -> str | None:
    inner = getattr(model, "model", model)
    if not isinstance(inner, torch.nn.Module):
        return None
    digest = hashlib.sha256()
    for name, value in inner.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
