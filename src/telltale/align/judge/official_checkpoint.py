"""Judges on disk: telltale's own folder, and the layout of the official ArmoRM checkpoint, without running its code.

The official checkpoint (``LlamaForRewardModelWithGating``) calls its model_type llama, so Auto classes load it with a random head
and no error, and its own code no longer imports on current Transformers. Here its tensors are taken by name and shape. Look-alikes
(quantile heads, gates with batch norm, missing parts) are refused, naming the key. Only safetensors are opened, in one file or in
shards with an index.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel

from telltale.align.judge.model import MODEL_TYPE, JudgeConfig, JudgeModel
from telltale.align.judge.templates import LLAMA3_PATTERN
from telltale.config import check_choice
from telltale.errors import CheckpointError, ConfigError, TelltaleError, UnsupportedModelError
from telltale.models.loading import DTYPES, in_a_line, moved, quietly
from telltale.runs.files import atomic_directory

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
NO_WEIGHT = -1e30
"""A bias that leaves a masked objective no weight in a gate that knows no masks: its exponential is zero in any precision."""
_HEAD = ("regression_layer.", "reward_transform_matrix", "gating.")
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
LAYOUTS = ("telltale", "official")
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model"),
)
SHARD_BYTES = 5 * 2**30


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
    elif any(str(name).endswith(OFFICIAL_CLASS.removeprefix("Llama")) for name in raw.get("architectures") or ()):
        model = load_official(folder, raw, wanted)
    else:
        raise CheckpointError(
            f"{folder} is no judge: its config.json names model_type {raw.get('model_type')!r} and architectures "
            f"{raw.get('architectures')!r}; expected {MODEL_TYPE} or {OFFICIAL_CLASS}."
        )
    return cast(JudgeModel, moved(model, device).eval())


def save(model: JudgeModel, path: str | Path, *, layout: str = "telltale", tokenizer: Any = None) -> None:
    """Write ``model``, and ``tokenizer`` if given, to the folder ``path``, whole or not at all; other files there stay.

    "official" needs a Llama backbone. Tensors that were loaded in a narrower dtype are written in it again, bit by bit.
    Raises what :func:`check_target` raises, and :class:`~telltale.errors.ConfigError` for a judge that a layout cannot hold.
    """
    check_choice("layout", layout, LAYOUTS)
    folder = Path(path)
    check_target(folder)
    if layout == "official":
        check_official(model)
    with atomic_directory(folder) as aside:
        for file in folder.iterdir() if folder.is_dir() else ():
            if file.is_dir() and not file.is_symlink():
                shutil.copytree(file, aside / file.name, symlinks=True)
            elif not _is_replaced(file.name, tokenizer is not None):
                shutil.copy2(file, aside / file.name, follow_symlinks=False)
        if layout == "official":
            write_official(model, aside)
        else:
            with quietly():
                model.save_pretrained(aside)
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)


def check_target(path: str | Path) -> None:
    """Raise :class:`~telltale.errors.CheckpointError` unless ``path`` is new, an empty folder or one that holds a model."""
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; expected a folder to save the judge in.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds something that is no judge; expected a new folder, or one of a judge.")


def load_official(folder: Path, raw: dict[str, Any], dtype: torch.dtype | None) -> JudgeModel:
    """The judge of a folder with the configuration ``raw``; ``dtype`` is the backbone's (None: the narrowest that holds it).

    Raises :class:`~telltale.errors.UnsupportedModelError` for look-alikes and :class:`~telltale.errors.CheckpointError` for
    damage, both naming the key.
    """
    _refuse_look_alikes(folder, raw)
    tensors = read_tensors(folder)
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPE_NAMES:
            raise UnsupportedModelError(
                f"{folder}: {name} is of {str(tensor.dtype).removeprefix('torch.')}; expected one of {', '.join(DTYPES)}."
            )
    _check_head(folder, raw, tensors)
    try:
        config = _official_config(folder, raw, tensors)
        with torch.device("meta"):
            model = JudgeModel(config, backbone=AutoModel.from_config(config.backbone_config))
    except (TelltaleError, MemoryError):
        raise
    except Exception as error:  # configurations check their fields with errors of their own
        raise CheckpointError(f"{folder / 'config.json'} cannot be understood: {in_a_line(error)}") from error
    kinds = [tensor.dtype for name, tensor in tensors.items() if name.startswith("model.")]
    backbone_dtype = dtype or functools.reduce(torch.promote_types, kinds or [torch.float32])
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


def write_official(model: JudgeModel, folder: Path) -> None:
    """``config.json`` and tensors; what the layout has no place for (scales, how a conversation is read) goes into the config."""
    config = model.config
    backbone = config.backbone_config
    tensors = {}
    for name, tensor in _unmasked(model).items():
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
        "telltale": {
            "scales": config.scales,
            "gating": config.gating,
            "context_length": config.context_length,
            "calibration": config.calibration,
        },
        "pad_token_id": config.pad_token_id,
        "num_labels": 1,
    }
    (folder / "config.json").write_text(json.dumps(fields, indent=2, default=str) + "\n")
    write_tensors(tensors, folder)


def check_official(model: JudgeModel) -> None:
    """Raise :class:`~telltale.errors.ConfigError` for a judge that the layout cannot hold."""
    config = model.config
    backbone = config.backbone_config
    if backbone.model_type != "llama" or config.pooling != "last":
        raise ConfigError(
            f"the official layout is a Llama decoder's; this judge has a {backbone.model_type} backbone and pooling "
            f"{config.pooling!r}. Save it with layout='telltale'."
        )
    if config.intercept:
        raise ConfigError("the official layout has no intercepts of objectives; save it with layout='telltale'.")


def read_tensors(folder: Path, *, names_only: bool = False) -> dict[str, Any]:
    """Every tensor of the folder's safetensors files by name; ``names_only`` leaves the tensors where they are (None).

    Raises :class:`~telltale.errors.CheckpointError` for files that are missing, damaged, or outside of the folder.
    """
    index = folder / "model.safetensors.index.json"
    try:
        # Where both are there the single file counts, as it does to Transformers.
        sharded = index.is_file() and not (folder / "model.safetensors").is_file()
        files = sorted({*json.loads(index.read_text())["weight_map"].values()}) if sharded else ["model.safetensors"]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is no shard index: {error}") from error
    found: dict[str, Any] = {}
    for name in files:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index} names {name!r}; expected files of the folder itself.")
        try:
            with safe_open(folder / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    found[key] = None if names_only else file.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder / name} is missing or damaged: {error}") from error
    return found


def write_tensors(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """``model.safetensors``, or shards of 5 GiB and their index."""
    plan = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=SHARD_BYTES)
    for file, names in plan.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


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
    # Special tokens lie outside of so small a vocabulary, and Transformers warns of that.
    own = {"num_hidden_layers": 1, "vocab_size": 8, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    small = type(config.backbone_config)(**config.backbone_config.to_dict() | own)
    return AutoModel.from_config(small)


def _refuse_look_alikes(folder: Path, raw: dict[str, Any]) -> None:
    for key in ("num_quantiles", "quantiles"):
        if key in raw:
            raise UnsupportedModelError(
                f"{folder}: config.json has {key}, a quantile head of the same class name; expected ArmoRM's linear one."
            )
    names = read_tensors(folder, names_only=True)
    for name in sorted(names):
        if name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            raise UnsupportedModelError(f"{folder} holds {name}: its gate has batch norm; expected ArmoRM's plain MLP.")
    if raw.get("model_type") != "llama":
        raise UnsupportedModelError(
            f"{folder}: config.json has model_type={raw.get('model_type')!r}; expected llama, as {OFFICIAL_CLASS} is."
        )
    for name in ("regression_layer.weight", "reward_transform_matrix", "gating.layers.0.weight", "gating.logit_scale"):
        if name not in names:
            raise UnsupportedModelError(f"{folder} lacks {name}; expected the layout of {OFFICIAL_CLASS}.")


def _check_head(folder: Path, raw: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise for shapes of the head that do not fit each other or the configuration, and for a scale that is not above 0."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name.startswith(_HEAD)}
    rows = shapes["regression_layer.weight"][:1]
    count = raw.get("num_objectives", *rows)
    if not isinstance(count, int) or rows != (count,):
        raise CheckpointError(
            f"{folder}: regression_layer.weight has {rows[0] if rows else 'no'} rows for num_objectives={count!r}."
        )
    if shapes["reward_transform_matrix"] != (count, count):
        raise CheckpointError(
            f"{folder}: reward_transform_matrix has shape {shapes['reward_transform_matrix']}; expected ({count}, {count})."
        )
    if shapes["gating.logit_scale"] != (1,):
        raise CheckpointError(f"{folder}: gating.logit_scale has shape {shapes['gating.logit_scale']}; expected (1,).")
    if not float(tensors["gating.logit_scale"]) > 0:
        raise CheckpointError(f"{folder}: gating.logit_scale is not above 0, which turns every preference around.")


def _official_config(folder: Path, raw: dict[str, Any], tensors: Mapping[str, Tensor]) -> JudgeConfig:
    transform = tensors["reward_transform_matrix"]
    count = len(transform)
    unnamed = (
        OFFICIAL_OBJECTIVES if count == len(OFFICIAL_OBJECTIVES) else tuple(f"objective-{i}" for i in range(count))
    )
    objectives = tuple(map(str, raw.get("objectives") or unnamed))
    if len(objectives) != count:
        raise CheckpointError(f"{folder}: config.json names {len(objectives)} objectives for num_objectives={count}.")
    own = dict(raw.get("telltale") or {})
    fields = {key: value for key, value in raw.items() if key not in ("auto_map", "architectures")}
    backbone = AutoConfig.for_model("llama", **{key: value for key, value in fields.items() if key != "model_type"})
    backbone.architectures = ["LlamaModel"]
    helpsteer = (
        [name for name in objectives if name.startswith("helpsteer-")] if objectives == OFFICIAL_OBJECTIVES else []
    )
    return JudgeConfig(
        backbone,
        objectives=objectives,
        scales=own.get("scales", dict.fromkeys(helpsteer, HELPSTEER_SCALE)),
        nuisances=[name for index, name in enumerate(objectives) if not bool(transform[:, index].any())],
        gate={
            "hidden": int(raw.get("gating_hidden_dim", 1024)),
            "layers": int(raw.get("gating_n_hidden", 3)),
            "temperature": float(raw.get("gating_temperature", 10)),
            "mask_nuisances": False,
        },
        pooling="last",
        gating=own.get("gating", "template"),
        gating_pattern=raw.get("gating_pattern", LLAMA3_PATTERN),
        context_length=own.get("context_length", int(raw.get("max_position_embeddings", 8192))),
        tensor_dtypes={
            name: _DTYPE_NAMES[tensor.dtype] for name, tensor in tensors.items() if tensor.dtype in _DTYPE_NAMES
        },
        calibration=own.get("calibration"),
        pad_token_id=raw.get("pad_token_id"),
    )


def _check_shapes(folder: Path, model: JudgeModel, state: Mapping[str, Tensor]) -> None:
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}

    def official(name: str) -> str:
        return name.removeprefix("head.") if name.startswith("head.") else "model." + name.removeprefix("backbone.")

    for name in sorted(wanted.keys() - state.keys()):
        raise CheckpointError(f"{folder} lacks {official(name)}; expected the layout of {OFFICIAL_CLASS}.")
    for name in sorted(state.keys() - wanted.keys()):
        raise UnsupportedModelError(f"{folder} holds {official(name)}, which {OFFICIAL_CLASS} does not have.")
    for name, tensor in state.items():
        if tuple(tensor.shape) != wanted[name]:
            raise CheckpointError(
                f"{folder}: {official(name)} has shape {tuple(tensor.shape)}; expected {wanted[name]}."
            )


def _unmasked(model: JudgeModel) -> dict[str, Tensor]:
    """The state with masks of the gate as biases, which give the same weights to the last bit."""
    # The layout has no place for where the features lie.
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("head.feature_range.")}
    masked = list(model.head.gating.masked_columns)
    if masked:
        last = f"head.gating.layers.{model.head.gating.config.layers}"
        for name, value in ((f"{last}.weight", 0.0), (f"{last}.bias", NO_WEIGHT)):
            state[name] = state[name].clone()
            state[name][masked] = value
    return state


def _is_replaced(name: str, tokenizer: bool) -> bool:
    """Whether a file of the folder belongs to the model (or tokenizer) that is written now."""
    weights = name.startswith("model") and name.endswith((".safetensors", ".json"))
    return weights or (tokenizer and name in TOKENIZER_FILES)


def _load_own(folder: Path, dtype: torch.dtype | None) -> JudgeModel:
    read_tensors(folder, names_only=True)
    try:
        with quietly():
            model, report = JudgeModel.from_pretrained(
                folder,
                dtype=dtype or "auto",
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that the report names them
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be loaded: {in_a_line(error)}") from error
    for name, found, wanted in sorted(report.get("mismatched_keys") or []):
        raise CheckpointError(f"{folder}: {name} has shape {tuple(found)}; expected {tuple(wanted)}.")
    for kind, words in (("missing_keys", "lacks"), ("unexpected_keys", "holds the unknown")):
        keys = sorted(map(str, report.get(kind) or []))
        if keys:
            raise CheckpointError(f"{folder} {words} {keys[0]} ({len(keys)} in all); expected a whole judge.")
    model.head.float()
    return model


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
