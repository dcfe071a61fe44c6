"""A judge as a Hugging Face model: any decoder or encoder as backbone, the head on top, one logit.

Registered with the Auto classes under its own ``model_type``, so that ``AutoModelForSequenceClassification`` loads it (after
``import telltale.align.judge``) and TRL and OpenRLHF take it as a reward model: ``logits`` is (batch, 1).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from telltale.align.judge.data import Scale
from telltale.align.judge.features import POOLINGS, SHORTEST, batch_features, last_token, mean_of, padded_right
from telltale.align.judge.head import GateConfig, Head
from telltale.align.judge.templates import Encoded
from telltale.config import check_choice, check_integer
from telltale.errors import ConfigError, DataError

MODEL_TYPE = "telltale_judge"
GATINGS = ("template", "pattern")


class JudgeConfig(PretrainedConfig):
    """What a judge is made of: its backbone's own configuration, objectives with scales, and how a conversation is read."""

    model_type = MODEL_TYPE
    sub_configs = {"backbone_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        backbone_config: PretrainedConfig | Mapping[str, Any] | None = None,
        *,
        objectives: Sequence[str] = ("score",),
        scales: Mapping[str, Mapping[str, Any]] | None = None,
        nuisances: Sequence[str] = (),
        gate: Mapping[str, Any] | None = None,
        prompt_size: int | None = None,
        pooling: str = "last",
        gating: str = "template",
        gating_pattern: Sequence[int] | None = None,
        context_length: int | None = None,
        tensor_dtypes: Mapping[str, str] | None = None,
        intercept: bool = False,
        range_directions: int = 0,
        calibration: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(backbone_config, Mapping):
            values = dict(backbone_config)
            backbone_config = AutoConfig.for_model(values.pop("model_type"), **values)
        self.backbone_config: Any = backbone_config
        self.objectives = list(objectives)
        for scale in (scales or {}).values():
            Scale(**scale)  # raises for one that is none
        self.scales: dict[str, dict[str, Any]] = {name: dict(scale) for name, scale in (scales or {}).items()}
        self.nuisances = list(nuisances)
        self.gate = dict(gate or {})
        self.prompt_size = prompt_size
        check_choice("pooling", pooling, POOLINGS)
        check_choice("gating", gating, GATINGS)
        self.pooling = pooling
        self.gating = gating
        if gating_pattern is not None and not all(isinstance(token, int) for token in gating_pattern):
            raise ConfigError(f"gating_pattern={gating_pattern!r} is not allowed; expected a list of token ids.")
        self.gating_pattern = None if gating_pattern is None else list(gating_pattern)
        if context_length is not None:
            check_integer("context_length", context_length, low=SHORTEST)
        self.context_length = context_length
        self.tensor_dtypes = dict(tensor_dtypes or {})
        self.intercept = bool(intercept)
        self.range_directions = int(range_directions)
        self.calibration = None if calibration is None else _checked(calibration)
        kwargs.pop("num_labels", None)
        pad = kwargs.pop("pad_token_id", getattr(backbone_config, "pad_token_id", None))
        super().__init__(num_labels=1, pad_token_id=pad, **kwargs)

    @property
    def hidden_size(self) -> int:
        """Of the backbone's states."""
        return int(self.backbone_config.hidden_size) if self.backbone_config is not None else 0

    def scale(self, objective: str) -> Scale:
        """The scale that ``objective`` was rated on."""
        return Scale(**self.scales.get(objective, {}))


def _checked(calibration: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says of a judge's probability. Raises :class:`~telltale.errors.ConfigError` for numbers that are none."""
    if not isinstance(calibration, Mapping) or set(calibration) != {"slope", "threshold", "alpha", "delta"}:
        raise ConfigError(f"calibration={calibration!r} is none; expected slope, threshold, alpha and delta.")
    for name, value in calibration.items():
        if value is None and name == "threshold":
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise ConfigError(f"the calibration's {name} is {value!r}; expected a finite number that is not below 0.")
    return dict(calibration)


@dataclass
class JudgeOutput(ModelOutput):
    """``logits`` (B, 1) is what reward-model users take; the other names are the official checkpoint's."""

    logits: Tensor | None = None
    score: Tensor | None = None
    """(B,)."""
    rewards: Tensor | None = None
    """(B, K), raw."""
    gating_output: Tensor | None = None
    """(B, K): logit_scale * g."""
    hidden_state: Tensor | None = None
    """(B, d)."""
    prompt_embedding: Tensor | None = None
    """(B, prompt size)."""


class JudgeModel(PreTrainedModel):
    """Backbone and :class:`~telltale.align.judge.head.Head`; the head is always in float32."""

    config_class = JudgeConfig
    base_model_prefix = "backbone"
    _keep_in_fp32_modules = ["head"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["head"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: JudgeConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        if config.backbone_config is None:
            raise ConfigError("a judge needs the configuration of its backbone (backbone_config).")
        self.backbone = AutoModel.from_config(config.backbone_config) if backbone is None else backbone
        self.head = Head(
            config.objectives,
            config.hidden_size,
            prompt_size=config.prompt_size,
            gate=GateConfig.from_dict(config.gate),
            nuisances=config.nuisances,
            intercept=config.intercept,
            range_directions=config.range_directions,
        )
        self.post_init()

    @classmethod
    def assembled(
        cls,
        backbone: PreTrainedModel,
        head: Head,
        *,
        scales: Mapping[str, Scale] | None = None,
        pooling: str = "last",
        gating: str = "template",
        gating_pattern: Sequence[int] | None = None,
        context_length: int | None = None,
        calibration: Mapping[str, Any] | None = None,
    ) -> JudgeModel:
        """A judge from a backbone and a fitted head. ``gating_pattern`` is needed where raw token ids are judged (TRL): see
        :func:`~telltale.align.judge.templates.template_pattern`. ``calibration``: of
        :meth:`~telltale.align.judge.calibration.Calibration.to_config`."""
        # A copy: being part of another configuration resets which attention the backbone runs.
        config = JudgeConfig(
            copy.deepcopy(backbone.config),
            objectives=head.objectives,
            scales={name: scale.to_dict() for name, scale in (scales or {}).items()},
            nuisances=head.nuisances,
            gate=asdict(head.gating.config),
            prompt_size=head.gating.prompt_size,
            pooling=pooling,
            gating=gating,
            gating_pattern=gating_pattern,
            context_length=context_length,
            intercept=head.has_intercept,
            range_directions=0 if head.feature_range is None else len(head.feature_range.spread),
            calibration=calibration,
        )
        model = cls(config, backbone=backbone)
        model.head.load_state_dict(head.state_dict())
        model.head.to(next(backbone.parameters()).device)
        return model.eval()

    def get_input_embeddings(self) -> Any:
        """The backbone's."""
        return self.backbone.get_input_embeddings()

    def features(self, rows: Sequence[Encoded], *, left: bool = False) -> tuple[Tensor, Tensor]:
        """States of responses (B, d) and prompts (B, prompt size) of encoded conversations; ``left`` pads on the left."""
        return batch_features(
            self.backbone, rows, pooling=self.config.pooling, pad=self.config.pad_token_id or 0, left=left
        )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        gating_index: Tensor | None = None,
        prompt_input_ids: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> JudgeOutput:
        """Judge token ids (B, L), padded on either side under ``attention_mask`` (None: no padding).

        ``gating_index`` (B,): where each row's gate reads; None searches for ``config.gating_pattern``, its last occurrence.
        An encoder takes the prompt alone as ``prompt_input_ids`` (None: the whole conversation is used for it).
        """
        given = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        input_ids, mask = padded_right(input_ids, given)
        options = {"use_cache": False} if self.config.pooling == "last" else {}
        states = self.backbone(input_ids=input_ids, attention_mask=mask, **options).last_hidden_state
        if self.config.pooling == "mean":
            hidden = mean_of(states, mask)
            prompts = hidden
            if prompt_input_ids is not None:
                shown = torch.ones_like(prompt_input_ids) if prompt_attention_mask is None else prompt_attention_mask
                prompt_input_ids, shown = padded_right(prompt_input_ids, shown)
                before = self.backbone(input_ids=prompt_input_ids, attention_mask=shown).last_hidden_state
                prompts = mean_of(before, shown)
        else:
            hidden = last_token(states, mask)
            if gating_index is None:
                gating_index = pattern_positions(input_ids, mask, self.config.gating_pattern)
            else:
                gating_index = (given.bool().cumsum(1) - 1).gather(1, gating_index[:, None])[:, 0]
            prompts = states[torch.arange(len(states), device=states.device), gating_index]
        found = self.head(hidden, prompts)
        score = found.score.to(torch.float32)
        return JudgeOutput(score.unsqueeze(1), score, found.rewards, found.weights, hidden, prompts)


def pattern_positions(ids: Tensor, mask: Tensor, pattern: Sequence[int] | None) -> Tensor:
    """The first token of the last occurrence of ``pattern`` in each row of ids (B, L), (B,); padding does not count.

    Raises :class:`~telltale.errors.ConfigError` without a pattern and :class:`~telltale.errors.DataError` naming a row that
    does not hold it.
    """
    if not pattern:
        raise ConfigError(
            "raw token ids need the judge's gating_pattern to find the prompt; assemble the judge with "
            "template_pattern(tokenizer), or give gating_index."
        )
    width, length = len(pattern), ids.shape[1]
    if length < width:
        raise DataError(f"the gating pattern of {width} tokens does not fit into {length}.")
    wanted = torch.tensor(list(pattern), device=ids.device)
    fits = (ids.unfold(1, width, 1) == wanted).all(-1) & mask.bool().unfold(1, width, 1).all(-1)
    absent = (~fits.any(1)).nonzero()[:, 0]
    if len(absent):
        raise DataError(
            f"row {int(absent[0])} does not hold the gating pattern {list(pattern)}; expected a templated conversation."
        )
    return (fits * torch.arange(1, fits.shape[1] + 1, device=ids.device)).argmax(1)


AutoConfig.register(MODEL_TYPE, JudgeConfig, exist_ok=True)
AutoModelForSequenceClassification.register(JudgeConfig, JudgeModel, exist_ok=True)
