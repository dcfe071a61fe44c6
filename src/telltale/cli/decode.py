"""``telltale generate``: text from a local checkpoint, streamed as it is committed."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from telltale.cli.options import Backend, Dtype, Json, Seed, Threads, automatic, emit, read_text, set_threads
from telltale.cli.step_decoding import check_step_options, open_step_decoder, step_line
from telltale.configuration import check_choice
from telltale.errors import ConfigError, DataError

METHODS = {
    "auto": "drafts where they pay",
    "autoregressive": "the model, token by token",
    "self-speculative": "LayerSkip: early layers draft, the same output",
    "step-verified": "SpecGuard: a draft writes steps, the model redoes those that do not convince",
}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("generate")(generate)


def generate(
    checkpoint: Annotated[Path, typer.Argument(help="A local Hugging Face checkpoint.")],
    prompt: Annotated[str | None, typer.Option(help="The prompt. Default: --prompt-file, or standard input.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A file that holds the prompt.")] = None,
    method: Annotated[
        str, typer.Option(help="autoregressive, self-speculative, step-verified, or auto: drafts where they pay.")
    ] = "auto",
    exit_layer: Annotated[str, typer.Option(help="auto, or the layer after which drafts are read.")] = "auto",
    draft_length: Annotated[str, typer.Option(help="auto, or tokens per draft.")] = "auto",
    drafter: Annotated[str | None, typer.Option(help="exit, ngram or both. Default: both for auto, else exit.")] = None,
    draft: Annotated[Path | None, typer.Option(help="step-verified: the checkpoint that drafts steps.")] = None,
    guard: Annotated[Path | None, typer.Option(help="step-verified: a calibration of these models.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="step-verified: FIELD=VALUE of StepVerifiedConfig, such as beta=1; repeatable."),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest output, in tokens. Default: 128, if there is room.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k most likely tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample within this probability mass.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End at this text; repeatable.")] = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    backend: Backend = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Generate text. Drafts by tokens change the speed alone; `step-verified` accepts whole steps of the draft's own.

    Example: `telltale generate runs/tour/training/model --prompt "def main(" --max-new-tokens 64`
    """
    check_choice("method", method, tuple(METHODS))
    exits, lengths = automatic("exit_layer", exit_layer), automatic("draft_length", draft_length)
    if method == "autoregressive" and (exit_layer != "auto" or draft_length != "auto" or drafter is not None):
        raise ConfigError(
            "--exit-layer, --draft-length and --drafter do nothing with --method autoregressive; leave them out or choose "
            "self-speculative."
        )
    check_step_options(method, draft=draft, guard=guard, overrides=overrides, exit_layer=exits)
    if method == "step-verified" and (draft_length != "auto" or drafter is not None):
        raise ConfigError("--draft-length and --drafter do nothing with --method step-verified; leave them out.")
    set_threads(threads)
    import torch

    from telltale.models.loading import load

    model, tokenizer = load(checkpoint, dtype=dtype)
    text = _prompt(prompt, prompt_file)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=True)["input_ids"]
    if ids.numel() == 0:
        raise DataError("the prompt is empty; expected some text.")
    if max_new_tokens is None:
        max_new_tokens = max(1, min(128, model.config.max_position_embeddings - ids.numel()))
    decoder: Any
    if method == "step-verified":
        decoder = open_step_decoder(
            model,
            tokenizer,
            draft=draft,
            guard=guard,
            overrides=overrides,
            exit_layer=exits,
            dtype=dtype,
            backend=backend,
        )
    else:
        decoder = _decoder(model, method, exits, lengths, drafter, backend)
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "generator": torch.Generator().manual_seed(seed),
        "stop_strings": stop or None,
        "tokenizer": tokenizer,
    }
    if json:
        result = decoder.generate(ids, **options)
        tokens = result.tokens[0, : int(result.lengths[0])].tolist()
        found = {
            "text": tokenizer.decode(tokens),
            "tokens": tokens,
            "stop_reason": result.stop_reason[0],
            "stats": _stats(result),
        }
        if method == "step-verified":
            found["steps"] = [step.to_dict() for step in result.steps[0]]
        emit(found)
        return
    _stream(decoder, tokenizer, ids, options)


def _prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if prompt is not None and prompt_file is not None:
        raise DataError("both --prompt and --prompt-file were given; expected one.")
    if prompt_file is not None:
        prompt = read_text(prompt_file)
    elif prompt is None:
        if sys.stdin.isatty():
            raise DataError("no prompt was given; expected --prompt, --prompt-file or text on standard input.")
        prompt = sys.stdin.read()
    if not prompt:
        raise DataError("the prompt is empty; expected some text.")
    return prompt


def _decoder(
    model: Any, method: str, exit_layer: int | str, draft_length: int | str, drafter: str | None, backend: str
) -> Any:
    from telltale.decode import Autoregressive, SelfSpeculative

    if method == "autoregressive":
        return Autoregressive(model, backend=backend)
    chosen = drafter or ("both" if method == "auto" else "exit")
    return SelfSpeculative(model, exit_layer, draft_length, drafter=chosen, backend=backend)  # type: ignore[arg-type]


def _stream(decoder: Any, tokenizer: Any, ids: Any, options: dict[str, Any]) -> None:
    """Print text as soon as it cannot change any more: bytes of an unfinished character wait for the rest."""
    tokens: list[int] = []
    shown = ""
    stream = decoder.stream(ids, **options)
    while True:
        try:
            tokens.extend(next(stream))
        except StopIteration as end:
            result = end.value
            break
        text = tokenizer.decode(tokens)
        stable = text.rstrip("\ufffd")
        if stable.startswith(shown):
            sys.stdout.write(stable[len(shown) :])
            sys.stdout.flush()
            shown = stable
    sys.stdout.write(tokenizer.decode(tokens)[len(shown) :] + "\n")
    typer.echo(_line(result.stats), err=True)


def _line(stats: Any) -> str:
    parts = [f"{stats.tokens} tokens", f"{stats.tokens_per_second:,.0f} tokens/s", f"backend {stats.backend}"]
    if hasattr(stats, "target_share"):
        parts.append(step_line(stats))
    elif getattr(stats, "drafted", 0):
        parts.append(f"{stats.accepted}/{stats.drafted} drafts accepted")
    return ", ".join(parts)


def _stats(result: Any) -> dict[str, Any]:
    stats = result.stats
    extra = {"tokens_per_second": stats.tokens_per_second}
    if hasattr(stats, "target_share"):
        extra |= {"acceptance_rate": stats.acceptance_rate, "target_share": stats.target_share}
    elif hasattr(stats, "drafted"):
        extra |= {"acceptance_rate": stats.acceptance_rate, "tokens_per_verify": stats.tokens_per_verify}
    return asdict(stats) | extra
