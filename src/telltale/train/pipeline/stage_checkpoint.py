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

Optimizer state by the unsplit model's names, whatever stages the parameters were or will be on.

Tensors go to the checkpoint as ``optimizer.state.<name>.<key>``, the names that torch's flattened optimizer state dicts have;
plain values and the options of parameter groups go to the manifest, per parameter.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from telltale.config import check_integer
from telltale.errors import CheckpointError
from telltale.runs.files import atomic_directory, write_atomically
from telltale.train.pipeline.checkpoint_files import (
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
from telltale.train.pipeline.runtime.stage import Stage
from telltale.train.pipeline.schedule import BY_BATCH, Policy

if TYPE_CHECKING:
    from telltale.train.pipeline.layers import LayeredModel
    from telltale.train.pipeline.runtime.collectives import World
    from telltale.train.pipeline.runtime.failures import FlightRecord
    from telltale.train.pipeline.runtime.optimizer import StageOptimizer
    from telltale.train.pipeline.runtime.stage import WeightVersions

Result = TypeVar("Result")


@dataclass(frozen=True)
class StagePart:
    """One stage of a rank; an interleaved plan gives a rank several."""

    number: int
    replica: int
    stage: Stage
    versions: WeightVersions
    optimizer: StageOptimizer


class RankState(Protocol):
    """A rank that can be told of another's errors."""

    record: FlightRecord

    @property
    def groups(self) -> World:
        """All ranks."""


class StageState(RankState, Protocol):
    """What a rank's checkpoint is made of; a :class:`~telltale.train.pipeline.trainer.PipelineTrainer` is one."""

    rank: int
    minibatch: int
    """The next minibatch."""
    model: LayeredModel
    plan: Plan
    policy: Policy
    device: torch.device

    @property
    def parts(self) -> list[StagePart]:
        """The stages that this rank runs."""


def save(state: StageState, directory: str | Path, *, keep: int = 2) -> Path:
    """Write the state between two runs to ``directory/step-<next minibatch>``; every rank calls it.

    ``directory`` is one that all ranks see; its newest ``keep`` steps are kept. A training that branches off an older step needs
    a directory of its own, since the newest step counts. Raises
    :class:`~telltale.errors.CheckpointError` on every rank if any of them could not write; older steps stay as they are.
    """
    check_integer("keep", keep, low=1)
    target = step_folder(directory, state.minibatch)
    token = state.groups.broadcast_object(secrets.token_hex(8))

    def write() -> None:
        for part in state.parts:
            if part.replica == 0:
                with atomic_directory(target / f"stage-{part.number}") as aside:
                    _write_part(state, part, aside, token)

    on_all_ranks(state, write)

    def commit() -> None:
        if state.rank == 0:
            if any(part.manifest["save"] != token for part in open_step(target).parts):
                raise CheckpointError(f"{target} holds parts of another save; expected a folder that all ranks share.")
            prune(directory, keep)

    on_all_ranks(state, commit)
    return target


def resume(state: StageState, directory: str | Path, *, switch_policy: bool = False) -> int:
    """Go on from the newest complete step in ``directory``, or from the one step whose folder it is; every rank calls it.

    Returns the next minibatch. ``switch_policy`` allows a checkpoint of another policy. Raises
    :class:`~telltale.errors.CheckpointError` on every rank if there is no complete step, a file is damaged, or the step is of
    another model or policy.
    """
    step = on_all_ranks(state, lambda: open_step(directory))
    first = state.groups.broadcast_object(str(step.minibatch))

    def read() -> list[Callable[[], None]]:
        if str(step.minibatch) != first:
            raise CheckpointError(
                f"{directory} ends with minibatch {step.minibatch} here and {first} on the first rank."
            )
        check(step, state.model.fingerprint, state.plan, state.policy, switch_policy=switch_policy)
        return [_prepared(state, step, part) for part in state.parts]

    # All ranks have read before any of them changes: an error must not leave a model of two steps.
    for apply in on_all_ranks(state, read):
        apply()
    state.minibatch = step.minibatch
    return step.minibatch


def resume_newest(state: StageState, directory: str | Path, *, stop: int) -> int:
    """As :func:`resume`, after clearing what killed saves left; minibatch 0 and nothing changed if there is no step.

    A step inside a round, where an earlier run ended, is only good for that run's own ``stop``: to go on from there the one
    before is taken.
    """

    def clear() -> None:
        if state.rank == 0:
            remove_leftovers(directory)

    on_all_ranks(state, clear)
    steps = on_all_ranks(state, lambda: complete_steps(directory))
    whole = [step for step in steps if step.minibatch % state.policy.alignment == 0 or step.minibatch >= stop]
    chosen = state.groups.broadcast_object((whole or steps)[-1].path.name if steps else None)
    return resume(state, Path(directory) / chosen) if chosen is not None else 0


def on_all_ranks(state: RankState, action: Callable[[], Result]) -> Result:
    """Run ``action`` on every rank; a CheckpointError on one of them is raised on all, after all have finished."""
    result, problem = None, None
    try:
        result = action()
    except CheckpointError as error:
        problem = str(error)
    except BaseException as error:
        state.record.publish(error)
        raise
    problems = [line for line in state.groups.all_gather_object(problem) if line]
    if problems:
        raise CheckpointError(problems[0])
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
            f"{file} was written under policy {found['plan']['policy']!r} and the plan's is {plan.policy!r}; expected a plan "
            f"under the same one (telltale plan --policy), or in Python switch_policy=True."
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


def _write_part(state: StageState, part: StagePart, folder: Path, token: str) -> None:
    stage, versions = part.stage, part.versions
    parameters = {stage.names[local]: parameter for local, parameter in stage.named_parameters()}
    tensors = {f"model.{name}": tensor.detach() for name, tensor in (parameters | buffers_of(stage)).items()}
    for version, weights in versions.past().items():
        tensors |= {f"versions.{version}.{stage.names[local]}": tensor for local, tensor in weights.items()}
    optimizer, optimizer_tensors = write_optimizer(part.optimizer.optimizer, parameters)
    with _without_dist_warning():
        dcp.save(
            tensors | optimizer_tensors, storage_writer=dcp.FileSystemWriter(folder, sync_files=False), no_dist=True
        )
    manifest = {
        "format": FORMAT,
        "minibatch": state.minibatch,
        "stage": part.number,
        "stages": len(state.plan.stages),
        "save": token,
        "fingerprint": state.model.fingerprint,
        "plan": dataclasses.asdict(state.plan),
        "version": versions.current,
        "optimizer": optimizer,
        "files": describe_files(folder),
    }
    write_atomically(folder / PART_FILE, json.dumps(manifest, indent=1) + "\n")


def _prepared(state: StageState, step: Step, part: StagePart) -> Callable[[], None]:
    """Read and check one of this rank's stages out of ``step``; the result puts it in place."""
    stage, number, plan, policy = part.stage, part.number, state.plan, state.policy
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
    optimizer = part.optimizer.optimizer
    restored = read_optimizer(optimizer, parameters, parts, tensors)
    past = _past_versions(tensors, stage, state.device) if exact else {}

    @torch.no_grad()
    def apply() -> None:
        if optimizer is not None and restored is not None:
            optimizer.load_state_dict(restored)
        for name, target in targets.items():
            target.data.copy_(tensors[f"model.{name}"])
        part.versions.restart(-(-step.minibatch // policy.round_size(number)), past)

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


_NOT_RESTORED = ("params", "param_names", "lr")


def write_optimizer(
    optimizer: torch.optim.Optimizer | None, parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(plain values for the manifest, tensors by key) of ``optimizer``, None for a stage without trainable parameters.

    Raises :class:`~telltale.errors.CheckpointError` if the optimizer keeps anything but tensors and plain values.
    """
    document: dict[str, Any] = {"class": None, "state": {}, "options": {}}
    tensors: dict[str, Tensor] = {}
    if optimizer is None:
        return document, tensors
    names = {id(parameter): name for name, parameter in parameters.items()}
    document["class"] = type(optimizer).__name__
    for group in optimizer.param_groups:
        options = {key: _plain(key, value) for key, value in group.items() if key not in _NOT_RESTORED}
        document["options"] |= {names[id(parameter)]: options for parameter in group["params"]}
    for parameter, state in optimizer.state.items():
        name = names[id(parameter)]
        document["state"][name] = {}
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.state.{name}.{key}"] = value.detach()
            else:
                document["state"][name][key] = _plain(key, value)
    return document, tensors


def read_optimizer(
    optimizer: torch.optim.Optimizer | None,
    parameters: Mapping[str, nn.Parameter],
    parts: Iterable[Part],
    tensors: Mapping[str, Tensor],
) -> dict[str, Any] | None:
    """What ``optimizer.load_state_dict`` takes: the state of its parameters out of ``parts`` and ``tensors``; learning rates
    stay its own. None for no optimizer. Nothing is changed here.

    Raises :class:`~telltale.errors.CheckpointError` if another kind of optimizer wrote it, or if parameters that one group
    holds now had different options.
    """
    if optimizer is None:
        return None
    kinds, states, options = _merged(parts)
    wrong = [(file, kind) for kind, file in kinds.items() if kind not in (None, type(optimizer).__name__)]
    if wrong:
        raise CheckpointError(f"{wrong[0][0]} holds the state of {wrong[0][1]}; expected {type(optimizer).__name__}.")
    names = {id(parameter): name for name, parameter in parameters.items()}
    restored = optimizer.state_dict()
    restored["state"] = {}
    for own, group in zip(optimizer.param_groups, restored["param_groups"], strict=True):
        members = [names[id(parameter)] for parameter in own["params"]]
        for index, name in zip(group["params"], members, strict=True):
            prefix = f"optimizer.state.{name}."
            found = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if found or states.get(name):
                restored["state"][index] = states.get(name, {}) | found
        known = [options[name] for name in members if name in options]
        if any(other != known[0] for other in known):
            raise CheckpointError(
                f"the optimizer's options for {members[0]} and others of its group differ in the checkpoint; expected groups "
                f"of parameters that had the same ones."
            )
        for key, value in known[0].items() if known else ():
            group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
    return restored


def _merged(
    parts: Iterable[Part],
) -> tuple[dict[str | None, str], dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    kinds: dict[str | None, str] = {}
    states: dict[str, dict[str, Any]] = {}
    options: dict[str, dict[str, Any]] = {}
    for part in parts:
        document = part.manifest["optimizer"]
        kinds[document["class"]] = str(part.path / PART_FILE)
        states |= document["state"]
        options |= document["options"]
    return kinds, states, options


def _plain(key: str, value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_plain(key, item) for item in value]
    if isinstance(value, Tensor) and value.ndim == 0:
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise CheckpointError(f"the optimizer keeps {key!r} as {type(value).__name__}; expected tensors or plain values.")
