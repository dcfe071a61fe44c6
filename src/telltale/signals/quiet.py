"""A forward pass whose second derivatives are right, for one thread and for the length of a block.

:class:`Quiet` sees every PyTorch function that the model calls. Autocast is left where a model or a loop switched it on,
lower precisions become the one that was asked for, fused attention and the fused weight norm become composed operations
(they have no second derivative, or a wrong one), sparse embedding gradients become dense, and an embedding's ``max_norm``
acts once on the weights that the pass is given, and is no part of the function that is differentiated. Nothing of the
process is changed: no attribute of PyTorch, no flag of a backend.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from telltale.signals.second_derivatives import gelu

HALF = (torch.float16, torch.bfloat16)
_DEVICES = ("cpu", "cuda", "mps", "xpu")
_CASTS = {Tensor.half, Tensor.bfloat16, Tensor.float}
_DRAWN = {torch.rand, torch.randn, torch.rand_like, torch.randn_like, torch.normal, torch.bernoulli, Tensor.bernoulli}
_FILLED = {Tensor.normal_, Tensor.uniform_, Tensor.exponential_, Tensor.bernoulli_}
_DROPOUTS = {functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d, torch.dropout}
_IN_PLACE = {f"__{name}__" for name in ("iadd", "isub", "imul", "itruediv", "ipow", "imatmul", "setitem", "set")}


class Quiet(TorchFunctionMode):
    """``dtype``: what lower floating dtypes become. ``drawn``: the dtype in which random numbers are drawn, so that a pass in
    another precision sees the same ones. ``instead``: id of a tensor -> what takes its place. ``keep``: GELU with its kept
    second derivative; not for a graph that is computed anew during a backward pass. ``renormalise``: whether a ``max_norm``
    is enforced on the weights, once before they are read, or taken as enforced. ``composed`` False leaves fused operations as
    they are, for passes that nothing is differentiated of.

    ``fixed`` collects (weight, row) of embeddings whose padding row has no gradient though the loss depends on it; ``kept``
    says whether a kept form was used.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        *,
        drawn: torch.dtype | None = None,
        instead: Mapping[int, Tensor] | None = None,
        keep: bool = True,
        renormalise: bool = True,
        composed: bool = True,
    ) -> None:
        super().__init__()
        self.dtype, self.drawn = dtype, dtype if drawn is None else drawn
        self.keep, self.renormalise = keep, renormalise
        self._own = _OWN if composed else _LOOKED_UP
        self.kept = False
        self.fixed: list[tuple[Tensor, int]] = []
        self._lower = HALF if dtype == torch.float32 else (*HALF, torch.float32)
        self._instead = dict(instead or {})

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        keywords = dict(keywords or {})
        leave_autocast()
        inside_vmap = torch._C._are_functorch_transforms_active()
        if not inside_vmap and self.drawn != self.dtype and function in _RANDOM:
            return self._random(function, arguments, keywords)
        name = getattr(function, "__name__", "")
        # What is written to has to stay the tensor that it is.
        written = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
        taken = [self._mapped(one, cast=index > 0 or not written) for index, one in enumerate(arguments)]
        keywords = {key: self._mapped(value, cast=key != "out") for key, value in keywords.items()}
        if function in _CASTS:
            return taken[0].to(self.dtype)
        own = None if inside_vmap else self._own.get(function)
        found = function(*taken, **keywords) if own is None else own(self, *taken, **keywords)
        if isinstance(found, Tensor) and found.dtype in self._lower and not _holds_tensors((arguments, keywords)):
            return found.to(self.dtype)
        return found

    def _mapped(self, thing: Any, *, cast: bool = True) -> Any:
        """``thing`` with substitutes for its tensors and in the right precision, through lists, tuples and dicts."""
        if isinstance(thing, torch.dtype):
            return self.dtype if thing in self._lower else thing
        if isinstance(thing, Tensor):
            thing = self._instead.get(id(thing), thing)
            return thing.to(self.dtype) if cast and thing.dtype in self._lower else thing
        if type(thing) in (list, tuple):
            found = [self._mapped(one, cast=cast) for one in thing]
            same = all(one is other for one, other in zip(thing, found, strict=True))
            return thing if same else type(thing)(found)
        if type(thing) is dict:
            return {key: self._mapped(value, cast=cast) for key, value in thing.items()}
        return thing

    def _random(self, function: Any, arguments: Any, keywords: Any) -> Any:
        """What the pass in ``drawn`` sees, in this pass's precision."""
        first = self._mapped(arguments[0] if arguments else keywords.pop("input", None))
        if function in _FILLED:
            return first.copy_(function(torch.empty_like(first, dtype=self.drawn), *arguments[1:], **keywords))
        if function in _DROPOUTS:
            ones = torch.ones_like(first, dtype=self.drawn, requires_grad=False)
            return first * function(ones, *arguments[1:], **keywords).to(first)
        given = [one.to(self.drawn) if isinstance(one, Tensor) else one for one in (first, *arguments[1:])]
        if keywords.get("dtype") == self.dtype:
            keywords["dtype"] = self.drawn
        return function(*given, **keywords).to(self.dtype)


def leave_autocast() -> None:
    """Off in this thread, until the block that switched it on ends and puts back what was before."""
    if torch._C._is_any_autocast_enabled():
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                torch.set_autocast_enabled(device, False)


@contextmanager
def own_precision() -> Iterator[None]:
    """Autocast and inference mode of whoever calls are off inside, and back afterwards."""
    on = [device for device in _DEVICES if torch.is_autocast_enabled(device)]
    leave_autocast()
    try:
        with torch.inference_mode(False):
            yield
    finally:
        for device in on:
            torch.set_autocast_enabled(device, True)


@dataclass(frozen=True)
class RandomState:
    """Of PyTorch on every device in use, NumPy and Python, at one moment."""

    python: Any
    numpy: Any
    cpu: Tensor
    cuda: list[Tensor]

    @classmethod
    def now(cls) -> RandomState:
        """The present one."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)

    def set(self) -> None:
        """Go on from this one."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Go on from this one inside, and afterwards from where it was before."""
        before = RandomState.now()
        self.set()
        try:
            yield
        finally:
            before.set()


def _holds_tensors(thing: Any) -> bool:
    if isinstance(thing, Tensor):
        return True
    if isinstance(thing, dict):
        thing = thing.values()
    elif not isinstance(thing, (list, tuple)):
        return False
    return any(_holds_tensors(one) for one in thing)


def _embedding(mode: Quiet, /, *arguments: Any, **keywords: Any) -> Tensor:
    return _looked_up(mode, functional.embedding, arguments, keywords)


def _embedding_bag(mode: Quiet, /, *arguments: Any, **keywords: Any) -> Tensor:
    return _looked_up(mode, functional.embedding_bag, arguments, keywords)


def _looked_up(mode: Quiet, function: Callable[..., Tensor], arguments: Any, keywords: Any) -> Tensor:
    """Dense, and renormalised beforehand on the weights that the pass is given."""
    bound = inspect.signature(function).bind(*arguments, **keywords)
    bound.apply_defaults()
    given = bound.arguments
    if given["max_norm"] is not None and mode.renormalise:
        with torch.no_grad():
            torch.embedding_renorm_(
                given["weight"].detach(), given["input"].contiguous(), given["max_norm"], given["norm_type"]
            )
    if given["padding_idx"] is not None:
        mode.fixed.append((given["weight"], int(given["padding_idx"]) % len(given["weight"])))
    given["max_norm"], given["sparse"] = None, False
    return function(*bound.args, **bound.kwargs)


def _attention(
    mode: Quiet,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """PyTorch's own composition: twice differentiable, unlike the fused kernels."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    mixed: Tensor = torch._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]
    return mixed


def _multi_head(mode: Quiet, /, *arguments: Any, **keywords: Any) -> Any:
    """With the weights, for which attention is written out; they are handed on only if they were asked for."""
    bound = inspect.signature(functional.multi_head_attention_forward).bind(*arguments, **keywords)
    bound.apply_defaults()
    wanted, bound.arguments["need_weights"] = bound.arguments["need_weights"], True
    mixed, weights = functional.multi_head_attention_forward(*bound.args, **bound.kwargs)
    return mixed, weights if wanted else None


def _weight_norm(mode: Quiet, v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """g v / |v|. The second derivative of PyTorch's fused form is wrong."""
    found: Tensor = v * (g / torch.norm_except_dim(v, 2, dim))
    return found


def _gelu(mode: Quiet, x: Tensor, *, approximate: str = "none") -> Tensor:
    kept = mode.keep and approximate == "none" and torch.is_grad_enabled() and x.requires_grad
    mode.kept |= kept
    return gelu(x) if kept else functional.gelu(x, approximate=approximate)


_RANDOM = _DRAWN | _FILLED | _DROPOUTS
_LOOKED_UP: dict[Any, Callable[..., Any]] = {
    functional.embedding: _embedding,
    functional.embedding_bag: _embedding_bag,
}
_OWN: dict[Any, Callable[..., Any]] = _LOOKED_UP | {
    functional.scaled_dot_product_attention: _attention,
    functional.multi_head_attention_forward: _multi_head,
    torch._weight_norm: _weight_norm,
    functional.gelu: _gelu,
}
"""What takes the place of a function; each is given the mode first."""
