"""``telltale list``: what there is to choose from.

``telltale bench``: run one of the benchmark scripts of a source checkout.

``telltale tour``: the main job on an embedded default.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from telltale.cli.options import INTERRUPTED, Json, Seed, Threads, emit, set_threads
from telltale.errors import ConfigError

POLICY_NOTES = {
    "stash": "PipeDream: every minibatch keeps the weights it went forward with",
    "vertical": "PipeDream's vertical sync: all stages read the same version",
    "2bw": "PipeDream-2BW: two versions, one update per m minibatches",
    "flush": "one version, the pipe is drained at every update (today's 1F1B)",
    "gpipe": "one version, all forwards before all backwards",
    "none": "the ablation: forward and backward may read different weights",
    "interleaved": "torch's schedule: several chunks per worker, drained",
}
COST_MODEL_NOTES = {
    "ring": "2(m-1)/m bytes per parameter byte, overlapped: the default, gives the published plans",
    "v1": "arXiv 1806.03377: 4(m-1)/m, overlapped",
    "sosp-literal": "SOSP'19's display formula: 2(m-1), overlapped",
    "official-code": "msr-fiddle/pipedream: 4(m-1)/m, after the compute",
}
STEP_POLICY_NOTES = {
    "specguard": "score each drafted step, redo what is below the threshold",
    "target": "the target writes everything",
    "draft": "the draft writes everything",
    "speculative": "token-level speculative sampling: the target's own distribution",
    "random": "accept a given share: the control",
    "verifier": "a callable scores steps: reward (RSD), judge (SpecReason), checker (oracle)",
}
STEP_SCORE_NOTES = {
    "ensemble": "beta * log-probability + (1 - beta) * grounding, both on a fitted scale (SpecGuard)",
    "log-probability": "of the step's least likely token",
    "grounding": "attention that comes from prompt and accepted steps",
    "agreement": "share of candidates that are equal",
    "entropy": "of the next token, negated",
    "likelihood-ratio": "target against draft (GSI)",
}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("tour")(tour)
    app.command("list")(catalogue)
    app.command("bench", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(bench)


def catalogue(json: Json = False) -> None:
    """List presets, families, backends, methods, step and pipeline policies, cost models, patch selectors, codecs, tasks.

    Example: `telltale list --json`
    """
    from telltale.cli.generate import METHODS
    from telltale.decode.step_config import POLICIES as STEP_POLICIES
    from telltale.decode.step_config import SCORES
    from telltale.edge.codecs import codec_names
    from telltale.edge.importance import IMPORTANCES
    from telltale.edge.selection import selector_description, selectors
    from telltale.models.backends.native import build
    from telltale.models.decoder import BACKENDS
    from telltale.models.families import FAMILIES
    from telltale.models.presets import PRESETS
    from telltale.train.pipeline.plan import POLICIES
    from telltale.train.pipeline.planning.costs import COST_MODELS

    reason = build.unavailable_reason()
    listing = {
        "presets": {name: preset.description for name, preset in PRESETS.items()},
        "families": {name: "fused and native" if row.llama_like else "module" for name, row in FAMILIES.items()}
        | {"others": "decoding only, on the backends that can read their layers"},
        "backends": dict.fromkeys(BACKENDS, "") | {"native": "available" if reason is None else f"not here: {reason}"},
        "methods": METHODS,
        "pipeline policies": {name: POLICY_NOTES[name] for name in POLICIES},
        "pipeline cost models": {name: COST_MODEL_NOTES[name] for name in COST_MODELS},
        "step policies": {name: STEP_POLICY_NOTES[name] for name in STEP_POLICIES},
        "step scores": {name: STEP_SCORE_NOTES[name] for name in SCORES},
        "edge selectors": {name: selector_description(name).rstrip(".") for name in selectors()},
        "edge importances": IMPORTANCES,
        "edge codecs": dict.fromkeys(codec_names(), ""),
        "tasks": {
            "code": "Python's standard library, or your own text, as a corpus",
            "chains": "arithmetic in steps, generated, every step checked",
            "scenes": "digits among fragments, which one is the largest?",
            "gsm8k": "grade-school mathematics from a local file, marked calculations checked",
        },
        "benchmarks": dict.fromkeys(claims(), "") or {"-": "in a source checkout only"},
    }
    if json:
        emit(listing)
        return
    for heading, entries in listing.items():
        typer.echo(f"{heading}:")
        for name, note in entries.items():
            typer.echo(f"  {name:<18}{note}".rstrip())


_SUPPORT = {"measurement", "peers", "checkpoints", "specguard_pairs", "specguard_figures", "sharpness_paper_forms"}


def bench(
    context: typer.Context,
    claim: Annotated[str, typer.Argument(help="Name of a script in benchmarks/ (see telltale list).")],
) -> None:
    """Measure one claim against its peers and write its JSON; further options go to the script.

    Example: `telltale bench layerskip_speed`
    """
    known = claims()
    if claim not in known:
        raise ConfigError(
            f"benchmark {claim!r} is unknown; expected one of {', '.join(known) or 'none: run it from a source checkout'}."
        )
    script = _folder() / f"{claim}.py"
    code = subprocess.run([sys.executable, str(script), *context.args], cwd=script.parents[1], check=False).returncode
    if code:
        raise ConfigError(f"benchmark {claim!r} ended with exit status {code}.")


def claims() -> list[str]:
    """Names of the benchmark scripts; empty outside a source checkout."""
    return sorted(path.stem for path in _folder().glob("*.py") if path.stem not in _SUPPORT)


def _folder() -> Path:
    return Path(__file__).resolve().parents[3] / "benchmarks"


def tour(
    run_dir: Annotated[
        Path, typer.Option(help="Where corpus, model and report go; an interrupted tour goes on there.")
    ] = Path("runs/tour"),
    text: Annotated[
        Path | None, typer.Option(help="Your own text: a file or a folder. Default: Python's standard library.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A rehearsal of seconds; its figures mean nothing.")] = False,
    seed: Seed = 0,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Train a small model with the LayerSkip recipe, decode it beside Transformers, run three chapters, and write a report.

    Takes about 8 minutes on 2 cores. Example: `telltale tour --text my_project/ --run-dir runs/mine`
    """
    from telltale.tour import run_tour

    set_threads(threads)
    summary = run_tour(run_dir, text=text, quick=quick, seed=seed)
    if json:
        emit(summary)
    if not summary["finished"]:
        raise typer.Exit(INTERRUPTED)
