"""The early-exit loss against an obvious reference, its gradients, its memory, and its refusals."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from models.tiny_models import tiny_model
from telltale.errors import DataError
from telltale.models.exits import captured_exits, exit_quality
from telltale.models.families import parts_of
from telltale.train import exit_loss
from telltale.train.layerskip import LayerSkipConfig, apply, exit_loss_weights


def ids(rows: int = 5, length: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randint(97, (rows, length), generator=torch.Generator().manual_seed(seed))


def reference_loss(model, batch, labels, config, step):
    """All exits' logits at once, as the formula reads."""
    parts = parts_of(model)
    with captured_exits(parts) as states:
        parts.base(input_ids=batch, use_cache=False)
    weights = exit_loss_weights(len(states), config, step)
    total = 0.0
    final = parts.head(parts.norm(states[-1]))[:, :-1].detach()
    for weight, state in zip(weights, states, strict=True):
        logits = parts.head(parts.norm(state))[:, :-1]
        if config.exit_target == "distill" and state is not states[-1]:
            keep = labels[:, 1:] != -100
            t = config.distillation_temperature
            loss = t**2 * functional.kl_div(
                (logits / t).log_softmax(-1)[keep],
                (final / t).log_softmax(-1)[keep],
                reduction="batchmean",
                log_target=True,
            )
        else:
            loss = functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        total = total + weight * loss
    return total


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("target", ["label", "distill"])
def test_loss_and_gradients_equal_the_reference(name, target, monkeypatch):
    monkeypatch.setattr(exit_loss, "LOGITS_AT_ONCE", 97 * 7)
    config = LayerSkipConfig(
        p_max=0.0, e_scale=0.7, curriculum="none", exit_target=target, distillation_temperature=1.7
    )
    labels = ids().clone()
    labels[1, 4:] = -100
    gradients = []
    for compute in ("ours", "reference"):
        model = tiny_model(name, dtype=torch.float64)
        if compute == "ours":
            recipe = apply(model, config)
            loss, _ = recipe.loss(ids(), labels=labels)
        else:
            loss = reference_loss(model, ids(), labels, config, 0)
        loss.backward()
        gradients.append((loss.item(), {key: p.grad for key, p in model.named_parameters()}))
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-5)
    for key, gradient in gradients[1][1].items():
        torch.testing.assert_close(gradients[0][1][key], gradient, rtol=2e-4, atol=2e-5, msg=key)


def test_without_early_exits_it_is_bit_equal_to_the_models_own_loss():
    model = tiny_model("llama").train()
    own = model(input_ids=ids(), labels=ids(), use_cache=False).loss
    recipe = apply(model, LayerSkipConfig(p_max=0.0, e_scale=0.0))
    loss, details = recipe.loss(ids())
    assert torch.equal(loss, own)
    assert list(details["weights"]) == [4]


def test_a_head_that_is_not_plain_linear_gives_the_same_loss():
    config = LayerSkipConfig(p_max=0.0, curriculum="none")
    plain = tiny_model("llama-biased", tie_word_embeddings=False)
    wanted, _ = apply(plain, config).loss(ids())
    hooked = tiny_model("llama-biased", tie_word_embeddings=False)
    hooked.lm_head.register_forward_hook(lambda module, args, output: output)
    given, _ = apply(hooked, config).loss(ids())
    torch.testing.assert_close(given, wanted)
    wanted.backward()
    given.backward()
    torch.testing.assert_close(hooked.lm_head.weight.grad, plain.lm_head.weight.grad)


def test_padding_is_ignored_and_all_ignored_is_refused():
    model = tiny_model("llama")
    recipe = apply(model, LayerSkipConfig(p_max=0.0, curriculum="none"))
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, 5:] = 0
    padded, _ = recipe.loss(ids(2), attention_mask=mask)
    changed = ids(2)
    changed[1, 5:] = 3
    again, _ = recipe.loss(changed, attention_mask=mask)
    torch.testing.assert_close(padded, again)
    with pytest.raises(DataError, match="-100"):
        recipe.loss(ids(2), labels=torch.full((2, 9), -100))


def test_saved_memory_does_not_grow_with_exits_times_vocabulary():
    def saved_bytes(curriculum: str, vocabulary: int) -> int:
        model = tiny_model("llama", vocab_size=vocabulary, num_hidden_layers=6).train()
        recipe = apply(model, LayerSkipConfig(p_max=0.0, curriculum=curriculum, rotation=6))
        batch = ids(8, 32) % 97
        storages: dict[int, int] = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            recipe.loss(batch)
        weight = model.get_input_embeddings().weight.untyped_storage()
        storages.pop(weight.data_ptr(), None)
        return sum(storages.values())

    one_exit_logits = 8 * 31 * 4096 * 4
    growth = saved_bytes("none", 4096) - saved_bytes("none", 128)
    # What may grow is one (vocabulary, hidden) gradient per exit, not (tokens, vocabulary) logits.
    assert growth <= 6 * (4096 - 128) * 32 * 4 + 1024
    assert growth < one_exit_logits


def test_exit_quality_equals_the_last_layers_own_loss():
    model = tiny_model("qwen2").train()
    batch = ids(4, 20)
    quality = exit_quality(model, [batch])
    assert model.training
    model.eval()
    own = model(input_ids=batch, labels=batch, use_cache=False).loss.item()
    assert quality.losses[-1] == pytest.approx(own, rel=1e-5)
    assert quality.agreement[-1] == 1.0
    assert quality.tokens == 4 * 19
    assert all(0.0 <= value < 1.0 for value in quality.agreement[:-1])
