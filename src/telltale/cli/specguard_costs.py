"""``telltale specguard costs``: what the parts of a step cost with a pair of models on this machine."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from telltale.cli.options import Backend, Dtype, Json, Threads, emit, set_threads
from telltale.cli.specguard_data import open_models
from telltale.cli.specguard_options import Candidates, Draft, ExitLayer, Fallback, Overrides, Target
from telltale.errors import ConfigError

ACCEPTANCE_RATES = (0.5, 0.7, 0.8, 0.9, 1.0)


def costs(
    target: Target,
    draft: Draft = None,
    exit_layer: ExitLayer = None,
    guard: Annotated[Path | None, typer.Option(help="A calibration of this pair: its settings are timed.")] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens before the step.")] = 256,
    step_tokens: Annotated[int, typer.Option(help="Tokens of the step.")] = 24,
    candidates: Candidates = None,
    fallback: Fallback = None,
    overrides: Overrides = None,
    dtype: Dtype = None,
    backend: Backend = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Time a step's parts with this pair on this machine: from which share of accepted steps does verification pay?

    Example: `telltale specguard costs --target big --draft small --candidates 8 --set signal_model=target`
    """
    set_threads(threads)
    from telltale.decode.costs_report import measure_costs
    from telltale.decode.step_verified.calibration.calibrated import Calibration

    options: dict[str, Any] = {"candidates": candidates, "fallback": fallback}
    calibration = None if guard is None else Calibration.load(guard)
    if calibration is not None:
        if overrides or any(value is not None for value in options.values()):
            raise ConfigError("--guard has settings of its own; leave out --candidates, --fallback and --set.")
        exit_layer = calibration.config.exit_layer if draft is None and exit_layer is None else exit_layer
    pair = open_models(target, draft, exit_layer, options=options, overrides=overrides, dtype=dtype, backend=backend)
    if calibration is not None:
        pair = calibration.guard(pair.target, pair.draft, pair.tokenizer)
    found = measure_costs(pair, prompt_tokens=prompt_tokens, step_tokens=step_tokens)
    speedups = {rate: found.speedup(rate) for rate in ACCEPTANCE_RATES}
    if json:
        parts = asdict(found) | {"break_even": found.break_even}
        emit(parts | {"speedups": {f"{rate:g}": speedup for rate, speedup in speedups.items()}})
        return
    unit = f"{1e3 * found.target_seconds:.1f} ms"
    typer.echo(f"a step of {step_tokens} tokens after {prompt_tokens}; 1 is the target writing it alone, {unit}")
    for words, value in (
        ("draft, one candidate (rho)", found.draft),
        ("all candidates over one (sigma_D)", found.draft_inflation),
        ("the target's scoring pass (v)", found.verify),
        ("the target's redoing over one (sigma_T)", found.fallback_inflation),
    ):
        typer.echo(f"  {words:<42}{value:.3f}")
    listed = ", ".join(f"{speedup:.2f}x at {rate:.0%}" for rate, speedup in speedups.items())
    typer.echo(f"speed-up by share of accepted steps: {listed}")
    pays = found.break_even
    typer.echo(f"pays from {max(0.0, pays):.0%} accepted on" if pays < 1 else "it does not pay at any share")
