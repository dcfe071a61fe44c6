"""Profiles: exact bytes, every layer in its own position, a model that is left as it was found. No absolute times."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.tiny_models import tiny_model
from telltale.errors import ConfigError, DataError, NumericalError
from telltale.train.layerskip import LayerSkipConfig
from telltale.train.pipeline import profiler
from telltale.train.pipeline.layers import sequential
from telltale.train.pipeline.profile import Profile
from telltale.train.pipeline.split import split

CROSS_ENTROPY = nn.functional.cross_entropy


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.BatchNorm1d(16), nn.Linear(16, 16), nn.Dropout(0.5), nn.Linear(16, 3)
    ).train()


def batch(rows: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 8), torch.arange(rows) % 3


def adamw(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW([parameter for _, parameter in named])


def measured(model: Any, example: Any, **options: Any) -> Profile:
    return profiler.profile(model, example, **({"repeats": 2, "warm_up": 1} | options))


def test_bytes_are_exact() -> None:
    found = measured(net(), batch(), loss=CROSS_ENTROPY).layers
    assert [layer.name for layer in found] == ["0", "1", "2", "3", "4", "5"]
    assert [layer.activation_bytes for layer in found] == [4 * 4 * n for n in (16, 16, 16, 16, 16, 3)]
    assert [layer.parameter_bytes for layer in found] == [4 * n for n in (8 * 16 + 16, 0, 32, 16 * 17, 0, 17 * 3)]


def test_saved_bytes_count_every_storage_once_at_the_last_layer_that_keeps_it() -> None:
    layers = [nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh()]
    found = measured(
        nn.Sequential(*layers), (torch.randn(4, 8), torch.randn(4, 16)), loss=nn.functional.mse_loss
    ).layers
    rows = 4 * 4
    # The inputs; nothing of the ReLU, whose output the next Linear keeps too; that output; tanh's own output, and the
    # loss keeps the targets and that output again.
    assert [layer.saved_bytes for layer in found] == [rows * 8, 0, rows * 16, rows * 16 + rows * 16]


def test_activation_checkpointing_keeps_the_inputs_of_a_layer_alone() -> None:
    model = tiny_model("llama").train()
    example = {"input_ids": torch.randint(97, (2, 8))}
    plain = measured(model, example).layers
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = measured(model, example).layers
    hidden = 2 * 8 * 32 * 4
    assert [layer.activation_bytes for layer in found[:-1]] == [hidden] * 5
    assert [layer.saved_bytes for layer in found[1:5]] == [hidden] * 4
    assert all(layer.saved_bytes > 5 * hidden for layer in plain[1:5])


@pytest.mark.long
def test_the_first_layer_computes_no_input_gradient_and_the_last_one_has_the_loss() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(768, 768), nn.Linear(768, 768), nn.Linear(768, 768))
    asked: list[bool] = []
    losses = 0

    def loss(output: Tensor, target: Tensor) -> Tensor:
        nonlocal losses
        losses += 1
        return nn.functional.mse_loss(output, target)

    for layer in model:
        layer.register_forward_pre_hook(lambda module, args: asked.append(args[0].requires_grad))
    example = (torch.randn(96, 768), torch.randn(96, 768))
    found = measured(model, example, loss=loss, repeats=7, warm_up=2, threads=1)
    assert asked[0::3] == [False] * (len(asked) // 3)
    assert asked[1::3] == asked[2::3] == [True] * (len(asked) // 3)
    assert losses == 2 * 9 + 1
    assert found.residual is not None
    assert math.isfinite(found.residual)
    assert found.step_seconds is not None
    assert found.step_seconds > found.layers[1].compute


@pytest.mark.long
def test_what_the_profile_says_of_the_measurement() -> None:
    before = torch.get_num_threads()
    model = net()
    found = measured(model, batch(5), loss=CROSS_ENTROPY, threads=before + 1)
    assert (found.batch_size, found.threads, found.device) == (5, before + 1, "cpu")
    assert measured(model, batch(5), loss=CROSS_ENTROPY).threads == before
    assert found.fingerprint == sequential(model, CROSS_ENTROPY).fingerprint
    assert torch.get_num_threads() == before
    assert found.edges is None
    assert [layer.update for layer in found.layers] == [0.0] * 6


def test_the_optimizer_step_is_measured_on_copies() -> None:
    model = net()
    names: list[str] = []

    def factory(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        names.extend(name for name, _ in named)
        return adamw(named)

    found = measured(model, batch(), loss=CROSS_ENTROPY, optimizer=factory)
    assert [layer.update > 0 for layer in found.layers] == [True, False, True, True, False, True]
    assert names == [name for name, _ in model.named_parameters()]
    assert found.optimizer_bytes_per_parameter_byte == pytest.approx(2.0, rel=0.05)
    plain = measured(model, batch(), loss=CROSS_ENTROPY, optimizer=lambda named: torch.optim.SGD([p for _, p in named]))
    assert plain.optimizer_bytes_per_parameter_byte == 0.0
    with pytest.raises(ConfigError, match="int"):
        measured(model, batch(), loss=CROSS_ENTROPY, optimizer=lambda named: 3)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    model = net().train(training)
    model[4].train(not training)
    model[0].weight.grad = torch.full_like(model[0].weight, 7.0)
    gradient = model[0].weight.grad
    before = {name: value.clone() for name, value in model.state_dict().items()}
    buffers, example = dict(model.named_buffers()), batch()
    state, flags = torch.get_rng_state(), [part.training for part in model.modules()]
    measured(model, example, loss=CROSS_ENTROPY, optimizer=adamw)
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in model.modules()] == flags
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(buffers[name] is value for name, value in model.named_buffers())
    assert model[0].weight.grad is gradient
    assert torch.equal(gradient, torch.full_like(gradient, 7.0))
    assert model[3].weight.grad is None


def test_the_model_is_left_as_it_was_after_an_error_too() -> None:
    model = net().eval()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        assert model.training
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        measured(model, batch(), loss=loss, threads=1)
    assert not any(part.training for part in model.modules())
    assert torch.equal(model[2].num_batches_tracked, torch.tensor(0))


def test_a_rotation_is_averaged_over_the_rounds() -> None:
    model = tiny_model("llama", tie_word_embeddings=False).train()
    chain = split(model, layerskip=LayerSkipConfig(p_max=0.0, rotation=2))
    found = measured(chain, {"input_ids": torch.randint(97, (2, 8))}, repeats=4).layers
    hidden = 2 * 8 * 32 * 4
    # Exits (3, 4) and (2, 4) take turns: behind decoder layer 3 one state more crosses always, behind layer 2 every other time.
    assert [layer.activation_bytes for layer in found[:-1]] == [hidden, hidden, hidden, 1.5 * hidden, 2 * hidden]


@pytest.mark.long
def test_causal_language_models_and_exported_modules() -> None:
    tied = measured(tiny_model("gpt2"), {"input_ids": torch.randint(97, (2, 8))})
    assert [layer.name for layer in tied.layers][:2] == ["transformer.wte", "transformer.h.0"]
    assert tied.layers[0].parameter_bytes == 4 * 32 * (97 + 128)
    assert tied.layers[-1].parameter_bytes == 4 * (32 * 97 + 64)
    torch.manual_seed(0)
    module = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    example = (torch.randn(2, 5, 8), torch.randn(2, 5, 8))
    found = measured(module, example, loss=nn.functional.mse_loss)
    assert sum(layer.parameter_bytes for layer in found.layers) == sum(p.nbytes for p in module.parameters())
    assert not module.training


def test_frozen_and_unused_parts_take_no_backward() -> None:
    model = net()
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)
    found = measured(model, batch(), loss=CROSS_ENTROPY, optimizer=adamw)
    assert found.layers[0].update == found.layers[2].update == 0.0
    assert found.layers[3].update > 0
    for layer in found.layers[:3]:
        assert layer.saved_bytes == 0


@pytest.mark.parametrize(
    ("example", "loss", "options", "error", "said"),
    [
        ((torch.randn(0, 8), torch.zeros(0).long()), CROSS_ENTROPY, {}, DataError, "at least one sample"),
        (torch.randn(2, 8), CROSS_ENTROPY, {}, DataError, "pair"),
        (batch(), lambda y, t: y.sum(1), {}, DataError, r"shape \(4,\)"),
        (batch(), lambda y, t: y.sum() * float("nan"), {}, NumericalError, "loss of the example minibatch is nan"),
        (batch(), CROSS_ENTROPY, {"repeats": 0}, ConfigError, "repeats"),
        (batch(), CROSS_ENTROPY, {"warm_up": -1}, ConfigError, "warm_up"),
        (batch(), CROSS_ENTROPY, {"threads": 0}, ConfigError, "threads"),
        (batch(), CROSS_ENTROPY, {"device": "meta"}, ConfigError, "model is on cpu"),
        (batch(), None, {}, ConfigError, "needs a loss"),
    ],
)
def test_wrong_input_is_named(
    example: Any, loss: Callable[[Any, Any], Tensor] | None, options: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        measured(net(), example, loss=loss, **options)


def test_a_clock_that_gives_no_number_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiler.time, "perf_counter", lambda: math.nan)
    with pytest.raises(NumericalError, match="measured time"):
        measured(net(), batch(), loss=CROSS_ENTROPY)
