"""The whole model out of a pipeline or its checkpoint, as the files that everyone else reads.

A Hugging Face model becomes a folder that ``telltale.load`` and ``from_pretrained`` open, any other module one safetensors
file of its state dict. A tied weight is taken from the first stage that has it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from telltale.errors import CheckpointError
from telltale.runs.files import write_atomically
from telltale.train import checkpoint as whole_model
from telltale.train.pipeline.checkpoint_files import PART_FILE, open_step
from telltale.train.pipeline.layers import LayeredModel
from telltale.train.pipeline.stage_checkpoint import StageState, buffers_of, on_all_ranks, read_tensors


def export(state: StageState, path: str | Path, *, tokenizer: Any = None) -> None:
    """Bring all stages' newest weights to rank 0, which writes the model; every rank calls it.

    ``path`` becomes a folder for a model that has ``save_pretrained`` (with ``tokenizer`` in it if given), else a safetensors
    file. On rank 0 ``state.model.root`` holds the whole model afterwards. Raises
    :class:`~telltale.errors.CheckpointError` on every rank if it could not be written.
    """
    _gather(state)

    def write() -> None:
        if state.rank == 0:
            _write(state.model.root, Path(path), tokenizer)

    on_all_ranks(state, write)


def export_step(
    directory: str | Path, model: LayeredModel | nn.Module, path: str | Path, *, tokenizer: Any = None
) -> None:
    """As :func:`export`, from a checkpoint and in one process: ``model`` gets the weights of the step in ``directory``."""
    load_weights(directory, model)
    _write(model.root if isinstance(model, LayeredModel) else model, Path(path), tokenizer)


@torch.no_grad()
def load_weights(directory: str | Path, model: LayeredModel | nn.Module) -> int:
    """Copy the weights and buffers of the newest complete step in ``directory`` (or of that step's own folder) into the
    unsplit ``model``; returns the step's next minibatch. No process group is needed.

    Raises :class:`~telltale.errors.CheckpointError` if there is no complete step, or it is of another model.
    """
    step = open_step(directory)
    root = model.root if isinstance(model, LayeredModel) else model
    found = step.parts[0].manifest["fingerprint"]
    if isinstance(model, LayeredModel) and found != model.fingerprint:
        raise CheckpointError(
            f"{step.parts[0].path / PART_FILE} is of another model (fingerprint {found}); expected one of this model "
            f"({model.fingerprint})."
        )
    saved = read_tensors(step.parts, lambda key: key.startswith("model."))
    weights = {key.removeprefix("model."): tensor for key, tensor in saved.items()}
    parameters = dict(root.named_parameters())
    targets = root.state_dict(keep_vars=True) | parameters
    strange = [name for name in weights if name not in targets or targets[name].shape != weights[name].shape]
    strange += [name for name in parameters if name not in weights]
    if strange:
        raise CheckpointError(
            f"{step.path} is of another model: it differs in {strange[0]}; expected this model's weights."
        )
    for name, value in weights.items():
        targets[name].data.copy_(value)
    return step.minibatch


@torch.no_grad()
def _gather(state: StageState) -> None:
    """Send what first replicas of later stages have to rank 0, tensor by tensor in the order of their names."""
    world = state.groups.world
    if world is None:
        return
    number, replica = state.plan.place(state.rank)
    stage = state.stage
    own = {stage.names[local]: parameter for local, parameter in stage.named_parameters()} | buffers_of(stage)
    names = state.groups.all_gather_object(sorted(own) if replica == 0 and number > 0 else [])
    root = state.model.root
    whole: dict[str, Tensor] = root.state_dict(keep_vars=True) | dict(root.named_parameters())
    for rank, sent in enumerate(names):
        for name in sent:
            if state.rank == rank:
                with state.record.waiting(f"rank 0 to take {name}", 0):
                    dist.send(own[name].detach().contiguous(), 0, group=world)
            elif state.rank == 0:
                buffer = torch.empty_like(whole[name], device=state.device, memory_format=torch.contiguous_format)
                with state.record.waiting(f"{name} from rank {rank}", rank):
                    dist.recv(buffer, rank, group=world)
                if name not in own:
                    whole[name].data.copy_(buffer)


def _write(root: nn.Module, path: Path, tokenizer: Any) -> None:
    if hasattr(root, "save_pretrained"):
        whole_model.export(path, root, tokenizer)
        return
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in root.state_dict().items()}
    write_atomically(path, safetensors_bytes(tensors))
