"""Turn a model into layers, by its kind: ``nn.Sequential``, Hugging Face causal LM, or any module through torch.export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from telltale.errors import ConfigError, UnsupportedModelError
from telltale.models.families import FAMILIES, unwrap
from telltale.train.layerskip import LayerSkipConfig
from telltale.train.pipeline.layers import LayeredModel, sequential


def split(
    model: nn.Module | LayeredModel,
    *,
    loss: Callable[[Any, Any], Tensor] | None = None,
    layerskip: LayerSkipConfig | None = None,
    minibatches_per_step: int = 1,
    example: Any = None,
) -> LayeredModel:
    """``model`` as layers that a pipeline can be cut between. Parameters are the model's own; nothing is copied.

    - an ``nn.Sequential``: one layer per child; minibatches are ``(inputs, targets)`` and ``loss(outputs, targets)`` is needed;
    - a Hugging Face causal LM of a supported family: embedding, decoder layers, norm with head; minibatches are mappings with
      ``input_ids`` (see :mod:`~telltale.train.pipeline.causal_lm`). ``loss`` None is the model's own. ``layerskip`` trains the
      early-exit recipe instead, with ``minibatches_per_step`` minibatches to a step of its schedules;
    - any other module with an ``example`` minibatch ``(inputs, targets)`` and ``loss(outputs, targets)``: its graph by
      ``torch.export`` (see :mod:`~telltale.train.pipeline.exported_module`);
    - a :class:`~telltale.train.pipeline.layers.LayeredModel` is given back as it is.

    Raises :class:`~telltale.errors.UnsupportedModelError` naming the type and what is supported, and
    :class:`~telltale.errors.ConfigError` for a missing loss or an option that the kind of model has no use for.
    """
    if isinstance(model, LayeredModel):
        if loss is not None or layerskip is not None:
            raise ConfigError("a LayeredModel has its loss already; expected no loss and no layerskip beside it.")
        return model
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"{type(model).__name__} is not a module; expected {_supported()}.")
    bare = unwrap(model)
    if getattr(getattr(bare, "config", None), "model_type", None) is not None:
        return _language_model(model, loss, layerskip, minibatches_per_step)
    if layerskip is not None:
        raise ConfigError(f"layerskip needs a Hugging Face causal LM; {type(bare).__name__} is none.")
    if isinstance(bare, nn.Sequential):
        return sequential(bare, _needed(loss, bare))
    if example is None:
        raise UnsupportedModelError(
            f"{type(bare).__name__} cannot be split without an example minibatch; expected {_supported()}."
        )
    from telltale.train.pipeline.exported_module import exported

    return exported(bare, example, loss=_needed(loss, bare))


def _language_model(
    model: nn.Module, loss: Any, layerskip: LayerSkipConfig | None, minibatches_per_step: int
) -> LayeredModel:
    from telltale.train.pipeline.causal_lm import causal_lm

    if layerskip is None:
        return causal_lm(model, loss=loss)
    if loss is not None:
        raise ConfigError("layerskip brings its own loss; expected no loss beside it.")
    from telltale.train.pipeline.causal_lm import layerskip_stages

    return layerskip_stages(model, layerskip, minibatches_per_step=minibatches_per_step)


def _needed(loss: Callable[[Any, Any], Tensor] | None, model: nn.Module) -> Callable[[Any, Any], Tensor]:
    if loss is None:
        raise ConfigError(f"{type(model).__name__} needs a loss; expected loss(outputs, targets) -> scalar.")
    return loss


def _supported() -> str:
    return f"an nn.Sequential, a Hugging Face causal LM ({', '.join(FAMILIES)}), or any nn.Module with an example minibatch"
