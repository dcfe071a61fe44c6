"""``OGERConfig``: TRL's ``GRPOConfig`` and a field for every choice that the source leaves open, with two presets.

A field that is None takes its preset's value. "default" is what our measurements recommend; "paper" is the literal formula. With
``oger_coef=0, oger_hybrid=0`` there is nothing of OGER left, and TRL's own defaults hold for TRL's own fields.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from telltale.align.oger.groups import REFERENCES, REPLACED, TEACHER_DRAWS
from telltale.align.oger.reward import ENTROPIES, OFFLINE_LOSSES, SIMILARITIES, TEACHER_ADVANTAGES, check_gamma
from telltale.config import check_choice, check_integer, check_range
from telltale.errors import ConfigError, UnsupportedModelError

PRESETS: dict[str, dict[str, Any]] = {
    "default": {
        "oger_coef": 1.0,
        "oger_hybrid": 1,
        "oger_similarity": "mean",
        "oger_reference": "teachers",
        "oger_clip": True,
        "oger_entropy": "mean",
        "oger_replaced": "least_divergent",
        "oger_keep_only_correct": True,
        "oger_teacher_draw": "uniform",
        "oger_offline_loss": "on_policy",
        "oger_gamma": 0.1,
        "oger_teacher_advantage": "clamp",
        "oger_std_floor": 0.0,
        "scale_rewards": "none",
        "loss_type": "dapo",
    },
    "paper": {
        "oger_coef": 1.0,
        "oger_hybrid": 1,
        "oger_similarity": "mean",
        "oger_reference": "teachers",
        "oger_clip": True,
        "oger_entropy": "last",
        "oger_replaced": "least_divergent",
        "oger_keep_only_correct": False,
        "oger_teacher_draw": "uniform",
        "oger_offline_loss": "on_policy",
        "oger_gamma": 0.1,
        "oger_teacher_advantage": "raw",
        "oger_std_floor": 0.0,
        "scale_rewards": "group",
        "loss_type": "dapo",
    },
}
HOST_FIELDS = ("scale_rewards", "loss_type")
"""Of TRL, which the presets set too. ``dapo`` is the token mean over the whole batch."""


def _help(text: str) -> dict[str, str]:
    return {"help": f"{text} None: the preset's."}


@dataclass
class OGERConfig(GRPOConfig):
    """Every field of ``trl.GRPOConfig``, and those below; ``docs/oger/howto.md`` has the presets as a table.

    Raises :class:`~telltale.errors.ConfigError` on construction for a value that cannot be right, with field and range.
    """

    oger_preset: str = field(default="default", metadata={"help": "default, or paper (the literal formula)."})
    oger_coef: float | None = field(default=None, metadata=_help("Weight of the exploration bonus, >= 0."))
    oger_hybrid: int | None = field(
        default=None, metadata=_help("Teacher traces per group, from 0 to num_generations - 1.")
    )
    oger_similarity: str | None = field(default=None, metadata=_help("Over references: mean, max, min or centroid."))
    oger_reference: str | None = field(
        default=None, metadata=_help("Divergence from teachers, group (other correct rollouts), or teachers+group.")
    )
    oger_clip: bool | None = field(default=None, metadata=_help("Clip the divergence to [0, 1]."))
    oger_entropy: str | None = field(default=None, metadata=_help("Of a rollout: last, mean, top20 or none."))
    oger_replaced: str | None = field(
        default=None,
        metadata=_help("Which rollout leaves: least_divergent, least_divergent_correct, random or lowest_reward."),
    )
    oger_keep_only_correct: bool | None = field(
        default=None, metadata=_help("A group's only correct rollout never leaves.")
    )
    oger_teacher_draw: str | None = field(default=None, metadata=_help("Which trace enters: uniform or shortest."))
    oger_offline_loss: str | None = field(
        default=None, metadata=_help("Of teacher tokens: on_policy, shaped, behavior or sft.")
    )
    oger_gamma: float | None = field(default=None, metadata=_help("Of the shaped loss, > 0."))
    oger_teacher_advantage: str | None = field(default=None, metadata=_help("raw, or clamp at 0."))
    oger_std_floor: float | None = field(
        default=None, metadata=_help("Least standard deviation that rewards are divided by, >= 0.")
    )
    scale_rewards: Any = field(default=None, metadata=_help("TRL's: group, batch or none."))
    loss_type: Any = field(default=None, metadata=_help("TRL's."))
    oger_pass_at: tuple[int, ...] = field(
        default=(1, 4, 8, 16),
        metadata={"help": "k of pass@k in evaluation; those above num_generations_eval are left out."},
    )

    def __post_init__(self) -> None:
        check_choice("oger_preset", self.oger_preset, PRESETS)
        preset = PRESETS[self.oger_preset]
        for name, value in preset.items():
            if name not in HOST_FIELDS and getattr(self, name) is None:
                setattr(self, name, value)
        for name in HOST_FIELDS:
            if getattr(self, name) is None:
                setattr(self, name, preset[name] if self.active else GRPOConfig.__dataclass_fields__[name].default)
        _check(self)
        super().__post_init__()
        if self.active:
            _check_host(self)

    @property
    def active(self) -> bool:
        """Whether anything differs from TRL's trainer."""
        return bool(self.oger_coef or self.oger_hybrid)


def _check(config: OGERConfig) -> None:
    check_integer("seed", config.seed, low=0, high=2**32 - 1)  # as NumPy, which Transformers seeds too
    check_range("temperature", config.temperature, above=0.0)
    check_range("oger_coef", config.oger_coef, low=0.0)
    check_integer("oger_hybrid", config.oger_hybrid, low=0)
    check_integer("num_generations", config.num_generations, low=2)
    assert config.oger_hybrid is not None
    assert config.oger_gamma is not None
    if config.oger_hybrid >= config.num_generations:
        raise ConfigError(
            f"oger_hybrid={config.oger_hybrid} leaves no rollout of num_generations={config.num_generations}; expected at most "
            f"{config.num_generations - 1}."
        )
    check_gamma(config.oger_gamma)
    check_range("oger_std_floor", config.oger_std_floor, low=0.0)
    choices = {
        "oger_similarity": SIMILARITIES,
        "oger_reference": REFERENCES,
        "oger_entropy": ENTROPIES,
        "oger_replaced": REPLACED,
        "oger_teacher_draw": TEACHER_DRAWS,
        "oger_offline_loss": OFFLINE_LOSSES,
        "oger_teacher_advantage": TEACHER_ADVANTAGES,
        "oger_clip": (True, False),
        "oger_keep_only_correct": (True, False),
    }
    for name, allowed in choices.items():
        check_choice(name, getattr(config, name), allowed)
    if not isinstance(config.oger_pass_at, (list, tuple)):
        raise ConfigError(f"oger_pass_at={config.oger_pass_at!r} is no list; expected whole numbers, such as [1, 4].")
    for k in config.oger_pass_at:
        check_integer("oger_pass_at", k, low=1)


def _check_host(config: OGERConfig) -> None:
    """What of TRL cannot go with OGER, each with the reason."""
    if config.use_vllm and config.vllm_importance_sampling_correction and config.oger_hybrid:
        raise ConfigError(
            "vllm_importance_sampling_correction=True cannot go with teacher traces: vLLM never sampled them, so they have no "
            "sampling probability to correct by. Set vllm_importance_sampling_correction=False, or oger_hybrid=0."
        )
    if config.multi_objective_aggregation != "sum_then_normalize" and config.oger_std_floor:
        raise ConfigError(
            f"oger_std_floor={config.oger_std_floor} cannot go with multi_objective_aggregation="
            f"{config.multi_objective_aggregation!r}, which scales every reward by itself; expected 0."
        )
    if config.multi_objective_aggregation != "sum_then_normalize" and config.oger_offline_loss == "sft":
        raise ConfigError(
            f"oger_offline_loss='sft' keeps traces out of the group's statistics, and multi_objective_aggregation="
            f"{config.multi_objective_aggregation!r} makes them before that; expected 'sum_then_normalize'."
        )
    if config.oger_offline_loss == "shaped" and config.importance_sampling_level != "token":
        raise ConfigError(
            f"oger_offline_loss='shaped' weighs tokens; importance_sampling_level={config.importance_sampling_level!r} has "
            f"one ratio per sequence. Expected 'token'."
        )
    steps = config.steps_per_generation
    rows = config.per_device_train_batch_size * steps
    if rows % config.num_generations:
        raise ConfigError(
            f"per_device_train_batch_size * steps_per_generation = {rows} rows a process split a group of num_generations="
            f"{config.num_generations} over processes; expected a multiple of {config.num_generations}, so that each process holds "
            f"whole groups."
        )
    if config.oger_offline_loss == "shaped" and config.gradient_accumulation_steps % (steps * config.num_iterations):
        raise ConfigError(
            f"oger_offline_loss='shaped' is exact for one policy update per generation only; num_iterations="
            f"{config.num_iterations}, steps_per_generation={steps} and gradient_accumulation_steps="
            f"{config.gradient_accumulation_steps} make several. Expected a gradient_accumulation_steps that is a multiple of "
            f"steps_per_generation * num_iterations = {steps * config.num_iterations}."
        )


def check_save_steps(args: OGERConfig, save_steps: float) -> None:
    """A checkpoint inside a generation could not be resumed exactly: its rollouts are not in it."""
    strategy = getattr(args.save_strategy, "value", args.save_strategy)
    if strategy != "steps" or save_steps < 1:
        return
    every, accumulated = args.steps_per_generation * args.num_iterations, args.gradient_accumulation_steps
    fits = every // math.gcd(every, accumulated)
    if int(save_steps) % fits:
        nearest = max(round(save_steps / fits), 1) * fits
        raise ConfigError(
            f"save_steps={int(save_steps)} falls inside a generation, which lasts {every} passes of {accumulated} to a step; a run "
            f"resumed there would not be the same. Expected a multiple of {fits}, such as {nearest}."
        )


def refuse_options(others: dict[str, Any], *, active: bool) -> None:
    """What of TRL's trainer cannot go with teachers: raises UnsupportedModelError with the reason."""
    reasons = {
        "tools": "a trace that calls tools has no results in its tokens",
        "rollout_func": "it samples by itself, and the rows that it returns cannot be matched with the data",
        "environment_factory": "an environment's observations are not in a trace",
    }
    for name, reason in reasons.items():
        if active and others.get(name):
            raise UnsupportedModelError(
                f"{name} cannot go with teachers: {reason}. Leave it out, or use TRL's own trainer."
            )
