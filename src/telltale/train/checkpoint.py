"""What a training run saves: a Hugging Face folder, and beside it the optimizer and random state for an exact resume."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from telltale.errors import CheckpointError
from telltale.models.families import unwrap
from telltale.models.loading import without_progress_bars
from telltale.runs.files import atomic_directory
from telltale.runs.run_dir import RunDir

STATE_FILE = "training_state.pt"


def save(run: RunDir, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, tokenizer: Any) -> Path:
    """Write ``checkpoints/step-<step>``: the model as ``save_pretrained`` writes it, and the training state."""

    def write(folder: Path) -> None:
        _write_model(folder, model, tokenizer)
        state = {
            "step": step,
            "optimizer": optimizer.state_dict(),
            "torch_random": torch.get_rng_state(),
            "python_random": random.getstate(),
        }
        torch.save(state, folder / STATE_FILE)

    return run.save_checkpoint(step, write)


def restore(run: RunDir, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest checkpoint into model and optimizer; returns its step, or 0 if there is none.

    Raises :class:`~telltale.errors.CheckpointError` if the checkpoint cannot be read or is of another model.
    """
    found = run.latest_checkpoint()
    if found is None:
        return 0
    step, folder = found
    try:
        state = torch.load(folder / STATE_FILE, weights_only=True)
        weights: dict[str, torch.Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            weights |= load_file(file)
    except (OSError, RuntimeError, EOFError, SafetensorError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{folder} cannot be read: {error}. Delete it to resume from the one before.") from error
    target = unwrap(model)
    try:
        missing, unexpected = target.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{folder} holds another model: {str(error).splitlines()[-1].strip()}") from error
    shared = {name for name, parameter in target.named_parameters(remove_duplicate=False)} - {
        name for name, _ in target.named_parameters()
    }
    absent = set(missing) - shared
    if absent or unexpected:
        names = ", ".join(sorted(absent | set(unexpected))[:3])
        raise CheckpointError(f"{folder} holds another model: {names} differ from the model that is being trained.")
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["torch_random"])
    random.setstate(state["python_random"])
    return step


def export(path: Path, model: nn.Module, tokenizer: Any) -> None:
    """Write ``model`` and ``tokenizer`` as a Hugging Face checkpoint, whole or not at all."""
    with atomic_directory(path) as aside:
        _write_model(aside, model, tokenizer)


def _write_model(folder: Path, model: nn.Module, tokenizer: Any) -> None:
    with without_progress_bars():
        unwrap(model).save_pretrained(folder)  # type: ignore[operator]
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
