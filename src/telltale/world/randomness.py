"""Common random numbers: two runs that replay one generator state, and randomness that a model draws elsewhere, replayed too.

A user's module may call ``torch.randn``, dropout, NumPy or ``random``, or hold a generator of its own. Inside
:func:`replayed_own_randomness` all of these start from states that depend on one seed alone, and the process's own
states are as they were afterwards.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from telltale.config import check_seed
from telltale.world.plugs import modules_of, parts_of


def seeded(seed: int | None = None, generator: torch.Generator | None = None) -> torch.Generator:
    """The generator given, or a new one with ``seed`` (0 where both are None)."""
    if generator is not None:
        return generator
    check_seed(0 if seed is None else seed)
    return torch.Generator().manual_seed(0 if seed is None else seed)


def copy_of(generator: torch.Generator) -> torch.Generator:
    """A generator that will draw what ``generator`` would draw next; the original does not move."""
    twin = torch.Generator(device=generator.device)
    twin.set_state(generator.get_state())
    return twin


def drawn_seed(generator: torch.Generator) -> int:
    """A seed drawn from ``generator``."""
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))


@contextmanager
def replayed_own_randomness(model: Any, seed: int) -> Iterator[None]:
    """Run a block whose global and model-held randomness depends on ``seed`` only, and undo every change of state."""
    held = list(_held_generators(model))
    kept = [read() for read, _, _ in held]
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=_devices(model)):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        for _, _, reseed in held:
            reseed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)
            for (_, restore, _), state in zip(held, kept, strict=True):
                restore(state)


def _held_generators(model: Any) -> Iterator[tuple[Callable[[], Any], Callable[[Any], Any], Callable[[int], Any]]]:
    """Reader, writer and seeding of each generator that the model, or a module or object in it, keeps."""
    for part in parts_of(model):
        owners = part.modules() if isinstance(part, torch.nn.Module) else ()
        for value in (part, *(held for owner in owners for held in list(owner.__dict__.values()))):
            if isinstance(value, torch.Generator):
                yield value.get_state, value.set_state, value.manual_seed
            elif isinstance(value, random.Random):
                yield value.getstate, value.setstate, value.seed
            elif isinstance(value, np.random.RandomState):
                yield value.get_state, value.set_state, partial(_seed_legacy, value)
            elif isinstance(value, np.random.Generator):
                yield partial(_read, value), partial(_write, value), partial(_seed, value)


def _read(value: np.random.Generator) -> Any:
    return value.bit_generator.state


def _write(value: np.random.Generator, state: Any) -> None:
    value.bit_generator.state = state


def _seed(value: np.random.Generator, seed: int) -> None:
    value.bit_generator.state = type(value.bit_generator)(seed).state


def _seed_legacy(value: np.random.RandomState, seed: int) -> None:
    value.seed(seed % 2**32)


def _devices(model: Any) -> list[int]:
    parameters = (p for module in modules_of(model) for p in module.parameters())
    return sorted({p.device.index or 0 for p in parameters if p.device.type == "cuda"})
