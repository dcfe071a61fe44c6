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
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from telltale.errors import MissingExtraError
from telltale.runs.files import atomic_directory, strict_json
from telltale.world.card import card, page
from telltale.world.failures import RULES, failures
from telltale.world.metrics import bootstrap, iqm, performance_profile, worst_decile, worst_rate
from telltale.world.plugs import modules_of, parts_of
from telltale.world.protocol import Adapted
from telltale.world.records import plain_value
from telltale.world.worlds.base import REGIMES, World, replays, source_of

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
        "stats.json": statistics_of(
            [trace_rows(world, record) for record in evaluation.records], evaluation.successes, evaluation.hard()
        ),
        "failures.json": {"rules": RULES, "failures": [asdict(failure) for failure in found],
                          "taxonomy": "applied" if certificate is not None and model is not None else "not applied"},
        "coverage.json": coverage_of(
            world.regime,
            {name: condition.status for name, condition in certificate.conditions.items()} if certificate else {},
            episodes=len(evaluation.records),
            paired=certificate is not None and certificate.oracle is not None,
        ),
    }  # fmt: skip
    if certificate is not None:
        documents["certificate.json"] = {**certificate.summary(), "curves": curves(certificate)}
    with atomic_directory(path) as folder:
        (folder / "traces").mkdir()
        for number, record in enumerate(evaluation.records):
            lines = [json.dumps(strict_json(row), allow_nan=False) for row in trace_rows(world, record)]
            head = json.dumps({"seed": record.episode.seed, "success": record.success})
            (folder / "traces" / f"episode-{number:04d}.jsonl").write_text("\n".join([head, *lines]) + "\n")
        for name, document in documents.items():
            (folder / name).write_text(json.dumps(strict_json(document), indent=1, allow_nan=False) + "\n")
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
            "rebuildable": world.rebuildable(), "engines": world.versions(), **_replayable(evaluation),
        },
        "packages": {name: importlib.metadata.version(name) for name in ("telltale", "torch", "numpy")},
        "python": platform.python_version(),
        "hardware": {"machine": platform.machine(), "threads": torch.get_num_threads()},
        "model": {"class": evaluation.model, "description_hash": _digest(evaluation.description), "hash": identity_of(model),
                  "parent": parent, "evidence": evidence or []},
        "planner": evaluation.planner,
        "laws": {"mode": evaluation.law_mode, "names": [law.name for law in evaluation.laws], "hard": evaluation.hard()},
        "reward": evaluation.reward,
        "seeds": evaluation.seeds,
        "planning_seed": evaluation.seed,
        "budget": {"env_steps": evaluation.env_steps, "model_steps": evaluation.model_steps, "cpu_seconds": evaluation.cpu_seconds},
        "purpose": purpose,
        "level_claimed": certificate.level if certificate is not None else 0,
    }  # fmt: skip


def _replayable(evaluation: Any) -> dict[str, bool]:
    """What a verifier may expect of a replay, tried on the first episode: a world of the user's may not know it is random."""
    episode = evaluation.records[0].episode
    world = evaluation.world
    same = world.deterministic and replays(world, episode)
    return {"deterministic": same, "receipts_deterministic": same and replays(world, episode, receipts=True)}


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


def statistics_of(traces: list[list[dict[str, Any]]], successes: list[bool], hard: list[str]) -> dict[str, Any]:
    """Statistics of the episodes, from their traces and the names of the hard laws alone, so that a verifier can compute them
    again."""
    returns = [float(sum(row["reward"] for row in rows)) for rows in traces]
    spread = bootstrap(returns, seed=0)
    success = bootstrap([float(s) for s in successes], statistic=lambda values: float(values.mean()), seed=0)
    low, high = min(returns), max(returns)
    thresholds = [low + (high - low) * i / 10 for i in range(11)]
    rates = [worst_rate(row["broken"], hard) for rows in traces for row in rows]
    return {
        "returns": returns, "successes": [bool(s) for s in successes], "asr": sum(successes) / len(successes),
        "asr_interval": [success.low, success.high], "iqm": iqm(returns), "iqm_interval": [spread.low, spread.high],
        "profile": {"thresholds": thresholds, "share_above": performance_profile(returns, thresholds)},
        "worst_decile": worst_decile(returns), "raw_violation_rate": sum(rates) / len(rates) if rates else 0.0,
        "steps": [len(rows) for rows in traces],
    }  # fmt: skip


def coverage_of(regime: str, statuses: dict[str, str], *, episodes: int, paired: bool) -> dict[str, Any]:
    """Per condition S (strong), M (medium), W (weak) or - (untested), with the test that justifies it; other regimes are -.

    ``statuses``: of a certificate's conditions. ``paired``: whether oracle dynamics played the same starts.
    """
    labels: dict[str, Any] = {}
    for name in ("coherence", "sensitivity", "consistency"):
        status = statuses.get(name, "untested")
        if status == "untested":
            labels[name] = {"label": "-", "test": None}
        elif status == "inconclusive":
            labels[name] = {"label": "W", "test": f"certify:{name}"}
        else:
            labels[name] = {"label": "S" if episodes >= 30 else "M", "test": f"certify:{name}"}
    tested = {**labels, "closed_loop": {"label": "S" if paired else "M", "test": "evaluate"}}
    blank = {name: {"label": "-", "test": None} for name in tested}
    return {name: tested if name == regime else blank for name in REGIMES}


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


def identity_of(model: Any) -> str | None:
    """SHA-256 over what a model is: its description, else its class's source and the values that it holds; its weights."""
    if model is None:
        return None
    inner = model.model if isinstance(model, Adapted) else model
    digest = hashlib.sha256()
    if callable(getattr(inner, "describe", None)):
        digest.update(_digest(inner.describe()).encode())
        values = list(inner.tensors().items()) if callable(getattr(inner, "tensors", None)) else []
    else:
        digest.update(source_of(type(inner)).encode())
        values = [item for part in parts_of(inner) for item in _held_values(part)]
    for name, value in (*values, *(item for module in modules_of(inner) for item in module.state_dict().items())):
        digest.update(name.encode())
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, np.ndarray):
            digest.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()


def _held_values(part: Any) -> Iterator[tuple[str, Any]]:
    """Numbers, texts and arrays among the public attributes of an object, or of the parts of a module."""
    for owner in part.modules() if isinstance(part, torch.nn.Module) else (part,):
        for name, value in sorted(getattr(owner, "__dict__", {}).items()):
            if not name.startswith("_") and name != "training" and isinstance(value, _VALUES):
                yield name, value


_VALUES = (bool, int, float, str, np.ndarray, torch.Tensor)
