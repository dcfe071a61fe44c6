"""PEFT under the recipe: adapters in the base model's modules train as the formula says, all others are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from telltale.errors import TelltaleError, UnsupportedModelError
from telltale.train.hf_trainer import LayerSkipTrainer
from telltale.train.layerskip import LayerSkipConfig, apply
from train import exit_reference
from train.exit_reference import exit_logits, independent, model, token_losses, weights
from train.test_hf_trainer_contract import ON, RATE, arguments, same, texts, trained

peft = pytest.importorskip("peft")
TARGETS = ["q_proj", "v_proj", "down_proj"]


def adapted(config: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        found = peft.get_peft_model(model(), config)
        # Adapters begin as nothing; what they do has to be seen.
        for parameter in found.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    return found


INSIDE = {
    "lora": lambda: peft.LoraConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM"),
    "lora on the head": lambda: peft.LoraConfig(r=2, target_modules=[*TARGETS, "lm_head"], task_type="CAUSAL_LM"),
    "lora and a whole head": lambda: peft.LoraConfig(
        r=2, target_modules=TARGETS, modules_to_save=["lm_head", "norm"], task_type="CAUSAL_LM"
    ),
    "dora": lambda: peft.LoraConfig(r=2, target_modules=TARGETS, use_dora=True, task_type="CAUSAL_LM"),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "loha": lambda: peft.LoHaConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM"),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, r=0, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "vera": lambda: peft.VeraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "adaption prompt": lambda: peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM"),
    "norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "norm"], task_type="CAUSAL_LM"),
}
OUTSIDE = {
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "multitask prompt": lambda: peft.MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, num_tasks=2, num_ranks=1
    ),
    "adalora": lambda: peft.AdaLoraConfig(
        init_r=2, target_r=1, target_modules=TARGETS, total_step=9, tinit=1, tfinal=1
    ),
    "poly": lambda: peft.PolyConfig(r=2, n_tasks=2, n_skills=2, target_modules=TARGETS, task_type="CAUSAL_LM"),
    "activated lora": lambda: peft.LoraConfig(
        r=2, target_modules=["q_proj"], alora_invocation_tokens=[5], task_type="CAUSAL_LM"
    ),
}


@pytest.mark.parametrize("name", INSIDE)
def test_an_adapter_in_the_modules_gives_the_formulas_loss_and_gradients(name, tmp_path):
    kind = {"fields": {"max_steps": 2, "gradient_accumulation_steps": 2}}
    job, losses, gradients = trained(LayerSkipTrainer, tmp_path, kind, layerskip=ON, model=adapted(INSIDE[name]()))
    other = adapted(INSIDE[name]())
    base = other.get_base_model()
    wanted, theirs, _ = independent([[micro] for micro in job.batches], learning_rate=RATE, net=base)
    theirs = [{f"base_model.model.{key}": value for key, value in step.items()} for step in theirs]
    same((losses, gradients), (wanted, theirs))


def test_merged_adapters_are_the_model_that_was_trained(monkeypatch):
    monkeypatch.setattr(exit_reference, "P_MAX", 0.0)
    found = adapted(INSIDE["lora"]())
    recipe = apply(found, LayerSkipConfig(p_max=0.0, e_scale=0.2, rotation=2))
    ids = torch.stack([row["input_ids"] for row in texts(4)])
    loss, _ = recipe.loss(ids)
    recipe.remove()
    merged = found.merge_and_unload().eval()
    logits, _ = exit_logits(merged, {"input_ids": ids}, 0, 0)
    wanted = sum(weight * token_losses(logits[layer], ids).mean() for layer, weight in weights(0).items())
    torch.testing.assert_close(loss, wanted)


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_adapter_outside_of_the_modules_is_refused_by_name(name, tmp_path):
    config = OUTSIDE[name]()
    found = peft.get_peft_model(model(), config)
    with pytest.raises(UnsupportedModelError, match=r"adapter|PEFT"):
        apply(found, ON)
    with pytest.raises(TelltaleError, match=r"adapter|PEFT"):
        LayerSkipTrainer(found, arguments(tmp_path), layerskip=ON)


def test_the_recipe_on_a_model_in_lora_goes_on_the_base_model():
    found = adapted(INSIDE["lora"]())
    recipe = apply(found, ON)
    assert recipe.n_layers == 4
    recipe.remove()
    assert all("forward" not in vars(layer) for layer in found.get_base_model().model.layers)
