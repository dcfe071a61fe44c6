"""The early-exit recipe through a pipeline against the one-process controller: equal to the last bit, step by step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from models.tiny_models import tiny_model
from telltale.errors import ConfigError, UnsupportedModelError
from telltale.train import layerskip
from telltale.train.layerskip import LayerSkipConfig
from telltale.train.pipeline import reference
from telltale.train.pipeline.causal_lm import layerskip_stages
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.split import split
from train.pipeline.chain_runs import Gradients, assert_same, gradients_of, run_chain, run_cut


def batch_of(step: int, rows: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(97, (rows, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def one_process(model: Any, config: LayerSkipConfig, steps: int, micro: int = 1) -> list[tuple[Tensor, Gradients]]:
    """Loss and gradients of each minibatch by the controller, ``micro`` minibatches to a step."""
    recipe = layerskip.apply(model, config)
    found = []
    for minibatch in range(steps * micro):
        if minibatch % micro == 0:
            recipe.set_step(minibatch // micro)
        torch.manual_seed(minibatch)
        loss, _ = recipe.loss(**batch_of(minibatch))
        loss.backward()
        found.append((loss.detach(), gradients_of(model)))
    recipe.remove()
    return found


CASES = [
    LayerSkipConfig(p_max=0.0),
    LayerSkipConfig(p_max=0.6),
    LayerSkipConfig(p_max=0.6, exit_target="distill", distillation_temperature=2.0),
    LayerSkipConfig(p_max=0.5, time_schedule="exp", curriculum="gradual", total_steps=5),
    LayerSkipConfig(p_max=0.3, curriculum="none", seed=7),
    LayerSkipConfig(p_max=0.2, e_scale=0.0),
    LayerSkipConfig(p_max=0.4, rotation=2, always_last=False),
]


@pytest.mark.long
@pytest.mark.parametrize("config", CASES, ids=lambda c: f"{c.curriculum}-{c.exit_target}-{c.p_max}-{c.always_last}")
@pytest.mark.parametrize("name", ["qwen2-window", "gpt2"])
def test_equal_to_the_controller_over_the_rotation(name: str, config: LayerSkipConfig) -> None:
    model = tiny_model(name, tie_word_embeddings=False).train()
    steps = 4
    wanted = one_process(model, config, steps)
    chain = layerskip_stages(model, config)
    for minibatch, (loss, gradients) in enumerate(wanted):
        torch.manual_seed(minibatch)
        given = run_chain(chain, batch_of(minibatch), minibatch)[1]
        given.backward()
        assert torch.equal(given, loss)
        assert_same(gradients_of(model), gradients)
        torch.manual_seed(minibatch)
        given, cut_gradients, _ = run_cut(chain, batch_of(minibatch), minibatch)
        assert torch.equal(given, loss)
        assert_same(cut_gradients, gradients)


def test_states_cross_once_and_only_while_their_exit_is_active() -> None:
    model = tiny_model("llama", tie_word_embeddings=False).train()
    chain = layerskip_stages(model, LayerSkipConfig(p_max=0.0, rotation=2))
    assert [chain.pattern(t) for t in range(4)] == [(3, 4), (2, 4), (3, 4), (2, 4)]
    assert run_cut(chain, batch_of(0), 0)[2] == [1, 1, 1, 1, 2]
    assert run_cut(chain, batch_of(1), 1)[2] == [1, 1, 1, 2, 2]
    every = layerskip_stages(model, LayerSkipConfig(p_max=0.0, curriculum="none"))
    assert run_cut(every, batch_of(0), 0)[2] == [1, 1, 1, 2, 3]


@pytest.mark.parametrize("tied", [False, True])
def test_training_in_stages_is_training_with_the_controller(tied: bool) -> None:
    config = LayerSkipConfig(p_max=0.6)
    model = tiny_model("llama", tie_word_embeddings=tied).train()
    alone = copy.deepcopy(model)
    recipe = layerskip.apply(alone, config)
    optimizer = torch.optim.AdamW(alone.parameters(), lr=1e-2)
    losses = []
    for step in range(5):
        loss, _ = recipe.loss(**batch_of(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        recipe.advance()
        losses.append(loss.item())
    plan = Plan.manual([[0, 1], [2, 3], [4, 5]], replicas=[1, 1, 1], policy="flush", microbatches=1)
    result = reference.train(
        split(model, layerskip=config),
        plan,
        batch_of,
        optimizer=lambda named: torch.optim.AdamW([parameter for _, parameter in named], lr=1e-2),
        stop=5,
    )
    assert result.losses == losses
    assert all(torch.equal(given, wanted) for given, wanted in zip(model.parameters(), alone.parameters(), strict=True))


def test_layers_behind_the_deepest_active_exit_hand_values_on() -> None:
    model = tiny_model("llama", tie_word_embeddings=False).train()
    chain = layerskip_stages(model, LayerSkipConfig(p_max=0.0, rotation=2, always_last=False))
    loss, gradients, crossed = run_cut(chain, batch_of(1), 1)
    assert chain.pattern(1) == (2, 4)
    assert chain.pattern(0) == (3,)
    loss, gradients, crossed = run_cut(chain, batch_of(0), 0)
    assert torch.isfinite(loss)
    assert crossed == [1] * 5
    unused = {name for name, gradient in gradients.items() if gradient is None}
    assert unused == {name for name in gradients if "layers.3." in name}


def test_several_minibatches_to_a_step() -> None:
    config = LayerSkipConfig(p_max=0.6)
    model = tiny_model("qwen3", tie_word_embeddings=False).train()
    wanted = one_process(model, config, steps=2, micro=3)
    chain = split(model, layerskip=config, minibatches_per_step=3)
    assert [chain.pattern(t) for t in range(6)] == [(3, 4)] * 3 + [(2, 4)] * 3
    for minibatch, (loss, gradients) in enumerate(wanted):
        given, cut_gradients, _ = run_cut(chain, batch_of(minibatch), minibatch)
        assert torch.equal(given, loss)
        assert_same(cut_gradients, gradients)


def test_dropout_does_not_depend_on_the_order_of_minibatches_even_under_recomputation() -> None:
    config = LayerSkipConfig(p_max=0.6)
    model = tiny_model("llama", tie_word_embeddings=False).train()
    wanted = one_process(model, config, steps=3)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    chain = layerskip_stages(model, config)
    losses = {t: run_chain(chain, batch_of(t), t)[1] for t in (2, 0, 1)}
    for t in (1, 2, 0):
        losses[t].backward()
        assert torch.equal(losses[t], wanted[t][0])
        assert_same(gradients_of(model), wanted[t][1])


def test_a_layer_that_every_row_skips_has_no_gradient() -> None:
    model = tiny_model("llama", tie_word_embeddings=False).train()
    chain = layerskip_stages(model, LayerSkipConfig(p_max=0.999))
    gradients = run_cut(chain, batch_of(0), 0)[1]
    skipped = {name for name, gradient in gradients.items() if gradient is None}
    assert skipped == {name for name in gradients if "layers.3." in name}


def test_no_layer_dropout_in_eval_mode() -> None:
    config = LayerSkipConfig(p_max=0.9)
    model = tiny_model("llama", tie_word_embeddings=False)
    wanted = one_process(model, config, steps=1)[0]
    loss, gradients, _ = run_cut(layerskip_stages(model, config), batch_of(0), 0)
    assert torch.equal(loss, wanted[0])
    assert_same(gradients, wanted[1])


def test_what_cannot_be_trained_this_way_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match="total_steps"):
        layerskip_stages(model, LayerSkipConfig(time_schedule="exp"))
    with pytest.raises(ConfigError, match="minibatches_per_step"):
        layerskip_stages(model, LayerSkipConfig(), minibatches_per_step=0)
    recipe = layerskip.apply(model, LayerSkipConfig())
    with pytest.raises(ConfigError, match="wrapped already"):
        layerskip_stages(model, LayerSkipConfig())
    recipe.remove()
    with pytest.raises(UnsupportedModelError, match="no config"):
        layerskip_stages(torch.nn.Linear(2, 2), LayerSkipConfig())
