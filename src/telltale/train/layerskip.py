"""The LayerSkip training recipe (arXiv 2404.16710, section 4): early layers that can draft for the whole model.

Two terms make an early layer useful: *layer dropout*, stronger for later layers, and an *early-exit loss* that reads
every layer through the one LM head, with a curriculum that keeps the cost to a few exits a step. This file holds the
configuration, the paper's equations as pure functions, and :func:`apply`, which puts the recipe on a live model. Decoding
is in ``telltale.decode``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from telltale.config import check_choice, check_integer, check_range, from_mapping, from_yaml
from telltale.errors import ConfigError
from telltale.models.exits import captured_exits
from telltale.models.families import Parts, parts_of
from telltale.train.exit_loss import exit_losses
from telltale.train.layer_dropout import LayerDropout
from telltale.train.trainable import check_reduced, check_trainable

Read = TypeVar("Read")


@dataclass(frozen=True)
class LayerSkipConfig:
    """The recipe's settings. The defaults are those of the paper's code fine-tuning (Table 8): p_max .1, e_scale 1,
    rotational curriculum, S(t) = 1; its rotation of 16 for 32 layers is half the depth, which ``rotation=None`` keeps.

    For training from scratch the paper uses ``time_schedule="exp"`` and a learning rate 2 to 2.7 times higher.
    """

    p_max: float = 0.1
    """Dropout rate of the last layer, in [0, 1). 0 turns layer dropout off."""
    e_scale: float = 1.0
    """Weight of the early exits, in [0, 1]. 0 trains the last layer alone."""
    curriculum: str = "rotational"
    """Which exits are active at a step: "rotational", "gradual" or "none" (all of them)."""
    rotation: int | None = None
    """R of the rotational curriculum: every R-th layer, shifted by one each step. None: half the number of layers."""
    time_schedule: str = "const"
    """S(t): "const" for fine-tuning and continued pretraining, "exp" from scratch."""
    total_steps: int | None = None
    """T of "exp" and of "gradual"; the training loop fills it in when None."""
    always_last: bool = True
    """Keep the last layer's loss on at every step, whatever the curriculum is."""
    exit_target: str = "label"
    """What an early exit learns: the "label", or to "distill" the last layer's distribution."""
    distillation_temperature: float = 1.0
    """Temperature of both distributions under ``exit_target="distill"``."""
    seed: int = 0
    """Seed of the layer dropout masks."""

    def __post_init__(self) -> None:
        check_range("p_max", self.p_max, low=0.0, below=1.0)
        check_range("e_scale", self.e_scale, low=0.0, high=1.0)
        check_choice("curriculum", self.curriculum, ("rotational", "gradual", "none"))
        check_choice("time_schedule", self.time_schedule, ("const", "exp"))
        check_choice("exit_target", self.exit_target, ("label", "distill"))
        check_choice("always_last", self.always_last, (True, False))
        if self.rotation is not None:
            check_integer("rotation", self.rotation, low=1)
        if self.total_steps is not None:
            check_integer("total_steps", self.total_steps, low=1)
        check_integer("seed", self.seed, low=0)
        check_range("distillation_temperature", self.distillation_temperature, low=1e-3)

    @classmethod
    def from_yaml(cls, path: str | Path) -> LayerSkipConfig:
        """Read the configuration from a YAML file of its fields."""
        return from_yaml(cls, path)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LayerSkipConfig:
        """Build the configuration from a mapping; an unknown key raises ConfigError."""
        return from_mapping(cls, values)

    def to_dict(self) -> dict[str, Any]:
        """The fields as a plain mapping."""
        return dataclasses.asdict(self)

    def needs_total_steps(self) -> bool:
        """Whether an equation in use depends on T."""
        return (self.time_schedule == "exp" and self.p_max > 0) or self.curriculum == "gradual"


def depth_profile(n_layers: int) -> Tensor:
    """D(l) = exp(l ln2 / (L-1)) - 1 for l = 0..L-1 (eq. 3): 0 at the first layer, 1 at the last. Shape (L,), float64."""
    if n_layers == 1:
        return torch.zeros(1, dtype=torch.float64)
    return torch.exp2(torch.arange(n_layers, dtype=torch.float64) / (n_layers - 1)) - 1.0


def time_profile(config: LayerSkipConfig, step: int) -> float:
    """S(t): 1 for "const"; exp(t ln2 / (T-1)) - 1 for "exp" (eq. 4), held at 1 after the last step."""
    if config.time_schedule == "const":
        return 1.0
    total = _total_steps(config)
    if total == 1:
        return 1.0
    return 2.0 ** (min(step, total - 1) / (total - 1)) - 1.0


def layer_dropout_rates(n_layers: int, config: LayerSkipConfig, step: int) -> Tensor:
    """p_{l,t} = S(t) D(l) p_max (eq. 2): the probability that a sample skips layer l at step t. Shape (L,), float64."""
    if config.p_max == 0:
        return torch.zeros(n_layers, dtype=torch.float64)
    return time_profile(config, step) * depth_profile(n_layers) * config.p_max


def exit_scale(n_layers: int, config: LayerSkipConfig) -> Tensor:
    """e(l) (eq. 6): e_scale l(l+1)/2 below the last layer, (L-1) + e_scale (L-1)(L-2)/2 there. Shape (L,), float64.

    A model of one layer has only its last exit, with weight 1.
    """
    index = torch.arange(n_layers, dtype=torch.float64)
    scale = config.e_scale * index * (index + 1) / 2
    last = n_layers - 1
    scale[last] = last + config.e_scale * last * (last - 1) / 2 if last else 1.0
    return scale


def curriculum_mask(n_layers: int, config: LayerSkipConfig, step: int) -> Tensor:
    """C(t, l) in {0, 1}: the exits that are on at step t. Shape (L,), bool.

    Rotational: on iff (l - t) mod R = 0, so that over any R steps each layer is on exactly once. Gradual: from the last
    layer downwards, layer l from t = (L-1-l) T / (2L) on, all of them from T/2.
    """
    index = torch.arange(n_layers)
    if config.curriculum == "rotational":
        mask = (index - step) % rotation_period(n_layers, config) == 0
    elif config.curriculum == "gradual":
        mask = step * 2 * n_layers >= (n_layers - 1 - index) * _total_steps(config)
    else:
        mask = torch.ones(n_layers, dtype=torch.bool)
    if config.always_last:
        mask[-1] = True
    return mask


def rotation_period(n_layers: int, config: LayerSkipConfig) -> int:
    """R: as given, or half the depth."""
    return config.rotation or max(1, n_layers // 2)


def exit_loss_weights(n_layers: int, config: LayerSkipConfig, step: int) -> Tensor:
    """C(t,l) e(l) / sum_i C(t,i) e(i): the weight of each exit's loss at step t; sums to 1. Shape (L,), float64.

    Raises :class:`~telltale.errors.ConfigError` if no active exit has a weight, which ``always_last=False`` allows.
    """
    weights = exit_scale(n_layers, config) * curriculum_mask(n_layers, config, step)
    total = weights.sum()
    if total == 0:
        raise ConfigError(
            f"always_last=False leaves step {step} without any loss (curriculum={config.curriculum!r}, "
            f"e_scale={config.e_scale}, {n_layers} layers); expected always_last=True or a smaller rotation."
        )
    return weights / total


def active_exits(n_layers: int, config: LayerSkipConfig, step: int) -> dict[int, float]:
    """Exit layer E = 1..L -> weight of its loss, for the exits that are on at step t, shallowest first."""
    weights = exit_loss_weights(n_layers, config, step).tolist()
    return {index + 1: weight for index, weight in enumerate(weights) if weight > 0}


def weighted_loss(losses: Mapping[int, Tensor], weights: Mapping[int, float]) -> Tensor:
    """sum_l weight(l) loss(l) (eq. 5), a scalar; ``losses`` and ``weights`` by exit layer."""
    return torch.stack([weight * losses[exit_layer] for exit_layer, weight in weights.items()]).sum()


def apply(model: nn.Module, config: LayerSkipConfig) -> LayerSkip:
    """Put the recipe on ``model`` (a Hugging Face causal LM of a supported family) and return its controller.

    Module tree, ``state_dict`` keys and ``save_pretrained`` stay as they are. In the user's own loop::

        recipe = layerskip.apply(model, LayerSkipConfig(total_steps=len(loader)))
        for batch in loader:
            loss, details = recipe.loss(batch["input_ids"], attention_mask=batch["attention_mask"])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            recipe.advance()
        recipe.remove()

    Raises :class:`~telltale.errors.ConfigError` if the configuration needs ``total_steps`` and has none or the model is
    compiled, and :class:`~telltale.errors.UnsupportedModelError` for an unknown family or an adapter that does not live
    in the modules of the base model.
    """
    if config.needs_total_steps():
        _total_steps(config)
    check_trainable(model, parts_of(model), drops_rows=config.p_max > 0, reads_exits=config.e_scale > 0)
    return LayerSkip(model, config)


class LayerSkip(nn.Module):
    """The recipe on one live model: layer dropout while it trains, and the early-exit loss.

    It is a module whose ``forward`` is :meth:`loss`, so that DistributedDataParallel can wrap it.
    """

    def __init__(self, model: nn.Module, config: LayerSkipConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.step = 0
        self._parts_box: tuple[Parts] = (parts_of(model),)
        self.dropout = LayerDropout(self.parts, seed=config.seed)
        exit_loss_weights(self.n_layers, config, 0)
        self.set_step(0)

    @property
    def parts(self) -> Parts:
        """The model's modules by role."""
        return self._parts_box[0]

    @property
    def n_layers(self) -> int:
        """L."""
        return len(self.parts.layers)

    def set_step(self, step: int) -> None:
        """Go to optimizer step ``step`` (resuming); gradient accumulation stays within one step."""
        self.step = step
        self.dropout.set_rates(layer_dropout_rates(self.n_layers, self.config, step).tolist(), step=step)

    def advance(self) -> None:
        """Go to the next optimizer step."""
        self.set_step(self.step + 1)

    def remove(self) -> None:
        """Take the recipe off: the model is as it was before :func:`apply`."""
        self.dropout.remove()

    def forward(self, input_ids: Tensor | None = None, **inputs: Any) -> tuple[Tensor, dict[str, Any]]:
        """:meth:`loss`, for wrappers that average gradients."""
        return self.loss(input_ids, **inputs)

    def active(self) -> dict[int, float]:
        """Exit layer E -> weight of its loss at the current step, for the exits that are on."""
        return active_exits(self.n_layers, self.config, self.step)

    @contextmanager
    def reading(self, read: Callable[[list[Tensor | None]], Read]) -> Iterator[list[Read]]:
        """Call ``read`` with the states of all layers, each (batch, length, hidden), where the layers of a pass end.

        That is inside the model's own forward: under its autocast, and while sharded weights are whole. The first pass of
        the block counts that runs with gradients as the block was entered; what ``read`` gave is in the list yielded.
        Raises :class:`~telltale.errors.ConfigError` if there was no such pass.
        """
        found: list[Read] = []
        grad = torch.is_grad_enabled()

        def at_end(module: nn.Module, args: Any, output: Any) -> None:
            if not found and torch.is_grad_enabled() == grad:
                found.append(read(list(states)))

        with captured_exits(self.parts) as states:
            handle = self.parts.base.register_forward_hook(at_end)
            try:
                yield found
            finally:
                handle.remove()
        if not found:
            raise ConfigError(
                f"the model that was run is not the {type(self.parts.base).__name__} that the recipe is on; expected it, "
                f"or a wrapper around it."
            )

    def loss(
        self,
        input_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        model: nn.Module | None = None,
        normalizer: Tensor | float | None = None,
        shift_labels: Tensor | None = None,
        label_smoothing: float = 0.0,
        **inputs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """J(X, Y, t) = sum_l weight(t, l) CE(g(x_{l+1}), Y) (eq. 5), in nats per predicted token.

        ``input_ids``, ``labels`` and ``attention_mask`` are (batch, length). ``labels`` None predicts ``input_ids``;
        they are shifted here, and -100 is ignored. ``shift_labels`` are labels that are shifted already. Everything else
        that the model takes goes to it as it is: ``position_ids`` and sequence boundaries of packed rows,
        ``inputs_embeds``. ``model`` is the wrapper around the model (DistributedDataParallel, Accelerate's, FSDP), if
        the recipe was put on before it was wrapped. ``normalizer`` divides the summed losses instead of the number of
        predicted tokens: to weigh all tokens of a step alike over micro-batches and P ranks, give their number over
        all of them, divided by P. ``label_smoothing`` is that of ``torch.nn.functional.cross_entropy``.

        Returns the loss and ``{"exit_losses": {E: detached loss}, "weights": {E: weight}}`` for the exits that were
        active. Raises :class:`~telltale.errors.ConfigError` if several processes train and nothing averages gradients.
        """
        if model is None:
            check_reduced(self.model)
        run = self.model if model is None else model
        if labels is None and shift_labels is None:
            labels = _own_labels(input_ids, attention_mask, inputs.get("position_ids"))
        active = self.active()
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False} | inputs
        inputs = {key: value for key, value in inputs.items() if value is not None or key == "attention_mask"}
        if list(active) == [self.n_layers] and normalizer is None and shift_labels is None and not label_smoothing:
            loss = run(**inputs, labels=labels).loss
            return loss, {"exit_losses": {self.n_layers: loss.detach()}, "weights": active}
        targets = labels if shift_labels is None else shift_labels
        assert targets is not None

        def read(states: list[Tensor | None]) -> dict[int, Tensor]:
            return exit_losses(
                self.parts,
                states,
                targets,
                exits=list(active),
                config=self.config,
                normalizer=normalizer,
                shifted=shift_labels is not None,
                smoothing=label_smoothing,
            )

        with self.reading(read) as found:
            # The head's one token costs next to nothing, and wrappers see a whole forward.
            outputs = run(**inputs, logits_to_keep=1)
        losses = found[0]
        total = weighted_loss(losses, active)
        if dist.is_available() and dist.is_initialized():
            # Wrappers start to average gradients at what the model returned, so the loss has to come from there too.
            total = total + 0.0 * outputs.logits.sum()
        return total, {
            "exit_losses": {key: value.detach() for key, value in losses.items()},
            "weights": active,
        }


def _own_labels(input_ids: Tensor | None, attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
    """The tokens themselves, without padding and without the first token of each text in a packed row."""
    if input_ids is None:
        raise ConfigError("neither input_ids nor labels are given; expected what is to be predicted.")
    labels = input_ids
    if attention_mask is not None and attention_mask.shape == labels.shape:
        labels = labels.masked_fill(attention_mask == 0, -100)
    if position_ids is not None and position_ids.shape == labels.shape:
        labels = labels.masked_fill(position_ids == 0, -100)
    return labels


def _total_steps(config: LayerSkipConfig) -> int:
    if config.total_steps is None:
        raise ConfigError(
            f"total_steps is not set; expected the number of training steps, which time_schedule="
            f"{config.time_schedule!r} and curriculum={config.curriculum!r} depend on."
        )
    return config.total_steps


def active_exit_count(n_layers: int, config: LayerSkipConfig) -> int:
    """How many exits a rotational step reads at most, ceil(L / R) and the last: the recipe's extra LM-head passes."""
    if config.e_scale == 0:
        return 1
    if config.curriculum == "rotational":
        return math.ceil(n_layers / rotation_period(n_layers, config)) + int(config.always_last)
    return n_layers
