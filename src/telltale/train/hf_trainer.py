"""The recipe inside Transformers' ``Trainer``: a mix-in for any Trainer class, and the class made with it.

The last exit's loss stays the Trainer's own, whatever goes into it: the recipe weighs it and adds the losses of the early
exits, made of the same labels by the same rule. So process count, gradient accumulation, packed rows, metrics and every
input are the Trainer's business, and what the early exits cannot follow is refused by name when the Trainer is made.

The curriculum follows ``state.global_step``, so gradient accumulation stays within one step and a resumed run goes on where
it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from telltale.errors import ConfigError, MissingExtraError
from telltale.models.families import parts_of
from telltale.train.exit_loss import exit_losses
from telltale.train.layerskip import LayerSkip, LayerSkipConfig, apply, weighted_loss
from telltale.train.trainable import check_trainable


class LayerSkipMixin:
    """Put before a Trainer class: ``class MyTrainer(LayerSkipMixin, SFTTrainer)``; takes ``layerskip=LayerSkipConfig(...)``.

    ``total_steps`` None is filled in with the Trainer's own number of steps when training begins. With ``e_scale=0`` the
    loss is the Trainer's own, to the bit. Evaluation and prediction always are. Label smoothing and a
    ``compute_loss_func`` apply to every exit; the function is called once for each, with that exit's logits.
    The recipe is taken off when training ends or fails, so that ``save_model`` and ``generate`` see the plain model.

    Raises :class:`~telltale.errors.ConfigError` for options under which the early exits would learn something else than the
    last layer (DeepSpeed; tensor, context and sequence parallelism; DataParallel; ``torch_compile``; losses of other Trainer
    classes), and :class:`~telltale.errors.UnsupportedModelError` for a model that the recipe cannot be put on.
    """

    layerskip: LayerSkipConfig
    recipe: LayerSkip | None

    def __init__(self, *args: Any, layerskip: LayerSkipConfig | None = None, **kwargs: Any) -> None:
        self.layerskip = layerskip or LayerSkipConfig()
        self.recipe = None
        try:
            super().__init__(*args, **kwargs)
        except ImportError as error:
            if "accelerate" in str(error):
                raise MissingExtraError("the Trainer needs accelerate: pip install 'telltale[train]'") from error
            raise
        _check_trainer(self, self.layerskip)
        self.add_callback(LayerSkipCallback(self))  # type: ignore[attr-defined]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own, after which the recipe is off, however it ended."""
        try:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._take_off()

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """The recipe's loss while training; the Trainer's own otherwise."""

        def own() -> Any:
            return super(LayerSkipMixin, self).compute_loss(  # type: ignore[misc]
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch, **kwargs
            )

        if self.recipe is None or not model.training:
            return own()
        early = self.recipe.active()
        last = early.pop(self.recipe.n_layers, 0.0)
        if not early:
            return own()
        if cast(Any, self).compute_loss_func is not None:
            with self._on_every_exit(self.recipe, early, last):
                return own()
        normalizer, scale = self._normalizer(num_items_in_batch)
        with self.recipe.reading(self._early_losses(self.recipe, inputs, list(early), normalizer)) as found:
            result = own()
        loss, outputs = result if return_outputs else (result, None)
        loss = last * loss + scale * weighted_loss(found[0], early)
        return (loss, outputs) if return_outputs else loss

    def _normalizer(self, num_items_in_batch: Tensor | int | None) -> tuple[Tensor | int | None, int]:
        """What divides the summed losses (None: the batch's own tokens), and what the Trainer multiplies by afterwards."""
        job: Any = self
        if num_items_in_batch is None or not job.model_accepts_loss_kwargs:
            return None, 1
        if not job.args.average_tokens_across_devices:
            return num_items_in_batch, 1
        # The count is of all processes, whose gradients are then averaged.
        return num_items_in_batch, job.accelerator.num_processes

    def _early_losses(
        self, recipe: LayerSkip, inputs: dict[str, Any], exits: list[int], normalizer: Tensor | int | None
    ) -> Callable[[list[Tensor | None]], dict[int, Tensor]]:
        """The early exits' losses from the layers' states, by the labels of ``inputs``."""
        shifted = inputs.get("shift_labels") is not None
        labels = inputs.get("shift_labels") if shifted else inputs.get("labels")
        if labels is None:
            raise ConfigError(
                f"the batch holds {', '.join(sorted(inputs))} and no labels, which the early exits learn from; expected "
                f"labels, or e_scale=0."
            )
        smoother = getattr(self, "label_smoother", None)
        counted = (labels if shifted else labels[:, 1:]).ne(-100).sum() if normalizer is None else normalizer
        # As in SFTTrainer, a batch without a token to predict has no loss.
        divisor = torch.as_tensor(counted, device=labels.device).clamp(min=1)

        def read(states: list[Tensor | None]) -> dict[int, Tensor]:
            return exit_losses(
                recipe.parts,
                states,
                labels,
                exits=exits,
                config=recipe.config,
                normalizer=divisor,
                shifted=shifted,
                smoothing=smoother.epsilon if smoother is not None else 0.0,
            )

        return read

    @contextmanager
    def _on_every_exit(self, recipe: LayerSkip, early: dict[int, float], last: float) -> Iterator[None]:
        """Have ``compute_loss_func`` called for the early exits too, with outputs that hold their logits."""
        job: Any = self
        function = job.compute_loss_func
        found: list[dict[int, Tensor]]

        def read(states: list[Tensor | None]) -> dict[int, Tensor]:
            return {exit_layer: recipe.parts.head(recipe.parts.norm(states[exit_layer - 1])) for exit_layer in early}

        def weighted(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
            if not isinstance(outputs, dict):
                raise ConfigError(
                    "the model returns a tuple, which compute_loss_func cannot be given for an early exit."
                )
            total = last * function(outputs, labels, num_items_in_batch=num_items_in_batch)
            for exit_layer, logits in found[0].items():
                values: dict[str, Any] = {**outputs, "logits": logits.to(outputs["logits"].dtype)}
                total = total + early[exit_layer] * function(
                    type(outputs)(**values), labels, num_items_in_batch=num_items_in_batch
                )
            return total

        with recipe.reading(read) as found:
            job.compute_loss_func = weighted
            try:
                yield
            finally:
                job.compute_loss_func = function

    def _put_on(self, step: int, total_steps: int) -> None:
        self._take_off()
        config = dataclasses.replace(self.layerskip, total_steps=self.layerskip.total_steps or total_steps)
        self.recipe = apply(self.model, config)  # type: ignore[attr-defined]
        self.recipe.set_step(step)

    def _take_off(self) -> None:
        if self.recipe is not None:
            self.recipe.remove()
            self.recipe = None


class LayerSkipCallback(TrainerCallback):
    """Moves the recipe with the Trainer's steps; :class:`LayerSkipMixin` adds it."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the recipe on the model, at the step the run starts or resumes from."""
        self._trainer._put_on(state.global_step, state.max_steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go to the optimizer step that begins; micro-batches of one step share it."""
        if self._trainer.recipe is not None:
            self._trainer.recipe.set_step(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the recipe off."""
        self._trainer._take_off()


class LayerSkipTrainer(LayerSkipMixin, Trainer):
    """``transformers.Trainer`` with the LayerSkip recipe: ``LayerSkipTrainer(model, args, layerskip=..., train_dataset=...)``."""


def _check_trainer(trainer: Any, config: LayerSkipConfig) -> None:
    """Refuse by name what the early exits, or dropped rows, cannot follow."""
    reads, drops = config.e_scale > 0, config.p_max > 0
    check_trainable(trainer.model, parts_of(trainer.model), drops_rows=drops, reads_exits=reads)
    if not (reads or drops):
        return
    args, accelerator = trainer.args, trainer.accelerator
    if args.n_gpu > 1:
        raise ConfigError(
            f"one process with {args.n_gpu} GPUs trains in DataParallel, whose replicas the recipe cannot follow; start one "
            f"process for each GPU (torchrun, accelerate launch)."
        )
    if trainer.is_deepspeed_enabled:
        raise ConfigError(
            "DeepSpeed holds weights and gradients outside of the model's modules; expected DDP or FSDP with the recipe."
        )
    if trainer.is_fsdp_enabled and accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise ConfigError("fsdp with version 1 flattens the weights that the early exits read; expected version 2.")
    if args.torch_compile:
        raise ConfigError("torch_compile=True: a compiled graph does not see layers being left out; expected False.")
    parallel = getattr(accelerator, "parallelism_config", None)
    for name in ("tp_size", "cp_size", "sp_size"):
        size = getattr(parallel, name, 1) or 1
        if size > 1:
            raise ConfigError(
                f"{name}={size} splits rows or the head among processes; expected {name}=1 with the recipe."
            )
    if reads:
        _check_loss(trainer, config)


def _check_loss(trainer: Any, config: LayerSkipConfig) -> None:
    """Refuse losses of the last exit that the early exits would not share."""
    classes = type(trainer).__mro__
    below = classes[classes.index(LayerSkipMixin) + 1 :]
    owner = next(cls for cls in below if "compute_loss" in vars(cls))
    if owner is not Trainer and not (owner.__name__ == "SFTTrainer" and owner.__module__.startswith("trl.")):
        raise ConfigError(
            f"{owner.__name__} computes a loss of its own, which the early exits do not know; expected Trainer or TRL's "
            f"SFTTrainer, or {owner.__name__} before LayerSkipMixin in the class's bases, or e_scale=0."
        )
    if getattr(trainer.args, "loss_type", "nll") != "nll" and owner is not Trainer:
        raise ConfigError(
            f"loss_type={trainer.args.loss_type!r} is not what early exits learn by; expected loss_type='nll', or e_scale=0."
        )
    if trainer.compute_loss_func is not None and config.exit_target == "distill":
        raise ConfigError(
            "compute_loss_func with exit_target='distill': early exits cannot learn by both; expected one of them."
        )
