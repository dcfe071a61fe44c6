"""Layer dropout: per sample, saving compute, invisible to state_dict, reproducible under recomputation."""

from __future__ import annotations

import copy

import pytest
import torch

from models.tiny_models import CONFIGS, tiny_model
from telltale.errors import ConfigError
from telltale.models.families import parts_of
from telltale.train.layer_dropout import LayerDropout
from telltale.train.layerskip import LayerSkipConfig, apply

FAMILIES = ["llama", "qwen2-window", "gemma", "phi3", "gpt2", "gpt_neox"]


def ids(rows: int = 6, length: int = 10, seed: int = 0) -> torch.Tensor:
    return torch.randint(97, (rows, length), generator=torch.Generator().manual_seed(seed))


def without_dropout_modules(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


@pytest.mark.parametrize("name", FAMILIES)
def test_keys_and_eval_output_are_those_of_the_plain_model(name):
    model = tiny_model(name)
    keys = list(model.state_dict())
    before = model(input_ids=ids(), use_cache=False).logits
    recipe = apply(model, LayerSkipConfig(p_max=0.9))
    assert list(model.state_dict()) == keys
    assert torch.equal(model(input_ids=ids(), use_cache=False).logits, before)
    recipe.remove()
    assert all("forward" not in vars(layer) for layer in parts_of(model).layers)


@pytest.mark.parametrize("name", FAMILIES)
def test_rate_one_makes_a_layer_the_identity(name):
    model = without_dropout_modules(tiny_model(name))
    parts = parts_of(model)
    dropout = LayerDropout(parts)
    dropout.set_rates([1.0] * 4, step=0)
    embedded = {}
    parts.layers[0].register_forward_pre_hook(lambda module, args: embedded.update(x=args[0]))
    out = {}
    parts.norm.register_forward_pre_hook(lambda module, args: out.update(x=args[0]))
    model(input_ids=ids(), use_cache=False)
    assert torch.equal(embedded["x"], out["x"])


@pytest.mark.parametrize("name", FAMILIES)
def test_kept_rows_are_what_they_would_be_alone_and_dropped_rows_pass_through(name):
    model = without_dropout_modules(tiny_model(name))
    parts = parts_of(model)
    dropout = LayerDropout(parts, seed=3)
    dropout.set_rates([0.0, 0.0, 0.5, 0.0], step=7)
    seen = {}
    parts.layers[2].register_forward_hook(
        lambda module, args, output: seen.update(
            before=args[0], after=output[0] if isinstance(output, tuple) else output
        )
    )
    batch = ids(8)
    mask = torch.ones_like(batch)
    mask[2, 7:] = 0
    model(input_ids=batch, attention_mask=mask, use_cache=False)
    kept = dropout.kept_rows(2, 8)
    assert 0 < len(kept) < 8
    for row in set(range(8)) - set(kept):
        assert torch.equal(seen["after"][row], seen["before"][row])
    before = seen["before"]
    dropout.set_rates([0.0] * 4, step=7)
    model(input_ids=batch[kept], attention_mask=mask[kept], use_cache=False)
    torch.testing.assert_close(seen["before"], before[kept])
    after = seen["after"].clone()
    dropout.set_rates([0.0, 0.0, 0.5, 0.0], step=7)
    model(input_ids=batch, attention_mask=mask, use_cache=False)
    torch.testing.assert_close(seen["after"][kept], after, atol=1e-5, rtol=1e-5)


def test_dropped_rows_cost_no_compute():
    model = tiny_model("llama").train()
    dropout = LayerDropout(parts_of(model))
    dropout.set_rates([0.0, 0.5, 0.5, 0.5], step=1)
    rows = []
    parts_of(model).layers[3].mlp.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0]))
    model(input_ids=ids(16), use_cache=False)
    assert rows == [len(dropout.kept_rows(3, 16))]
    assert rows[0] < 16


def test_rate_is_met_and_no_layer_copies_another():
    dropout = LayerDropout(parts_of(tiny_model("llama")))
    rates = [0.0, 0.1, 0.3, 0.6]
    kept = [0] * 4
    together = 0
    for step in range(400):
        dropout.set_rates(rates, step=step)
        rows = [dropout.kept_rows(layer, 25) for layer in range(4)]
        kept = [total + len(row) for total, row in zip(kept, rows, strict=True)]
        together += len(set(range(25)) - set(rows[2]) - set(rows[3]))
    for rate, total in zip(rates, kept, strict=True):
        sigma = (1e4 * rate * (1 - rate)) ** 0.5
        assert abs(total - 1e4 * (1 - rate)) <= 4 * sigma
    assert abs(together - 1e4 * 0.3 * 0.6) <= 4 * (1e4 * 0.18 * 0.82) ** 0.5


def test_gradients_are_the_same_with_activation_checkpointing():
    losses, gradients = [], []
    for checkpointing in (False, True):
        model = tiny_model("llama").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        recipe = apply(model, LayerSkipConfig(p_max=0.6, rotation=2, seed=5))
        recipe.set_step(4)
        total = 0.0
        for seed in (0, 1):
            loss, _ = recipe.loss(ids(8, seed=seed))
            loss.backward()
            total += loss.item()
        assert recipe.dropout.dropped > 0
        losses.append(total)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert losses[0] == losses[1]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_a_cache_with_content_is_refused_while_rows_are_dropped():
    model = tiny_model("llama").train()
    dropout = LayerDropout(parts_of(model))
    dropout.set_rates([0.9] * 4, step=0)
    fresh = model(input_ids=ids(), use_cache=True)
    assert fresh.logits.shape[0] == 6
    dropout.set_rates([0.0] * 4, step=0)
    cache = model(input_ids=ids(), use_cache=True).past_key_values
    dropout.set_rates([0.9] * 4, step=0)
    with pytest.raises(ConfigError, match=r"model\.eval"):
        model(input_ids=ids(length=1), past_key_values=cache)


def test_two_recipes_on_one_model_are_refused():
    model = tiny_model("llama")
    recipe = apply(model, LayerSkipConfig())
    with pytest.raises(ConfigError, match="wrapped already"):
        apply(model, LayerSkipConfig())
    recipe.remove()
    apply(model, LayerSkipConfig()).remove()


def test_saved_model_loads_as_a_plain_one(tmp_path):
    model = tiny_model("llama")
    plain = copy.deepcopy(model)
    apply(model, LayerSkipConfig(p_max=0.5))
    model.train().save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(input_ids=ids()).logits, plain(input_ids=ids()).logits)


def test_every_family_of_the_table_trains():
    for name in CONFIGS:
        model = tiny_model(name).train()
        recipe = apply(model, LayerSkipConfig(p_max=0.3, rotation=2))
        for _ in range(3):
            loss, details = recipe.loss(ids())
            loss.backward()
            recipe.advance()
        assert torch.isfinite(loss)
        assert sum(details["weights"].values()) == pytest.approx(1.0)
