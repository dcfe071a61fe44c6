"""Running a live model's forward pass for a second derivative, on copies of everything that it may change.

Parameters, buffers, generators and plain attributes of the modules are exchanged for copies (``torch.func.functional_call``),
half precision for float32; what the pass leaves behind goes with them. Switched for the length of the block, on the modules
themselves: compiled code to eager, activation checkpointing of Transformers off, synchronised batch norm to that of one
process. The functions that the model calls are those of :mod:`telltale.signals.quiet`. Random state is the probe's own.

Tensors of a minibatch of any form can be found and moved to another device or precision.
"""

from __future__ import annotations

import copy
import functools
import random
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from telltale.config import check_choice
from telltale.errors import DataError
from telltale.signals.quiet import HALF, RandomState, own_precision

MODES = ("as is", "no dropout", "eval", "train")
T = TypeVar("T")


class Isolated:
    """``model`` and the modules that ``loss_fn`` holds, to be run on copies. ``mode`` is the train/eval flag inside: "as is",
    "eval", "train", or "no dropout": eval for all but batch and instance norm, which keep their own. Random numbers come from
    ``seed``.
    """

    def __init__(self, model: nn.Module, loss_fn: Any, *, mode: str, seed: int) -> None:
        check_choice("mode", mode, MODES)
        self.model, self.mode, self.seed = model, mode, seed
        held = list(_held_by(loss_fn))
        inside = set(map(id, model.modules()))
        others = [one for one in held if isinstance(one, nn.Module) and id(one) not in inside]
        self._generators = [one for one in held if isinstance(one, torch.Generator)]
        self._whole = _Whole([model, *others])

    def parameters(self) -> dict[str, nn.Parameter]:
        """The live parameters by name, those beside the model (in modules that the loss holds) under ``beside.``."""
        named = self._whole.named_parameters()
        return {_public(name): parameter for name, parameter in named}

    @own_precision()
    def values(
        self, dtype: torch.dtype | None = None, trained: Callable[[str], bool] | None = None
    ) -> dict[str, Tensor]:
        """Copies of the parameters by name; frozen ones stay live. ``dtype`` None: float32 for half precision, else their own.
        ``trained`` says which ones require a gradient, of those whose originals do."""
        found = {}
        renormalised = {
            _public(f"{name}.weight")
            for name, module in self._whole.named_modules()
            if getattr(module, "max_norm", None) is not None
        }
        for name, parameter in self.parameters().items():
            if parameter.is_meta or nn.parameter.is_lazy(parameter):
                raise DataError(
                    f"parameter {name} holds no values (meta device or lazy); expected an initialised model."
                )
            if not parameter.requires_grad and parameter.dtype not in HALF and name not in renormalised:
                continue  # Nothing changes it, and a frozen model may be large.
            wanted = parameter.requires_grad and (trained is None or trained(name))
            found[name] = _copied(parameter, dtype).requires_grad_(wanted)
        return found

    @own_precision()
    def buffers(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Copies of all buffers by name, in the precision of :meth:`values`."""
        return {_public(name): _copied(buffer, dtype) for name, buffer in self._whole.named_buffers()}

    def run(
        self,
        thunk: Callable[[], T],
        values: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        quiet: AbstractContextManager[object],
    ) -> T:
        """``thunk()``, with ``values`` and ``buffers`` in the modules' places. What it changes there is gone afterwards."""
        modules = list(self._whole.modules())
        live = self.parameters() | {_public(name): buffer for name, buffer in self._whole.named_buffers()}
        given = {**values, **buffers}
        places = {id(live[name]): tensor for name, tensor in given.items() if name in live}
        with ExitStack() as stack:
            stack.enter_context(own_random_state(self.seed))
            stack.enter_context(_seeded(self._generators, self.seed))
            stack.enter_context(own_precision())
            stack.enter_context(torch.enable_grad())
            stack.enter_context(_own_attributes(modules, places, self.seed))
            stack.enter_context(_attributes(_switches(modules, self.mode)))
            stack.enter_context(quiet)
            inner = {_private(name): tensor for name, tensor in given.items()}
            found: T = torch.func.functional_call(self._whole, inner, (thunk,))
            return found


class _Whole(nn.Module):
    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, thunk: Callable[[], T]) -> T:
        return thunk()


def _public(name: str) -> str:
    return name.removeprefix("parts.0.") if name.startswith("parts.0.") else "beside." + name.removeprefix("parts.")


def _private(name: str) -> str:
    return "parts." + name.removeprefix("beside.") if name.startswith("beside.") else "parts.0." + name


def _copied(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    value = tensor.detach().clone()
    if dtype is None:
        return value.float() if value.dtype in HALF else value
    return value.to(dtype) if value.is_floating_point() else value


@contextmanager
def own_random_state(seed: int) -> Iterator[None]:
    """Torch's, NumPy's and Python's random state start at ``seed`` inside, and are as before afterwards."""
    before = RandomState.now()
    try:
        seed_all(seed)
        yield
    finally:
        before.set()


def seed_all(seed: int) -> None:
    """Torch's, NumPy's and Python's random numbers start at ``seed``."""
    # torch.manual_seed also queues a call for an uninitialised CUDA, which costs milliseconds.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def original(model: nn.Module) -> nn.Module:
    """The module under torch.compile, DistributedDataParallel and DataParallel wrappers, in whatever order they nest."""
    found = model
    while True:
        if isinstance(getattr(found, "_orig_mod", None), nn.Module):
            found = found._orig_mod  # type: ignore[assignment]
        elif isinstance(found, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            found = found.module
        else:
            return found


def uncompiled(function: Callable[..., T]) -> Callable[..., T]:
    """The function under ``torch.compile``."""
    found: Callable[..., T] = getattr(function, "_torchdynamo_orig_callable", function)
    return found


def _held_by(function: Any) -> Iterator[Any]:
    """What a loss function reads beside its arguments: itself, the object it is a method of, closures, globals by name."""
    if isinstance(function, functools.partial):
        yield from _held_by(function.func)
        yield from (*function.args, *function.keywords.values())
        return
    yield function
    owner = getattr(function, "__self__", None)
    if owner is not None:
        yield owner
        yield from vars(owner).values() if hasattr(owner, "__dict__") and not isinstance(owner, nn.Module) else ()
    plain = function if isinstance(function, types.FunctionType) else getattr(function, "__func__", None)
    if isinstance(plain, types.FunctionType):
        yield from (cell.cell_contents for cell in plain.__closure__ or () if _filled(cell))
        yield from plain.__defaults__ or ()
        yield from (plain.__globals__[name] for name in plain.__code__.co_names if name in plain.__globals__)
    elif hasattr(function, "__dict__") and not isinstance(function, nn.Module):
        yield from vars(function).values()


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


@contextmanager
def _seeded(generators: Iterable[torch.Generator], seed: int) -> Iterator[None]:
    """Generators in places that cannot be exchanged, such as a closure, start at ``seed`` inside."""
    before = [(generator, generator.get_state()) for generator in generators]
    try:
        for generator, _ in before:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in before:
            generator.set_state(state)


def _switches(modules: Iterable[nn.Module], mode: str) -> list[tuple[Any, str, Any]]:
    """(owner, attribute, value inside the block)."""
    found: list[tuple[Any, str, Any]] = []
    for module in modules:
        normalises = isinstance(module, (_BatchNorm, _InstanceNorm))
        if mode in ("eval", "train") or (mode == "no dropout" and not normalises):
            found.append((module, "training", mode == "train"))
        if isinstance(module, nn.SyncBatchNorm):
            found.append((module, "__class__", _LocalBatchNorm))
        if getattr(module, "_compiled_call_impl", None) is not None:
            found.append((module, "_compiled_call_impl", None))
        if isinstance(getattr(module, "_orig_mod", None), nn.Module):
            found.append((module, "forward", module._orig_mod.__call__))  # type: ignore[operator]
        if getattr(module, "gradient_checkpointing", False) is True:
            found.append((module, "gradient_checkpointing", False))
        config = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) not in (None, "eager", "sdpa"):
            found.append((config, "_attn_implementation", "sdpa"))
    return found


class _LocalBatchNorm(_BatchNorm):
    """What a synchronised one is on one process: the others do not take part in a probe, so waiting for them never ends."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


def attributes_of(model: nn.Module, mode: str) -> AbstractContextManager[None]:
    """The flags and switches of ``mode`` on the live modules of ``model`` inside, and as before afterwards."""
    check_choice("mode", mode, MODES)
    return _attributes(_switches(model.modules(), mode))


@contextmanager
def _attributes(switches: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    before = []
    try:
        for owner, name, value in switches:
            before.append((owner, name, getattr(owner, name)))
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in reversed(before):
            setattr(owner, name, value)


_TABLES = ("_parameters", "_buffers", "_modules")
"""What ``functional_call`` looks after; entries that a forward pass adds there are taken out again."""
_COPIED = (np.ndarray, np.random.Generator, np.random.RandomState, random.Random)
_LEFT = (nn.Module, type, types.ModuleType, types.FunctionType, types.MethodType, str, int, float, type(None))
_PLAIN = frozenset((str, int, float, bool, type(None)))
_DEEP = 3


@contextmanager
def _own_attributes(modules: Iterable[nn.Module], places: Mapping[int, Tensor], seed: int) -> Iterator[None]:
    """Copies in place of the modules' plain attributes that a forward pass may change: tensors, generators, lists, tables and
    the fields of objects of the module's own package. A tensor that is also a parameter or buffer (an LSTM's list of weights)
    becomes its copy."""
    before: list[tuple[dict[str, Any], dict[str, Any]]] = []
    seen: dict[int, Any] = {}

    def own(value: Any, depth: int, package: str) -> Any:
        if isinstance(value, Tensor):
            return places[id(value)] if id(value) in places else _same_kind(value, seen)
        if type(value) is torch.Generator:
            return seen.setdefault(id(value), _seeded_copy(value, seed))
        if isinstance(value, _COPIED):
            return seen.setdefault(id(value), copy.deepcopy(value))
        if isinstance(value, _LEFT) or depth == _DEEP:
            return value
        if type(value) is dict:
            return {key: own(one, depth + 1, package) for key, one in value.items()}
        if type(value) in (list, tuple, set):
            return type(value)(own(one, depth + 1, package) for one in value)
        if type(value) is deque:
            return deque((own(one, depth + 1, package) for one in value), value.maxlen)
        if hasattr(value, "__dict__") and _package(value) == package and id(value) not in seen:
            seen[id(value)] = value
            exchange(value.__dict__, depth + 1, package)
        return value

    def exchange(fields: dict[str, Any], depth: int, package: str) -> None:
        before.append((fields, dict(fields)))
        for name, value in list(fields.items()):
            if name in _TABLES and type(value) is dict:
                before.append((value, dict(value)))
            elif type(value) not in _PLAIN and not name.endswith("_hooks"):
                fields[name] = own(value, depth, package)

    try:
        for module in modules:
            exchange(module.__dict__, 0, _package(module))
        yield
    finally:
        for fields, old in reversed(before):
            if fields.keys() != old.keys() or any(fields[key] is not old[key] for key in old):
                fields.clear()
                fields.update(old)


def _package(thing: Any) -> str:
    return type(thing).__module__.partition(".")[0]


def _seeded_copy(generator: torch.Generator, seed: int) -> torch.Generator:
    found = generator.clone_state()
    found.manual_seed(seed)
    return found


def _same_kind(tensor: Tensor, seen: dict[int, Any]) -> Tensor:
    if id(tensor) not in seen:
        found = tensor.detach().clone().requires_grad_(tensor.requires_grad and tensor.is_leaf)
        seen[id(tensor)] = found
        if found.requires_grad:
            found.telltale_copy_of = tensor  # type: ignore[attr-defined]
    copied: Tensor = seen[id(tensor)]
    return copied


def live_of(tensor: Tensor) -> Tensor:
    """What ``tensor`` was copied from where it is a copy of a module's plain attribute, else itself."""
    found: Tensor = getattr(tensor, "telltale_copy_of", tensor)
    return found


def in_full_precision(batch: Any, dtype: torch.dtype | None = None) -> Any:
    """``batch`` with its floating tensors in ``dtype`` (None: half precision as float32), through mappings, lists and tuples;
    itself if nothing changes."""
    if dtype is None:
        return _mapped(batch, lambda tensor: tensor.float() if tensor.dtype in HALF else tensor)
    return _mapped(batch, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def on_device(batch: Any, device: torch.device) -> Any:
    """``batch`` with its tensors on ``device``; itself if they are there."""
    return _mapped(batch, lambda tensor: tensor.to(device))


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a ``DTensor``, of which this process may hold a part."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, on the same memory; any other tensor itself, detached."""
    with torch.no_grad():
        part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
        return part.detach()


def rows(batch: Any) -> int | None:
    """Length of the first tensor in the minibatch; None if there is none."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else None
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, (list, tuple)):
        return next((size for size in map(rows, batch) if size is not None), None)
    return None


def _mapped(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The container is only made anew where a tensor changed: one of the user's own kind may have more than items."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        fields = {key: _mapped(value, function) for key, value in batch.items()}
        if all(fields[key] is value for key, value in batch.items()):
            return batch
        return _of_kind(batch, fields)
    if isinstance(batch, (list, tuple)):
        values = [_mapped(value, function) for value in batch]
        if all(one is other for one, other in zip(values, batch, strict=True)):
            return batch
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch


def _of_kind(batch: Mapping[Any, Any], fields: dict[Any, Any]) -> Any:
    """``fields`` as a mapping like ``batch``, such as Transformers' BatchEncoding with its attributes; a dict if it cannot be."""
    try:
        return type(batch)(fields)  # type: ignore[call-arg]
    except TypeError:
        return fields
