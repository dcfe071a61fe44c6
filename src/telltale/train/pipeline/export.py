"""The whole model out of a pipeline or its checkpoint, as the files that everyone else reads.

A Hugging Face model becomes a folder that ``telltale.load`` and ``from_pretrained`` open, any other module one safetensors
file of its state dict. A tied weight is taken from the first stage that has it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save as safetensors_bytes
from safetensors.torch import save_file
from torch import Tensor, nn

from telltale.errors import CheckpointError
from telltale.runs.files import write_atomically
from telltale.train import checkpoint as whole_model
from telltale.train.pipeline.checkpoint_files import PART_FILE, open_step
from telltale.train.pipeline.layers import LayeredModel
from telltale.train.pipeline.stage_checkpoint import StagePart, StageState, buffers_of, on_all_ranks, read_tensors


def export(state: StageState, path: str | Path, *, tokenizer: Any = None) -> None:
    """Bring all stages' newest weights to rank 0, which writes the model; every rank calls it.

    ``path`` becomes a folder for a model that has ``save_pretrained`` (with ``tokenizer`` in it if given), else a safetensors
    file. On rank 0 ``state.model.root`` holds the whole model afterwards. Where ranks hold their own stages alone, every stage
    writes a shard of the folder instead, on a disk that all ranks share. Raises
    :class:`~telltale.errors.CheckpointError` on every rank if it could not be written.
    """
    if any(parameter.is_meta for parameter in state.model.root.parameters()):
        _write_shards(state, Path(path), tokenizer)
        return
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
    # Rank 0 needs what it has not: the other ranks' stages, from the first replica of each.
    own = _own(state)
    sent_by_me = [name for part in state.parts if part.replica == 0 for name in _tensors_of(part)] if state.rank else []
    names = state.groups.all_gather_object(sorted(sent_by_me))
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


def _tensors_of(part: StagePart) -> dict[str, Tensor]:
    """Unsplit name -> parameter or persistent buffer of one stage."""
    stage = part.stage
    return {stage.names[local]: parameter for local, parameter in stage.named_parameters()} | buffers_of(stage)


def _own(state: StageState) -> dict[str, Tensor]:
    return {name: tensor for part in state.parts for name, tensor in _tensors_of(part).items()}


def _write_shards(state: StageState, path: Path, tokenizer: Any) -> None:
    """``path`` as a folder with a shard of every stage, written where the stage is."""
    root: Any = state.model.root
    if not hasattr(root, "save_pretrained"):
        raise CheckpointError(
            f"{type(root).__name__} has weights of single stages on every rank and no save_pretrained; expected export_step, "
            f"from a checkpoint of the run."
        )
    count = len(state.plan.stages)
    aside = path.with_name(f".{path.name}-partial")
    on_all_ranks(state, lambda: aside.mkdir(parents=True, exist_ok=True))
    first = {name: stage for stage, name in sorted(_stage_names(state), reverse=True)}

    def write() -> dict[str, tuple[str, int]]:
        written: dict[str, tuple[str, int]] = {}
        for part in state.parts:
            if part.replica:
                continue
            file = f"model-{part.number + 1:05d}-of-{count:05d}.safetensors"
            own = {
                name: t.detach().cpu().contiguous()
                for name, t in _tensors_of(part).items()
                if first[name] == part.number
            }
            save_file(own, aside / file, metadata={"format": "pt"})
            written |= {name: (file, tensor.nbytes) for name, tensor in own.items()}
        return written

    places: dict[str, tuple[str, int]] = {}
    for written in state.groups.all_gather_object(on_all_ranks(state, write)):
        places |= written

    def finish() -> None:
        if state.rank:
            return
        index = {
            "metadata": {"total_size": sum(size for _, size in places.values())},
            "weight_map": {name: file for name, (file, _) in sorted(places.items())},
        }
        (aside / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
        root.config.save_pretrained(aside)
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
        shutil.rmtree(path, ignore_errors=True)
        aside.rename(path)

    on_all_ranks(state, finish)


def _stage_names(state: StageState) -> list[tuple[int, str]]:
    """(stage, tensor name) of everything that first replicas hold, on every rank."""
    mine = [(part.number, name) for part in state.parts if part.replica == 0 for name in _tensors_of(part)]
    return [pair for pairs in state.groups.all_gather_object(mine) for pair in pairs]


def _write(root: nn.Module, path: Path, tokenizer: Any) -> None:
    if hasattr(root, "save_pretrained"):
        whole_model.export(path, root, tokenizer)
        return
    state = {name: value for name, value in root.state_dict().items() if isinstance(value, Tensor)}
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()
    }
    write_atomically(path, safetensors_bytes(tensors))
