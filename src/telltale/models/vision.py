"""Vision transformers of Transformers, opened for work on some of their patches: the partial forward, without model surgery.

A hook on the embeddings lets the model embed the whole image with the positions it was trained with, and keeps only the rows of
the patches that were sent; the prefix (class token, distillation token, registers) stays. Hidden patches cannot reach the answer:
their pixels may be NaN. ``edge.importance`` reads importances and patch embeddings off the same opened model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from telltale.errors import CheckpointError, ConfigError, DataError, UnsupportedModelError
from telltale.models.loading import in_a_line, moved, quietly

FAMILIES: dict[str, int] = {
    "vit": 1,
    "deit": 2,
    "dinov2": 1,
    "dinov2_with_registers": 1,
    "clip": 1,
    "clip_vision_model": 1,
    "siglip": 0,
    "siglip_vision_model": 0,
    "beit": 1,
}
"""Model types of Transformers and their prefix tokens, registers not counted."""


@dataclass(frozen=True)
class VisionModel:
    """An opened image model: the module, and what has to be known of it to speak of patches.

    rows, columns: the patch grid. patch: pixels of a patch's side. prefix: tokens before the patches. mean, std: (3,) of the
    normalisation of pixels in 0..1. labels: names of the classes in the order of the logits, empty without a classifier.
    """

    model: Any
    family: str
    rows: int
    columns: int
    patch: int
    prefix: int
    labels: tuple[str, ...]
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    @property
    def patches(self) -> int:
        """Patches of an image, N."""
        return self.rows * self.columns

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of its images, pixels."""
        return self.rows * self.patch, self.columns * self.patch

    def pixels(self, images: np.ndarray) -> Tensor:
        """Images (batch, height, width, 3) uint8 as the model's input (batch, 3, height, width).

        Raises :class:`~telltale.errors.DataError` for another size or kind.
        """
        if images.ndim != 4 or images.shape[1:] != (*self.size, 3) or images.dtype != np.uint8:
            raise DataError(
                f"images have shape {images.shape} and type {images.dtype}; expected uint8 (batch, {self.size[0]}, "
                f"{self.size[1]}, 3). Resize them first."
            )
        parameter = next(self.model.parameters())
        values = torch.from_numpy(np.ascontiguousarray(images)).to(parameter.device).permute(0, 3, 1, 2)
        mean, std = (values.new_tensor(kept, dtype=torch.float32).view(3, 1, 1) for kept in (self.mean, self.std))
        return ((values.float() / 255 - mean) / std).to(parameter.dtype)

    def logits(self, pixels: Tensor, indices: Tensor | None = None) -> Tensor:
        """Logits (batch, classes) from the whole image, or from the patches ``indices`` (batch, n) alone."""
        return partial_forward(self, pixels, indices)


def open_vision(model: Any, *, mean: Any = (0.5, 0.5, 0.5), std: Any = (0.5, 0.5, 0.5)) -> VisionModel:
    """Describe a Transformers vision model. Raises UnsupportedModelError for another family or a convolutional stem."""
    config = getattr(model, "config", None)
    family = getattr(config, "model_type", type(model).__name__)
    if family not in FAMILIES:
        raise UnsupportedModelError(
            f"{family} models cannot work on some patches; expected one of {', '.join(FAMILIES)} from Transformers."
        )
    vision: Any = getattr(config, "vision_config", config)
    height, width = _pair(vision.image_size)
    patch_height, patch_width = _pair(vision.patch_size)
    if patch_height != patch_width or height % patch_height or width % patch_width:
        raise UnsupportedModelError(
            f"{family} has images of {height} x {width} and patches of {patch_height} x {patch_width}; expected square patches "
            "that fill the image."
        )
    names = getattr(config, "id2label", None) or {}
    return VisionModel(
        model=model,
        family=family,
        rows=height // patch_height,
        columns=width // patch_width,
        patch=patch_height,
        prefix=FAMILIES[family] + getattr(vision, "num_register_tokens", 0) * (family == "dinov2_with_registers"),
        labels=tuple(str(names[number]) for number in sorted(names)) if _classifies(model) else (),
        mean=tuple(mean),
        std=tuple(std),
    )


def load_vision(path: str | Path, *, device: str | None = None) -> VisionModel:
    """Open a local image classifier: a Hugging Face folder with ``config.json``, weights and ``preprocessor_config.json``.

    Raises :class:`~telltale.errors.CheckpointError` for a folder that is none, UnsupportedModelError for another family.
    """
    folder = Path(path)
    described = _json(folder / "config.json")
    if described.get("model_type") not in FAMILIES:
        raise UnsupportedModelError(
            f"{folder} holds a {described.get('model_type')!r} model; expected one of {', '.join(FAMILIES)}."
        )
    mean, std = _normalisation(folder)
    from transformers import AutoModelForImageClassification

    try:
        with quietly():
            model, report = AutoModelForImageClassification.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, output_loading_info=True
            )
    except Exception as error:  # a damaged config.json raises whatever its field's validator does
        raise CheckpointError(f"{folder} cannot be loaded as an image classifier: {in_a_line(error)}") from error
    absent = sorted(report.get("missing_keys") or [])
    if absent:
        raise CheckpointError(
            f"{folder} lacks weights of an image classifier, {absent[0]} among {len(absent)}; expected a checkpoint that was "
            "trained to classify."
        )
    return open_vision(moved(model, device).eval(), mean=mean, std=std)


def _normalisation(folder: Path) -> tuple[list[float], list[float]]:
    """Mean and standard deviation (3,) of pixels in 0..1, from the folder's ``preprocessor_config.json``."""
    path = folder / "preprocessor_config.json"
    processor = _json(path)
    factor = processor.get("rescale_factor", 1 / 255)
    if not processor.get("do_rescale", True) or not isinstance(factor, float) or abs(255 * factor - 1) > 1e-3:
        raise CheckpointError(f"{path} does not divide pixels by 255 (rescale_factor={factor!r}); expected 1/255.")
    if not processor.get("do_normalize", True):
        return [0.0] * 3, [1.0] * 3
    found = []
    for name in ("image_mean", "image_std"):
        value = processor.get(name, 0.5)
        values = value if isinstance(value, list) else [value] * 3
        numbers = all(isinstance(each, (int, float)) and not isinstance(each, bool) for each in values)
        if len(values) != 3 or not numbers or (name == "image_std" and min(values) <= 0):
            raise CheckpointError(f"{path} has {name}={value!r}; expected three numbers, above 0 for image_std.")
        found.append([float(each) for each in values])
    return found[0], found[1]


def partial_forward(model: Any, pixels: Tensor, indices: Tensor | None = None) -> Tensor:
    """Logits (batch, classes) of a classifier that sees the patches ``indices`` (batch, n) alone, at their own positions.

    model: a :class:`VisionModel` or a Transformers module. pixels: (batch, 3, height, width); those of other patches may be
    anything, NaN too. indices: distinct patches in raster numbering, or None for the plain forward.
    """
    with only_patches(model, indices):
        module = model.model if isinstance(model, VisionModel) else model
        return module(pixel_values=pixels).logits


@contextmanager
def only_patches(model: Any, indices: Tensor | None) -> Iterator[None]:
    """Inside the block the model's forward keeps the patches ``indices`` (batch, n) of each image, and its prefix.

    Raises :class:`~telltale.errors.ConfigError` for indices out of range or twice in an image.
    """
    opened = model if isinstance(model, VisionModel) else open_vision(model)
    if indices is None:
        yield
        return
    rows = _checked_indices(indices, opened.patches).to(next(opened.model.parameters()).device)

    def keep(module: nn.Module, arguments: Any, tokens: Tensor) -> Tensor:
        if tokens.ndim != 3 or tokens.shape[1] != opened.prefix + opened.patches:
            raise ConfigError(
                f"the embeddings gave {tuple(tokens.shape)}; expected (batch, {opened.prefix + opened.patches}, width). Are the "
                f"images {opened.size[0]} x {opened.size[1]} pixels?"
            )
        if len(rows) != len(tokens):
            raise ConfigError(
                f"{len(rows)} sets of indices were given for {len(tokens)} images; expected one for each."
            )
        kept = tokens[:, opened.prefix :].gather(1, rows[..., None].expand(-1, -1, tokens.shape[-1]))
        return torch.cat([tokens[:, : opened.prefix], kept], dim=1)

    def keep_bias(module: nn.Module, arguments: Any, bias: Tensor) -> Tensor:
        """BEiT's bias (1, heads, tokens, tokens) between the kept tokens: (batch, heads, kept, kept)."""
        prefix = torch.arange(opened.prefix, device=rows.device).expand(len(rows), -1)
        kept = torch.cat([prefix, rows + opened.prefix], dim=1)
        return bias[0][:, kept[:, :, None], kept[:, None, :]].transpose(0, 1)

    hooks = [embeddings_of(opened.model).register_forward_hook(keep)]
    for module in opened.model.modules():
        if type(module).__name__ == "BeitRelativePositionBias":
            hooks.append(module.register_forward_hook(keep_bias))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def embeddings_of(module: nn.Module) -> nn.Module:
    """The submodule that turns pixels into tokens with positions."""
    for name, child in module.named_modules():
        if name.rpartition(".")[2] == "embeddings" and projection_of(child, required=False) is not None:
            return child
    raise UnsupportedModelError(f"{type(module).__name__} has no submodule 'embeddings' that projects patches.")


def projection_of(embeddings: nn.Module, *, required: bool = True) -> nn.Module | None:
    """The convolution in the embeddings that projects patches: (batch, width, rows, columns) before positions."""
    for child in embeddings.modules():
        if isinstance(child, nn.Conv2d):
            return child
    if required:
        raise UnsupportedModelError(f"{type(embeddings).__name__} projects patches with no convolution.")
    return None


def attentions_of(module: nn.Module) -> list[nn.Module]:
    """The attention modules of all layers, first layer first: those with ``q_proj`` and ``k_proj``."""
    found = [child for child in module.modules() if hasattr(child, "q_proj") and hasattr(child, "k_proj")]
    if not found:
        raise UnsupportedModelError(f"{type(module).__name__} has no attention with q_proj and k_proj.")
    return found


def _checked_indices(indices: Tensor, patches: int) -> Tensor:
    rows = torch.as_tensor(indices)
    if rows.ndim != 2 or rows.shape[1] == 0 or rows.dtype.is_floating_point or rows.dtype == torch.bool:
        raise ConfigError(
            f"indices have shape {tuple(rows.shape)} and type {rows.dtype}; expected integers (batch, n), n >= 1."
        )
    if rows.min() < 0 or rows.max() >= patches:
        raise ConfigError(f"indices reach from {rows.min()} to {rows.max()}; expected 0 to {patches - 1}.")
    ordered = rows.sort(dim=1).values
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise ConfigError("indices name a patch twice in one image; expected distinct patches.")
    return rows.long()


def _classifies(model: Any) -> bool:
    """Whether there is a classifier; a distilled DeiT has two and answers with their mean."""
    return hasattr(model, "classifier") or hasattr(model, "cls_classifier")


def _pair(value: Any) -> tuple[int, int]:
    return (value[0], value[1]) if isinstance(value, (list, tuple)) else (value, value)


def _json(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}; expected a local Hugging Face folder."
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds no JSON object.")
    return loaded
