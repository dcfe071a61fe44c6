"""Judges on disk: our own folder, and the layout of the official ArmoRM checkpoint, read without running its code.

``LlamaForRewardModelWithGating`` names its model_type llama, so Auto classes load it with a head of random numbers and no error,
and its own code no longer imports on today's Transformers. Here its tensors are taken by name and shape, and look-alikes
(quantile heads, gates with batch norm, missing parts) are refused by the name of what gives them away.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel

from telltale.align.judge.model import MODEL_TYPE, JudgeConfig, JudgeModel
from telltale.align.judge.templating import LLAMA3_PATTERN
from telltale.configuration import check_choice
from telltale.errors import CheckpointError, ConfigError, UnsupportedModelError
from telltale.models.loading import DTYPES, without_progress_bars
from telltale.runs.atomic import atomic_directory

LAYOUTS = ("telltale", "official")
OFFICIAL_CLASS = "LlamaForRewardModelWithGating"
OFFICIAL_OBJECTIVES = (
    *(f"helpsteer-{name}" for name in ("helpfulness", "correctness", "coherence", "complexity", "verbosity")),
    *(
        f"ultrafeedback-{name}"
        for name in ("overall_score", "instruction_following", "truthfulness", "honesty", "helpfulness")
    ),
    "beavertails-is_safe",
    "prometheus-score",
    "argilla-overall_quality",
    "argilla-judge_lm",
    *(f"code-{name}" for name in ("complexity", "style", "explanation", "instruction-following", "readability")),
)
HELPSTEER_SCALE = {"low": 0.0, "high": 4.0, "bins": 5}
SHARD_BYTES = 5 * 2**30
_HEAD = ("regression_layer.", "reward_transform_matrix", "gating.")
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def load_judge_model(
    path: str | Path, *, dtype: torch.dtype | str | None = None, device: torch.device | str | None = None
) -> JudgeModel:
    """The judge of the folder ``path``, in eval mode; no code of the folder runs.

    ``dtype`` is the backbone's (None: as saved; the widest, where tensors are of several); the head is in float32.

    Raises :class:`~telltale.errors.CheckpointError` for a folder that is damaged or no judge, and
    :class:`~telltale.errors.UnsupportedModelError` for a look-alike, naming the key.
    """
    folder = Path(path)
    raw = _raw_config(folder)
    wanted = _dtype(dtype)
    if raw.get("model_type") == MODEL_TYPE:
        model = _load_own(folder, wanted)
    elif OFFICIAL_CLASS in (raw.get("architectures") or ()):
        model = _load_official(folder, raw, wanted)
    else:
        raise CheckpointError(
            f"{folder} is no judge: its config.json names model_type {raw.get('model_type')!r} and architectures "
            f"{raw.get('architectures')!r}; expected {MODEL_TYPE} or {OFFICIAL_CLASS}."
        )
    return model.to(device or "cpu").eval()


def save(model: JudgeModel, path: str | Path, *, layout: str = "telltale") -> None:
    """Write ``model`` to the folder ``path``, whole or not at all; the tokenizer is not touched if it is there.

    "official" needs a Llama backbone. Tensors that were loaded in a narrower dtype are written in it again, bit by bit.
    """
    check_choice("layout", layout, LAYOUTS)
    folder = Path(path)
    with atomic_directory(folder) as aside:
        if folder.is_dir():
            # Of what is there only this model's own files are replaced.
            for file in folder.iterdir():
                if not (file.name.startswith("model") and file.suffix in (".safetensors", ".json")) and file.is_file():
                    shutil.copy2(file, aside / file.name)
        if layout == "official":
            _write_official(model, aside)
        else:
            with without_progress_bars():
                model.save_pretrained(aside)


def _load_own(folder: Path, dtype: torch.dtype | None) -> JudgeModel:
    _tensors(folder, names_only=True)
    try:
        with without_progress_bars():
            model, report = JudgeModel.from_pretrained(
                folder, dtype=dtype or "auto", local_files_only=True, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be loaded: {str(error).splitlines()[0]}") from error
    for kind, words in (
        ("missing_keys", "lacks"),
        ("unexpected_keys", "holds the unknown"),
        ("mismatched_keys", "misfits"),
    ):
        keys = sorted(map(str, report.get(kind) or []))
        if keys:
            raise CheckpointError(f"{folder} {words} {keys[0]} ({len(keys)} in all); expected a whole judge.")
    model.head.float()
    return model


def _load_official(folder: Path, raw: dict[str, Any], dtype: torch.dtype | None) -> JudgeModel:
    _refuse_look_alikes(folder, raw)
    tensors = _tensors(folder)
    config = _official_config(folder, raw, tensors)
    kinds = {tensor.dtype for name, tensor in tensors.items() if name.startswith("model.")}
    backbone_dtype = dtype or max(kinds, key=lambda kind: torch.finfo(kind).bits, default=torch.float32)
    with torch.device("meta"):
        model = JudgeModel(config, backbone=AutoModel.from_config(config.backbone_config))
    state = {}
    for name, tensor in tensors.items():
        inside = name.startswith("model.")
        key = "backbone." + name.removeprefix("model.") if inside else "head." + name
        # A copy in any case: a tensor that is mapped from a file may be aligned in a way that changes the last bit of products.
        state[key] = tensor.to(backbone_dtype if inside else torch.float32, copy=True)
    _check_shapes(folder, model, state)
    model.load_state_dict(state, strict=True, assign=True)
    for parameter in (model.head.regression_layer.weight, model.head.reward_transform_matrix):
        parameter.requires_grad_(False)
    _rebuild_buffers(model, config)
    return model


def _rebuild_buffers(model: JudgeModel, config: JudgeConfig) -> None:
    """Buffers that no file holds (rotary tables) were made without storage; a real model has them."""
    for name, buffer in _skeleton(config).named_buffers():
        owner_name, _, leaf = name.rpartition(".")
        owner = model.backbone.get_submodule(owner_name)
        owner._buffers[leaf] = buffer
        if leaf == "inv_freq" and hasattr(owner, "original_inv_freq"):
            owner.original_inv_freq = buffer


def _skeleton(config: JudgeConfig) -> Any:
    """The backbone with one layer: its buffers do not depend on how many there are."""
    small = type(config.backbone_config)(**config.backbone_config.to_dict() | {"num_hidden_layers": 1, "vocab_size": 8})
    small.pad_token_id = None
    return AutoModel.from_config(small)


def _refuse_look_alikes(folder: Path, raw: dict[str, Any]) -> None:
    for key in ("num_quantiles", "quantiles"):
        if key in raw:
            raise UnsupportedModelError(
                f"{folder}: config.json has {key}, a quantile head of the same class name; expected ArmoRM's linear one."
            )
    names = _tensors(folder, names_only=True)
    for name in sorted(names):
        if name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            raise UnsupportedModelError(f"{folder} holds {name}: its gate has batch norm; expected ArmoRM's plain MLP.")
    for name in ("regression_layer.weight", "reward_transform_matrix", "gating.layers.0.weight", "gating.logit_scale"):
        if name not in names:
            raise UnsupportedModelError(f"{folder} lacks {name}; expected the layout of {OFFICIAL_CLASS}.")


def _official_config(folder: Path, raw: dict[str, Any], tensors: Mapping[str, Tensor]) -> JudgeConfig:
    rows = tensors["regression_layer.weight"].shape[0]
    count = int(raw.get("num_objectives", rows))
    transform = tensors["reward_transform_matrix"]
    if rows != count:
        raise CheckpointError(f"{folder}: regression_layer.weight has {rows} rows for num_objectives={count}.")
    if tuple(transform.shape) != (count, count):
        raise CheckpointError(
            f"{folder}: reward_transform_matrix has shape {tuple(transform.shape)}; expected ({count}, {count})."
        )
    if float(tensors["gating.logit_scale"].float().min()) <= 0:
        raise CheckpointError(f"{folder}: gating.logit_scale is not above 0, which turns every preference around.")
    official = count == len(OFFICIAL_OBJECTIVES)
    objectives = (
        OFFICIAL_OBJECTIVES if official else tuple(raw.get("objectives") or (f"objective-{i}" for i in range(count)))
    )
    if len(objectives) != count:
        raise CheckpointError(f"{folder}: config.json names {len(objectives)} objectives for num_objectives={count}.")
    fields = {key: value for key, value in raw.items() if key not in ("auto_map", "architectures")}
    backbone = AutoConfig.for_model("llama", **{key: value for key, value in fields.items() if key != "model_type"})
    backbone.architectures = ["LlamaModel"]
    scales = {name: HELPSTEER_SCALE for name in objectives if name.startswith("helpsteer-")} if official else {}
    return JudgeConfig(
        backbone,
        objectives=objectives,
        scales=scales,
        nuisances=[name for index, name in enumerate(objectives) if not bool(transform[:, index].any())],
        gate={
            "hidden": int(raw.get("gating_hidden_dim", 1024)),
            "layers": int(raw.get("gating_n_hidden", 3)),
            "temperature": float(raw.get("gating_temperature", 10)),
            "mask_nuisances": False,
        },
        pooling="last",
        gating="template",
        gating_pattern=raw.get("gating_pattern", LLAMA3_PATTERN),
        context_length=int(raw.get("max_position_embeddings", 8192)),
        tensor_dtypes={
            name: _DTYPE_NAMES[tensor.dtype] for name, tensor in tensors.items() if tensor.dtype in _DTYPE_NAMES
        },
        pad_token_id=raw.get("pad_token_id"),
    )


def _check_shapes(folder: Path, model: JudgeModel, state: Mapping[str, Tensor]) -> None:
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}

    def told(name: str) -> str:
        return name.removeprefix("head.") if name.startswith("head.") else "model." + name.removeprefix("backbone.")

    for name in sorted(wanted.keys() - state.keys()):
        raise CheckpointError(f"{folder} lacks {told(name)}; expected the layout of {OFFICIAL_CLASS}.")
    for name in sorted(state.keys() - wanted.keys()):
        raise UnsupportedModelError(f"{folder} holds {told(name)}, which {OFFICIAL_CLASS} does not have.")
    for name, tensor in state.items():
        if tuple(tensor.shape) != wanted[name]:
            raise CheckpointError(f"{folder}: {told(name)} has shape {tuple(tensor.shape)}; expected {wanted[name]}.")


def _write_official(model: JudgeModel, folder: Path) -> None:
    config = model.config
    backbone = config.backbone_config
    if backbone.model_type != "llama" or config.pooling != "last":
        raise ConfigError(
            f"the official layout is a Llama decoder's; this judge has a {backbone.model_type} backbone and pooling "
            f"{config.pooling!r}. Save it with layout='telltale'."
        )
    if model.head.gating.config.mask_nuisances and config.nuisances:
        raise ConfigError(
            "the official layout has no mask in its gate, so this judge's weights would change; fit it with "
            "GateConfig(mask_nuisances=False), or save it with layout='telltale'."
        )
    tensors = {}
    for name, tensor in model.state_dict().items():
        key = name.removeprefix("head.") if name.startswith("head.") else "model." + name.removeprefix("backbone.")
        kind = DTYPES.get(config.tensor_dtypes.get(key, ""), tensor.dtype)
        tensors[key] = tensor.detach().to("cpu", kind).contiguous()
    gate = model.head.gating.config
    fields = backbone.to_dict() | {
        "architectures": [OFFICIAL_CLASS],
        "model_type": "llama",
        "num_objectives": len(config.objectives),
        "objectives": list(config.objectives),
        "gating_temperature": gate.temperature,
        "gating_hidden_dim": gate.hidden,
        "gating_n_hidden": gate.layers,
        "gating_pattern": config.gating_pattern,
        "pad_token_id": config.pad_token_id,
        "num_labels": 1,
    }
    (folder / "config.json").write_text(json.dumps(fields, indent=2, default=str) + "\n")
    plan = split_torch_state_dict_into_shards(tensors, max_shard_size=SHARD_BYTES)
    for file, names in plan.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _tensors(folder: Path, *, names_only: bool = False) -> dict[str, Any]:
    """Every tensor of the folder's safetensors files by name; ``names_only`` leaves the tensors where they are."""
    index = folder / "model.safetensors.index.json"
    try:
        files = (
            sorted(set(json.loads(index.read_text())["weight_map"].values()))
            if index.is_file()
            else ["model.safetensors"]
        )
    except (ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index} is no shard index: {error}") from error
    found: dict[str, Any] = {}
    for name in files:
        try:
            with safe_open(folder / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    found[key] = None if names_only else file.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder / name} is missing or damaged: {error}") from error
    return found


def _raw_config(folder: Path) -> dict[str, Any]:
    try:
        raw = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} holds no readable config.json: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{folder / 'config.json'} holds {type(raw).__name__}; expected a mapping.")
    return raw


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is unknown; expected one of {', '.join(DTYPES)}.")
    return DTYPES[dtype]
