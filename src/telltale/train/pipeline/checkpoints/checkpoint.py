"""Checkpoints of a pipeline, keyed by the unsplit model's names, that resume bit for bit or under another plan.

Every stage writes its own part with ``torch.distributed.checkpoint`` (PipeDream, SOSP'19, section 4: no stage waits for
another to write): parameters, buffers, optimizer state and the ring of past weight versions, under

    model.<name>    optimizer.state.<name>.<key>    versions.<number>.<name>

A run ends drained, so nothing is in flight. What resuming gives:

* same plan: the run that was never stopped, bit for bit (under "none", the one that was drained there);
* another cut, flush, gpipe, 2bw or vertical with the same m: the same, since versions are numbered by batch;
* any other change (a new cut under stash, another m, another policy with ``switch_policy``): a new delay pattern. No older
  version is read, training starts with the newest weights and optimizer state on every stage: :meth:`Reference.switch`.

Hyperparameters follow the checkpoint, learning rates the optimizer factory. Running statistics are those of each stage's
first replica. Files hold a pickled index (torch's format): open only checkpoints that you trust.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from telltale.configuration import check_integer
from telltale.errors import CheckpointError
from telltale.runs.atomic import atomic_directory, write_atomically
from telltale.train.pipeline.checkpoints.optimizer_state import read_optimizer, write_optimizer
from telltale.train.pipeline.checkpoints.steps import (
    FORMAT,
    PART_FILE,
    Part,
    Step,
    complete_steps,
    describe_files,
    open_step,
    prune,
    remove_leftovers,
    step_folder,
)
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.policies import BY_BATCH, Policy
from telltale.train.pipeline.runtime.stage import Stage

if TYPE_CHECKING:
    from telltale.train.pipeline.trainer import PipelineTrainer

Result = TypeVar("Result")


def save(trainer: PipelineTrainer, directory: str | Path, *, keep: int = 2) -> Path:
    """Write the state between two runs to ``directory/step-<next minibatch>``; every rank calls it.

    ``directory`` is one that all ranks see; its newest ``keep`` steps are kept. A training that branches off an older step needs
    a directory of its own, since the newest step counts. Raises
    :class:`~telltale.errors.CheckpointError` on every rank if any of them could not write; older steps stay as they are.
    """
    check_integer("keep", keep, low=1)
    target = step_folder(directory, trainer.minibatch)
    token = trainer.groups.told_by_first(secrets.token_hex(8))
    number, replica = trainer.plan.place(trainer.rank)

    def write() -> None:
        if replica == 0:
            with atomic_directory(target / f"stage-{number}") as aside:
                _write_part(trainer, aside, number, token)

    together(trainer, write)

    def commit() -> None:
        if trainer.rank == 0:
            if any(part.manifest["save"] != token for part in open_step(target).parts):
                raise CheckpointError(f"{target} holds parts of another save; expected a folder that all ranks share.")
            prune(directory, keep)

    together(trainer, commit)
    return target


def resume(trainer: PipelineTrainer, directory: str | Path, *, switch_policy: bool = False) -> int:
    """Go on from the newest complete step in ``directory``, or from the one step whose folder it is; every rank calls it.

    Returns the next minibatch. ``switch_policy`` allows a checkpoint of another policy. Raises
    :class:`~telltale.errors.CheckpointError` on every rank if there is no complete step, a file is damaged, or the step is of
    another model or policy.
    """
    step = together(trainer, lambda: open_step(directory))
    told = trainer.groups.told_by_first(str(step.minibatch))
    number, _ = trainer.plan.place(trainer.rank)

    def read() -> Callable[[], None]:
        if str(step.minibatch) != told:
            raise CheckpointError(
                f"{directory} ends with minibatch {step.minibatch} here and {told} on the first rank."
            )
        check(step, trainer.model.fingerprint, trainer.plan, trainer.policy, switch_policy=switch_policy)
        return _prepared(trainer, step, number)

    # All ranks have read before any of them changes: an error must not leave a model of two steps.
    together(trainer, read)()
    trainer.minibatch = step.minibatch
    return step.minibatch


def resume_newest(trainer: PipelineTrainer, directory: str | Path, *, stop: int) -> int:
    """As :func:`resume`, after clearing what killed saves left; minibatch 0 and nothing changed if there is no step.

    A step inside a round, where an earlier run ended, is only good for that run's own ``stop``: to go on from there the one
    before is taken.
    """

    def clear() -> None:
        if trainer.rank == 0:
            remove_leftovers(directory)

    together(trainer, clear)
    steps = together(trainer, lambda: complete_steps(directory))
    whole = [step for step in steps if step.minibatch % trainer.policy.alignment == 0 or step.minibatch >= stop]
    chosen = trainer.groups.told_by_first((whole or steps)[-1].path.name if steps else None)
    return resume(trainer, Path(directory) / chosen) if chosen is not None else 0


def together(trainer: PipelineTrainer, action: Callable[[], Result]) -> Result:
    """Run ``action`` on every rank; a CheckpointError on one of them is raised on all, after all have finished."""
    result, problem = None, None
    try:
        result = action()
    except CheckpointError as error:
        problem = str(error)
    except BaseException as error:
        trainer.record.publish(error)
        raise
    told = [line for line in trainer.groups.told_by_all(problem) if line]
    if told:
        raise CheckpointError(told[0])
    return result  # type: ignore[return-value]


def check(step: Step, fingerprint: str, plan: Plan, policy: Policy, *, switch_policy: bool) -> None:
    """Raise :class:`~telltale.errors.CheckpointError` if training under ``plan`` cannot go on from ``step``."""
    part = step.parts[0]
    file, found = part.path / PART_FILE, part.manifest
    if found["fingerprint"] != fingerprint:
        raise CheckpointError(
            f"{file} is of another model (fingerprint {found['fingerprint']}); expected one of this model ({fingerprint})."
        )
    if found["plan"]["policy"] != plan.policy and not switch_policy:
        raise CheckpointError(
            f"{file} was written under policy {found['plan']['policy']!r}; expected {plan.policy!r}, or switch_policy=True to "
            f"go on under another one."
        )
    if not _same_pattern(step, plan, policy) and step.minibatch % policy.alignment:
        raise CheckpointError(
            f"{step.path} is inside a round of this plan; expected a step at a multiple of {policy.alignment} minibatches."
        )


def read_tensors(parts: Iterable[Part], wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Every tensor of ``parts`` whose key is ``wanted``, in CPU memory. Raises :class:`~telltale.errors.CheckpointError`."""
    found: dict[str, Tensor] = {}
    for part in parts:
        part.verify()
        try:
            reader = dcp.FileSystemReader(part.path)
            sizes = reader.read_metadata().state_dict_metadata
            state: dict[str, Any] = {
                key: torch.empty(form.size, dtype=form.properties.dtype)
                for key, form in sizes.items()
                if isinstance(form, TensorStorageMetadata) and key not in found and wanted(key)
            }
            if state:
                with _without_dist_warning():
                    dcp.load(state, storage_reader=reader, no_dist=True)
        except (OSError, RuntimeError, ValueError, EOFError, dcp.api.CheckpointException) as error:
            raise CheckpointError(f"{part.path} cannot be read: {str(error).splitlines()[0]}") from error
        found |= state
    return found


def buffers_of(stage: Stage) -> dict[str, Tensor]:
    """Unsplit name -> persistent buffer of a stage."""
    own = {id(buffer) for buffer in stage.buffers()}
    state = stage.model.value.root.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if id(tensor) in own}


def _write_part(trainer: PipelineTrainer, folder: Path, number: int, token: str) -> None:
    stage, versions = trainer.stage, trainer.versions
    parameters = {stage.names[local]: parameter for local, parameter in stage.named_parameters()}
    tensors = {f"model.{name}": tensor.detach() for name, tensor in (parameters | buffers_of(stage)).items()}
    for version, weights in versions.past().items():
        tensors |= {f"versions.{version}.{stage.names[local]}": tensor for local, tensor in weights.items()}
    optimizer, state = write_optimizer(trainer.optimizer.optimizer, parameters)
    with _without_dist_warning():
        dcp.save(tensors | state, storage_writer=dcp.FileSystemWriter(folder, sync_files=False), no_dist=True)
    manifest = {
        "format": FORMAT,
        "minibatch": trainer.minibatch,
        "stage": number,
        "stages": len(trainer.plan.stages),
        "save": token,
        "fingerprint": trainer.model.fingerprint,
        "plan": dataclasses.asdict(trainer.plan),
        "version": versions.current,
        "optimizer": optimizer,
        "files": describe_files(folder),
    }
    write_atomically(folder / PART_FILE, json.dumps(manifest, indent=1) + "\n")


def _prepared(trainer: PipelineTrainer, step: Step, number: int) -> Callable[[], None]:
    """Read and check this rank's state out of ``step``; the result puts it in place."""
    stage, plan, policy = trainer.stage, trainer.plan, trainer.policy
    parameters = {stage.names[local]: parameter for local, parameter in stage.named_parameters()}
    targets = parameters | buffers_of(stage)
    exact, same_cut = _same_pattern(step, plan, policy), _same_stages(step, plan)
    parts = step.parts[number : number + 1] if same_cut else step.parts
    tensors = read_tensors(parts, lambda key: _name_in(key) in targets)
    for name, target in targets.items():
        saved = tensors.get(f"model.{name}")
        if saved is None or saved.shape != target.shape:
            shape = "nothing" if saved is None else list(saved.shape)
            raise CheckpointError(f"{step.path} has {shape} for {name}; expected shape {list(target.shape)}.")
    optimizer = trainer.optimizer.optimizer
    restored = read_optimizer(optimizer, parameters, parts, tensors)
    past = _past_versions(tensors, stage, trainer.device) if exact else {}

    @torch.no_grad()
    def apply() -> None:
        if optimizer is not None and restored is not None:
            optimizer.load_state_dict(restored)
        for name, target in targets.items():
            target.data.copy_(tensors[f"model.{name}"])
        trainer.versions.restart(-(-step.minibatch // policy.round_size(number)), past)

    return apply


def _past_versions(tensors: dict[str, Tensor], stage: Stage, device: torch.device) -> dict[int, dict[str, Tensor]]:
    """Version -> stage-local name -> value."""
    local_names = {name: local for local, name in stage.names.items()}
    past: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, rest = key.partition(".")
        if kind == "versions":
            version, _, name = rest.partition(".")
            past.setdefault(int(version), {})[local_names[name]] = tensor.to(device)
    return past


def _name_in(key: str) -> str:
    """The unsplit name in a key; the optimizer's keys end with what they are of it."""
    kind, _, rest = key.partition(".")
    if kind == "model":
        return rest
    if kind == "versions":
        return rest.partition(".")[2]
    return rest.partition(".")[2].rpartition(".")[0]


def _same_stages(step: Step, plan: Plan) -> bool:
    saved = step.parts[0].manifest["plan"]["stages"]
    return [(list(s["layers"]), s["replicas"]) for s in saved] == [(list(s.layers), s.replicas) for s in plan.stages]


def _same_pattern(step: Step, plan: Plan, policy: Policy) -> bool:
    """Whether the versions in ``step`` are those that ``plan`` will ask for."""
    saved = step.parts[0].manifest["plan"]
    if saved["policy"] != plan.policy:
        return False
    if _same_stages(step, plan) and saved["microbatches"] == plan.microbatches:
        return True
    replicas = tuple(stage["replicas"] for stage in saved["stages"])
    return (
        policy.name in BY_BATCH
        and Policy(policy.name, replicas, saved["microbatches"]).microbatches == policy.microbatches
    )


@contextmanager
def _without_dist_warning() -> Iterator[None]:
    """Each stage writes alone on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
