"""The mix-in before TRL's SFTTrainer: its packing, masks, own losses and metrics stay what they are."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from serve.small_tokenizers import words
from telltale.errors import ConfigError
from telltale.train.hf_trainer import LayerSkipMixin
from telltale.train.layerskip import LayerSkipConfig
from train.exit_reference import Recorded, independent, model, power_loss, recording, token_losses
from train.test_hf_trainer_contract import OFF, ON, RATE, power, same

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


class Mixed(LayerSkipMixin, trl.SFTTrainer):
    pass


def rows(*, completions: bool = False) -> Any:
    """Texts of 5 to 11 tokens; with ``completions`` their first third is a prompt, which is not learned."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for index in range(72):
        length = 5 + index % 7
        ids = torch.randint(1, 61, (length,), generator=generator).tolist()
        found.append(
            {"input_ids": ids, "completion_mask": [int(at >= length // 3 or not completions) for at in range(length)]}
        )
    return datasets.Dataset.from_list(found)


KINDS: dict[str, dict[str, Any]] = {
    "padded": {},
    "packed": {"fields": {"packing": True, "max_length": 24, "per_device_train_batch_size": 2}},
    "padding-free": {"fields": {"padding_free": True, "max_length": None}},
    "completions": {"fields": {"completion_only_loss": True}, "completions": True},
    "smoothed": {"fields": {"label_smoothing_factor": 0.2}, "each": partial(token_losses, smoothing=0.2)},
    "custom": {"options": {"compute_loss_func": power_loss}, "each": power},
    "packed and accumulated": {
        "fields": {
            "packing": True,
            "max_length": 24,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 3,
            "max_steps": 2,
        }
    },
}


def trained(trainer_class: type, folder: Any, kind: dict[str, Any], **options: Any) -> tuple[Any, list, list]:
    fields = {
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "learning_rate": RATE,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "seed": 1,
    } | kind.get("fields", {})
    recorded = Recorded()
    job = recording(trainer_class)(
        model=options.pop("model", None) or model(),
        args=trl.SFTConfig(output_dir=str(folder), **fields),
        train_dataset=rows(completions=kind.get("completions", False)),
        eval_dataset=rows().select(range(10)),
        processing_class=words(),
        callbacks=[recorded],
        **kind.get("options", {}),
        **options,
    )
    job.train()
    kept = ("loss", "entropy", "mean_token_accuracy", "num_tokens", "grad_norm")
    log = [{key: entry[key] for key in kept if key in entry} for entry in job.state.log_history if "loss" in entry]
    return job, log, recorded.gradients


@pytest.mark.parametrize("name", KINDS)
def test_switched_off_it_is_sft_trainer_with_all_its_metrics(name, tmp_path):
    ours, log, gradients = trained(Mixed, tmp_path, KINDS[name], layerskip=OFF)
    theirs, wanted, other = trained(trl.SFTTrainer, tmp_path, KINDS[name])
    assert log == wanted
    assert {"entropy", "mean_token_accuracy", "num_tokens"} <= log[-1].keys()
    for mine, plain in zip(gradients, other, strict=True):
        assert all(torch.equal(mine[key], plain[key]) for key in plain)
    clock = ("runtime", "per_second", "preparation_time")
    evaluations = [
        {key: value for key, value in job.evaluate().items() if not key.endswith(clock)} for job in (ours, theirs)
    ]
    assert evaluations[0] == evaluations[1]
    assert "eval_mean_token_accuracy" in evaluations[0]


@pytest.mark.parametrize("name", KINDS)
def test_switched_on_it_is_the_loop_written_out(name, tmp_path):
    kind = KINDS[name]
    job, log, gradients = trained(Mixed, tmp_path, kind, layerskip=ON)
    if "pack" in name or "free" in name:
        assert all("position_ids" in batch and "cu_seq_lens_q" in batch for step in job.batches for batch in step)
    wanted, theirs, dropped = independent(
        [[micro] for micro in job.batches], learning_rate=RATE, each=kind.get("each", token_losses)
    )
    assert dropped > 0
    same(([entry["loss"] for entry in log], gradients), (wanted, theirs))
    assert all(entry["entropy"] > 0.0 and 0.0 <= entry["mean_token_accuracy"] <= 1.0 for entry in log)


def test_the_metrics_of_training_are_the_last_exits(tmp_path):
    no_dropout = LayerSkipConfig(p_max=0.0, rotation=2)
    kind = {"fields": {"max_steps": 1}}
    _, log, _ = trained(Mixed, tmp_path, kind, layerskip=no_dropout)
    _, plain, _ = trained(trl.SFTTrainer, tmp_path, kind)
    for name in ("entropy", "mean_token_accuracy", "num_tokens"):
        assert log[0][name] == plain[0][name]
    assert log[0]["loss"] != plain[0]["loss"]


def test_other_losses_of_trl_are_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match="loss_type='dft'"):
        trained(Mixed, tmp_path, {"fields": {"loss_type": "dft"}}, layerskip=ON)

    class Preferring(LayerSkipMixin, trl.DPOTrainer):
        pass

    with pytest.raises(ConfigError, match="DPOTrainer computes a loss of its own"):
        Preferring(
            model=model(),
            ref_model=model(),
            args=trl.DPOConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False),
            train_dataset=datasets.Dataset.from_list([{"prompt": "one", "chosen": " two", "rejected": " six"}] * 4),
            processing_class=words(),
            layerskip=ON,
        )
