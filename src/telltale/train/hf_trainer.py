"""The recipe inside Transformers' ``Trainer``: a mix-in for any Trainer class, and the class made with it.

The curriculum follows ``state.global_step``, so gradient accumulation stays within one step and a resumed run goes on where
it was. Works with Trainers that keep ``compute_loss(model, inputs, ...)``, TRL's ``SFTTrainer`` among them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor
from transformers import Trainer, TrainerCallback

from telltale.errors import MissingExtraError
from telltale.train.layerskip import LayerSkip, LayerSkipConfig, apply


class LayerSkipMixin:
    """Put before a Trainer class: ``class MyTrainer(LayerSkipMixin, SFTTrainer)``; takes ``layerskip=LayerSkipConfig(...)``.

    ``total_steps`` None is filled in with the Trainer's own number of steps when training begins. Evaluation is the model's
    own loss. The recipe is taken off when training ends, so that ``save_model`` and ``generate`` see the plain model.
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
        self.model_accepts_loss_kwargs = True
        self.add_callback(LayerSkipCallback(self))  # type: ignore[attr-defined]

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """The recipe's loss while training; the Trainer's own otherwise."""
        if self.recipe is None or not model.training or return_outputs:
            return super().compute_loss(  # type: ignore[misc]
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch, **kwargs
            )
        loss, _ = self.recipe.loss(
            inputs["input_ids"],
            labels=inputs.get("labels"),
            attention_mask=inputs.get("attention_mask"),
            model=None if model is self.recipe.model else model,
            normalizer=num_items_in_batch,
        )
        return loss


class LayerSkipCallback(TrainerCallback):
    """Moves the recipe with the Trainer's steps; :class:`LayerSkipMixin` adds it."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the recipe on the model, at the step the run starts or resumes from."""
        config = self._trainer.layerskip
        config = dataclasses.replace(config, total_steps=config.total_steps or state.max_steps)
        self._trainer.recipe = apply(self._trainer.model, config)
        self._trainer.recipe.set_step(state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go to the optimizer step that begins; micro-batches of one step share it."""
        if self._trainer.recipe is not None:
            self._trainer.recipe.set_step(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the recipe off."""
        if self._trainer.recipe is not None:
            self._trainer.recipe.remove()
            self._trainer.recipe = None


class LayerSkipTrainer(LayerSkipMixin, Trainer):
    """``transformers.Trainer`` with the LayerSkip recipe: ``LayerSkipTrainer(model, args, layerskip=..., train_dataset=...)``."""
