"""What the edge model says of its patches in one pass: logits, an importance per patch, and an embedding per patch.

Attention is not asked of the model (under SDPA Transformers returns none, and all layers' matrices would be many times what is
needed): hooks catch the input of the attention that is wanted, and one row of its softmax is computed again from it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from telltale.errors import ConfigError, NumericalError, UnsupportedModelError
from telltale.models.vision import VisionModel, attentions_of, embeddings_of, projection_of

IMPORTANCES = {
    "cls_last": "attention of the class token in the last layer, mean over heads (SAGE's)",
    "cls_first": "attention of the class token in the first layer",
    "rollout": "product of (A + I) / 2 over all layers, row of the class token",
    "gradient": "length of the gradient of the winning logit in the patch's embedding",
    "map_head": "attention of the pooling head's probe (SigLIP)",
}
SPACES = "last, patch, pixel, block:<layer>, key:<layer>"

Importance = str | Callable[[VisionModel, Tensor], Tensor]
"""A name of :data:`IMPORTANCES`, or ``(model, pixels) -> (batch, patches)``."""


@dataclass(frozen=True)
class Evidence:
    """One pass of the edge model. logits: (batch, classes). importance: (batch, N), sums to 1. embeddings: (batch, N, width)."""

    logits: Tensor
    importance: Tensor
    embeddings: Tensor


def look(vision: VisionModel, pixels: Tensor, *, importance: Importance = "cls_last", space: str = "last") -> Evidence:
    """Run the edge model once on whole images (batch, 3, height, width) and read importance and embeddings off it.

    importance: :data:`IMPORTANCES` or a callable. space: where patches are compared: ``last`` (final-norm tokens, the paper's),
    ``patch`` (the projection before positions), ``pixel``, ``block:<l>`` (output of layer l), ``key:<l>`` (keys of layer l).

    Raises :class:`~telltale.errors.ConfigError` for unknown names, :class:`~telltale.errors.UnsupportedModelError` where the
    family has no such thing, :class:`~telltale.errors.NumericalError` if the importance is not finite.
    """
    name = importance if isinstance(importance, str) else "of a callable"
    logits, values, embeddings = _read(vision, pixels, {name: importance}, (space,))
    return Evidence(logits, values[name], embeddings[space])


def look_at_all(
    vision: VisionModel, pixels: Tensor, *, importances: tuple[str, ...], spaces: tuple[str, ...]
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Like :func:`look`, for several importances and spaces of one pass: logits, importances by name, embeddings by space."""
    return _read(vision, pixels, {name: name for name in importances}, spaces)


def available(vision: VisionModel) -> list[str]:
    """Names of :data:`IMPORTANCES` that the family has."""
    pooled = _pooling_head(vision) is not None
    hidden = {"map_head"} - ({"map_head"} if pooled else set()) | (
        {"cls_last", "cls_first"} if not vision.prefix else set()
    )
    return [name for name in IMPORTANCES if name not in hidden]


def _read(
    vision: VisionModel, pixels: Tensor, importances: dict[str, Importance], spaces: tuple[str, ...]
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    layers = attentions_of(vision.model)
    for value in importances.values():
        if isinstance(value, str):
            _check_importance(vision, value)
    for space in spaces:
        _check_space(space, len(layers))
    with_gradient = "gradient" in importances.values()
    caught: dict[str, Any] = {}
    inputs: dict[int, tuple[Tensor, Tensor | None]] = {}
    with ExitStack() as stack, torch.set_grad_enabled(with_gradient):
        for number, attention in enumerate(layers):
            hook = attention.register_forward_pre_hook(_catch_input(inputs, number), with_kwargs=True)
            stack.callback(hook.remove)
        embedding = embeddings_of(vision.model)
        projection = projection_of(embedding)
        assert projection is not None
        stack.callback(projection.register_forward_hook(_catch_output(caught, "patch")).remove)
        stack.callback(embedding.register_forward_hook(_catch_leaf(caught, with_gradient)).remove)
        blocks = _blocks(vision.model, layers)
        for space in spaces:
            if space.startswith("block:"):
                block = blocks[_layer(space)]
                stack.callback(block.register_forward_hook(_catch_output(caught, space)).remove)
        if "last" in spaces:
            stack.callback(_final_norm(vision.model).register_forward_hook(_catch_output(caught, "last")).remove)
        if "map_head" in importances.values():
            head = _pooling_head(vision)
            assert head is not None
            stack.callback(head.register_forward_pre_hook(_catch_first(caught)).remove)
        logits = vision.model(pixel_values=pixels).logits
        found = {
            name: _importance(vision, value, layers, inputs, caught, logits)
            for name, value in importances.items()
            if isinstance(value, str)
        }
    # Without the hooks: a callable that runs the model (occlusion, for one) must not overwrite what they have caught.
    found |= {name: _called(value, vision, pixels) for name, value in importances.items() if not isinstance(value, str)}
    embeddings = {space: _embedding(vision, space, pixels, layers, inputs, caught).detach() for space in spaces}
    return logits.detach(), {name: _normalised(value, name) for name, value in found.items()}, embeddings


def _called(importance: Callable[[VisionModel, Tensor], Tensor], vision: VisionModel, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        value = importance(vision, pixels)
    if not isinstance(value, Tensor) or tuple(value.shape) != (len(pixels), vision.patches):
        told = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ConfigError(f"the importance gave {told}; expected a tensor ({len(pixels)}, {vision.patches}).")
    return value


def _importance(
    vision: VisionModel,
    kind: str,
    layers: list[nn.Module],
    inputs: Any,
    caught: Any,
    logits: Tensor,
) -> Tensor:
    if kind == "gradient":
        winning = logits.max(dim=-1).values.sum()
        (slope,) = torch.autograd.grad(winning, caught["tokens"], retain_graph=True)
        return slope[:, vision.prefix :].norm(dim=-1)
    if kind == "map_head":
        head, tokens = _pooling_head(vision), caught["pooled"]
        assert head is not None
        _, weights = head.attention(head.probe.repeat(len(tokens), 1, 1), tokens, tokens, need_weights=True)
        return weights[:, 0]
    if kind == "rollout":
        return _rollout(vision, layers, inputs)
    number = len(layers) - 1 if kind == "cls_last" else 0
    return attention_rows(layers[number], *inputs[number], rows=1)[:, :, 0].mean(dim=1)[:, vision.prefix :]


def attention_rows(attention: nn.Module, hidden: Tensor, bias: Tensor | None, *, rows: int | None) -> Tensor:
    """Softmax rows (batch, heads, rows, tokens) of the first ``rows`` tokens (None: all), from the attention's input ``hidden``."""
    width: int = attention.head_dim  # type: ignore[assignment]
    queries = attention.q_proj(hidden if rows is None else hidden[:, :rows])  # type: ignore[operator]
    keys = attention.k_proj(hidden)  # type: ignore[operator]
    queries = queries.unflatten(-1, (-1, width)).transpose(1, 2)
    keys = keys.unflatten(-1, (-1, width)).transpose(1, 2)
    scores = queries @ keys.transpose(2, 3) * width**-0.5
    if bias is not None:
        scores = scores + (bias if rows is None else bias[..., :rows, :])
    return scores.float().softmax(dim=-1)


def _rollout(vision: VisionModel, layers: list[nn.Module], inputs: Any) -> Tensor:
    """Row of the class token (without one: the mean row) of the product of (A_l + I) / 2, from the last layer to the first."""
    hidden = inputs[0][0]
    row = hidden.new_zeros(hidden.shape[:2], dtype=torch.float32)
    if vision.prefix:
        row[:, 0] = 1.0
    else:
        row[:] = 1.0 / row.shape[1]
    for number in reversed(range(len(layers))):
        mean = attention_rows(layers[number], *inputs[number], rows=None).mean(dim=1)
        row = (torch.einsum("bi,bij->bj", row, mean) + row) / 2
    return row[:, vision.prefix :]


def _embedding(
    vision: VisionModel, space: str, pixels: Tensor, layers: list[nn.Module], inputs: Any, caught: Any
) -> Tensor:
    if space == "pixel":
        side = vision.patch
        tiles = pixels.unfold(2, side, side).unfold(3, side, side)
        return tiles.permute(0, 2, 3, 1, 4, 5).reshape(len(pixels), vision.patches, -1)
    if space == "patch":
        return caught["patch"].flatten(2).transpose(1, 2)
    if space.startswith("key:"):
        number = _layer(space)
        return layers[number].k_proj(inputs[number][0])[:, vision.prefix :]  # type: ignore[operator]
    return caught[space][:, vision.prefix :]


def _normalised(importance: Tensor, name: str) -> Tensor:
    values = importance.detach().float()
    if not torch.isfinite(values).all():
        raise NumericalError(
            f"importance {name!r} is not finite: the edge model or the image holds NaN; check the checkpoint."
        )
    return values / values.sum(dim=1, keepdim=True).clamp_min(1e-30)


def _check_importance(vision: VisionModel, name: str) -> None:
    if name not in IMPORTANCES:
        raise ConfigError(f"importance {name!r} is unknown; expected one of {', '.join(IMPORTANCES)} or a callable.")
    if name not in available(vision):
        raise UnsupportedModelError(
            f"{vision.family} has no importance {name!r}; expected one of {', '.join(available(vision))}."
        )


def _check_space(space: str, layers: int) -> None:
    kind, _, number = space.partition(":")
    if space in ("last", "patch", "pixel"):
        return
    if kind not in ("block", "key") or not number.isdigit() or int(number) >= layers:
        raise ConfigError(f"space {space!r} is not understood; expected one of {SPACES} with layers 0 to {layers - 1}.")


def _layer(space: str) -> int:
    return int(space.partition(":")[2])


def _pooling_head(vision: VisionModel) -> Any:
    return next((child for child in vision.model.modules() if "AttentionPoolingHead" in type(child).__name__), None)


def _final_norm(model: nn.Module) -> nn.Module:
    """The norm over all tokens after the last layer, or that layer where there is none (CLIP, BEiT norm a pooled vector)."""
    for name, child in model.named_modules():
        path = name.split(".")
        inside = {"layers", "layer", "pooler", "head", "text_model"} & set(path)
        pooled = path[-1] == "post_layernorm" and "clip" in type(model).__name__.lower()
        if (
            isinstance(child, nn.LayerNorm)
            and path[-1] in ("layernorm", "post_layernorm")
            and not inside
            and not pooled
        ):
            return child
    return _blocks(model, attentions_of(model))[-1]


def _blocks(model: nn.Module, layers: list[nn.Module]) -> list[nn.Module]:
    """The transformer layer around each attention: the nearest module above it that holds an MLP as well."""
    names = {child: name for name, child in model.named_modules()}
    found = []
    for attention in layers:
        name = names[attention]
        while True:
            name = name.rpartition(".")[0]
            parent = model.get_submodule(name)
            if any("mlp" in child for child, _ in parent.named_children()):
                found.append(parent)
                break
            if not name:
                raise UnsupportedModelError(f"{type(model).__name__} has an attention outside a layer with an MLP.")
    return found


def _catch_input(inputs: dict[int, Any], number: int) -> Callable[..., None]:
    def catch(module: nn.Module, arguments: Any, keywords: dict[str, Any]) -> None:
        hidden = arguments[0] if arguments else keywords["hidden_states"]
        mask = arguments[1] if len(arguments) > 1 else keywords.get("attention_mask")
        inputs[number] = (hidden, mask)

    return catch


def _catch_output(caught: dict[str, Any], name: str) -> Callable[..., None]:
    def catch(module: nn.Module, arguments: Any, output: Any) -> None:
        caught[name] = output[0] if isinstance(output, tuple) else output

    return catch


def _catch_first(caught: dict[str, Any]) -> Callable[..., None]:
    def catch(module: nn.Module, arguments: Any) -> None:
        caught["pooled"] = arguments[0]

    return catch


def _catch_leaf(caught: dict[str, Any], with_gradient: bool) -> Callable[..., Tensor | None]:
    """Make the tokens a leaf, so that the gradient stops at them and parameters get none."""

    def catch(module: nn.Module, arguments: Any, tokens: Tensor) -> Tensor | None:
        if not with_gradient:
            return None
        caught["tokens"] = tokens.detach().requires_grad_(True)
        return caught["tokens"]

    return catch
