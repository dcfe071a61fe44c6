"""The monitor on models that a second derivative is hard for, and on what changes while it watches."""

from __future__ import annotations

import gc
import math
import time
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from models.tiny_models import tiny_model
from telltale.errors import ConfigError, DataError, UnsupportedModelError
from telltale.signals.hessian import HessianOperator
from telltale.signals.spectrum import dense
from telltale.train.sharpness import Probe, SharpnessMonitor
from telltale.train.sharpness.monitor import DIVERGING, STABLE

NO_LIMIT: dict[str, Any] = {"every": 1, "budget": 1.0}


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def batch(seed: int = 0, rows: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 4, generator=generator), torch.randint(3, (rows,), generator=generator)


def network(*middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), *middle, nn.Linear(6, 3))


def sgd(model: nn.Module, rate: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=rate)


def watch(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, **options: Any) -> SharpnessMonitor:
    return SharpnessMonitor(
        model, loss_of, [batch()], optimizer=sgd(model) if optimizer is None else optimizer, **(NO_LIMIT | options)
    )


def exact(model: nn.Module, mode: str = "eval") -> float:
    """Largest eigenvalue of the dense Hessian of the probe's minibatch."""
    return float(dense(Probe(model, loss_of, [batch()], mode=mode).operator()).nodes[0].max())


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    optimizer.zero_grad()
    loss_of(model, batch(seed)).backward()
    optimizer.step()


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_dropout_and_batch_norm_are_read_in_the_mode_that_was_asked_for(mode: str) -> None:
    model = network(nn.BatchNorm1d(6), nn.Dropout(0.5))
    running = model[2].running_mean.clone()
    # Train mode draws its masks from the probe's seed, so the dense Hessian sees the same ones.
    reading = watch(model, mode=mode, steps=12).check()
    assert reading.lambda_max == pytest.approx(exact(model, mode), rel=1e-3)
    assert torch.equal(model[2].running_mean, running)
    assert model.training


def test_the_two_modes_differ() -> None:
    model = network(nn.BatchNorm1d(6), nn.Dropout(0.5))
    assert abs(exact(model, "train") / exact(model, "eval") - 1) > 0.05


def test_a_compiled_model_is_read_eagerly_and_not_compiled_again() -> None:
    compilations = []

    def backend(graph: Any, inputs: Any) -> Any:
        compilations.append(1)
        return graph.forward

    plain, model = network(), network()
    compiled = torch.compile(model, backend=backend)
    optimizer = sgd(model)
    step(compiled, optimizer)
    step(plain, sgd(plain))
    monitor = watch(compiled, optimizer, steps=12)
    before = len(compilations)
    assert before >= 1
    first = monitor.step()
    step(compiled, optimizer)
    assert first is not None
    assert first.lambda_max == pytest.approx(exact(plain), rel=1e-3)
    assert len(compilations) == before, "a look must not throw away what was compiled"


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.head = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        query, key, value = self.mix(inputs[:, None, :] + torch.arange(5.0)[:, None]).chunk(3, dim=-1)
        mixed = functional.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])[:, 0]
        return self.head(mixed[:, -1])


def test_fused_attention_is_read_on_the_math_kernel_and_is_back_afterwards() -> None:
    model = Attention()
    enabled = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
    assert watch(model, steps=12).check().lambda_max == pytest.approx(exact(model), rel=1e-3)
    assert (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()) == enabled


def test_a_causal_language_model_under_adamw() -> None:
    model = tiny_model("llama")
    ids = torch.randint(0, model.config.vocab_size, (2, 7), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    monitor = SharpnessMonitor(model, None, [ids], optimizer=optimizer, **NO_LIMIT)
    assert monitor.step() is None
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    reading = monitor.step()
    assert reading is not None
    assert (reading.ratio > 0, reading.ratio_error < reading.ratio, reading.no_curvature) == (True, True, False)


class Reentrant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return checkpoint(self.layer, inputs.detach().requires_grad_(), use_reentrant=True)


def test_reentrant_checkpointing_is_refused_before_training_starts() -> None:
    with pytest.raises(UnsupportedModelError, match="reentrant"):
        watch(Reentrant())


def connectionist_loss(model: nn.Module, given: tuple[Tensor, Tensor]) -> Tensor:
    """PyTorch has a first derivative of this one, and no second."""
    scores = model(given[0])[:, None, :].log_softmax(-1)
    return functional.ctc_loss(scores, torch.tensor([[1, 2]]), torch.tensor([8]), torch.tensor([2]))


def test_a_model_without_a_second_derivative_is_refused_before_training_starts() -> None:
    model = network()
    with pytest.raises(UnsupportedModelError, match="no second derivative"):
        SharpnessMonitor(model, connectionist_loss, [batch()], optimizer=sgd(model), **NO_LIMIT)


def test_unused_parameters_are_left_out_and_the_rest_is_read_as_ever() -> None:
    model = network()
    model.spare = nn.Linear(5, 5)

    def loss(module: Any, given: tuple[Tensor, Tensor]) -> Tensor:
        return functional.cross_entropy(module[2](module[1](module[0](given[0]))), given[1])

    monitor = SharpnessMonitor(model, loss, [batch()], optimizer=sgd(model), steps=12, **NO_LIMIT)
    assert monitor.probe.excluded == {"spare.weight": "unused", "spare.bias": "unused"}
    assert monitor.check().lambda_max == pytest.approx(exact(network()), rel=1e-3)


def test_parameters_frozen_and_unfrozen_on_the_way_are_followed() -> None:
    model = network()
    monitor = watch(model, steps=12)
    whole = monitor.check().lambda_max
    model[0].weight.requires_grad_(False)
    frozen = monitor.check().lambda_max
    assert monitor.probe.excluded == {"0.weight": "frozen"}
    assert frozen == pytest.approx(exact(model), rel=1e-3)
    assert abs(frozen / whole - 1) > 0.01
    model[0].weight.requires_grad_(True)
    assert monitor.check().lambda_max == pytest.approx(whole, rel=1e-3)


def test_an_optimizer_of_other_parameters_is_refused_before_training_starts() -> None:
    model = network()
    with pytest.raises(DataError, match="does not hold 2 of the 4 parameters"):
        watch(model, torch.optim.SGD(model[0].parameters(), lr=0.1))
    assert watch(model, torch.optim.SGD(model[0].parameters(), lr=0.1), jacobian="gd").check().ratio > 0
    with pytest.raises(ConfigError, match="optimizer is int"):
        watch(model, lambda: 5)


def test_groups_that_differ_in_momentum_are_refused_before_training_starts() -> None:
    model = network()
    groups = [
        {"params": model[0].parameters(), "momentum": 0.9},
        {"params": model[2].parameters(), "momentum": 0.0},
    ]
    with pytest.raises(ConfigError, match="differ in momentum"):
        watch(model, torch.optim.SGD(groups, lr=0.1))


def test_weights_that_are_not_finite_at_the_start_read_as_diverging() -> None:
    model = network()
    with torch.no_grad():
        model[0].weight.fill_(math.nan)
    monitor = watch(model)
    reading = monitor.step()
    assert reading is not None
    assert (reading.state, reading.lambda_max) == (DIVERGING, None)


def test_an_optimizer_state_that_is_not_finite_does_not_stop_training() -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    monitor = watch(model, optimizer)
    step(model, optimizer)
    healthy = monitor.step()
    assert healthy is not None
    assert healthy.state == STABLE
    for state in optimizer.state.values():
        state["exp_avg_sq"].fill_(math.nan)
    broken = monitor.step()
    assert broken is not None
    assert broken.state == DIVERGING


def test_a_loss_that_stays_infinite_is_told_once_and_then_at_the_usual_pace() -> None:
    model = network()
    monitor = watch(model, every=10)
    told = [monitor.step(math.nan) for _ in range(25)]
    assert [index for index, reading in enumerate(told, start=1) if reading is not None] == [1, 10, 20]
    assert {reading.state for reading in monitor.readings} == {DIVERGING}
    while (healthy := monitor.step(1.0)) is None:
        pass
    assert healthy.state == STABLE


def test_a_probe_minibatch_that_is_not_finite_costs_the_dimension_and_not_the_run() -> None:
    model = network()
    monitor = SharpnessMonitor(
        model, loss_of, [batch(0), batch(1)], optimizer=sgd(model), sd_every=1, sd_runs=2, sd_steps=3, **NO_LIMIT
    )
    monitor.probe.batches[1][0].fill_(math.inf)
    reading = monitor.step()
    assert reading is not None
    assert (reading.sd, reading.state, monitor.dimensions) == (None, DIVERGING, [])


def test_nothing_of_a_look_is_held_when_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    monitor = watch(model)
    held: list[weakref.ref[HessianOperator]] = []
    built = monitor.probe.operator

    def operator(index: int = 0, *, check: bool = True) -> HessianOperator:
        found = built(index, check=check)
        held.append(weakref.ref(found))
        return found

    monkeypatch.setattr(monitor.probe, "operator", operator)
    gc.disable()
    try:
        monitor.check()
        assert [reference() for reference in held] == [None], "the graph lives until the next look"
    finally:
        gc.enable()


def test_what_is_done_with_a_reading_is_charged_to_the_monitor() -> None:
    model = network()

    def slow(reading: Any) -> None:
        until = time.process_time() + 0.05
        while time.process_time() < until:
            pass

    monitor = watch(model, on_reading=[slow])
    before = monitor.cost.seconds
    monitor.check()
    assert monitor.cost.seconds - before >= 0.05
    assert 0 < monitor.cost.share <= 1


@pytest.mark.long
def test_the_budget_is_kept_on_a_real_run_and_the_dimension_has_its_turn() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3))
    optimizer = sgd(model)
    data = batch(rows=512)
    monitor = SharpnessMonitor(
        model, loss_of, [batch(1)], optimizer=optimizer, budget=0.3, sd_every="auto", sd_runs=1, sd_steps=10
    )
    # What a look costs depends on the machine, and so does the step at which the dimension can be afforded.
    for step_number in range(12_000):
        optimizer.zero_grad()
        loss_of(model, data).backward()
        optimizer.step()
        monitor.step()
        if step_number >= 600 and monitor.dimensions:
            break
    assert len(monitor.readings) >= 5
    assert monitor.dimensions
    # One look may cost more than the last one did; that is made good by waiting, not foreseen.
    assert monitor.pace.spent / monitor.pace.trained <= 0.3 * 1.15
    assert monitor.readings[-1].cost_seconds <= monitor.cost.seconds


def test_an_unknown_optimizer_is_warned_about_once_even_where_the_dimension_is_measured() -> None:
    model = network()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        monitor = watch(model, optimizer, sd_every=1, sd_runs=1, sd_steps=3)
        for index in range(3):
            step(model, optimizer, index)
            monitor.step()
    assert [str(entry.message)[:31] for entry in seen] == ["the edge of Adagrad is not know"]
    assert monitor.jacobian == "gd"
    assert [reading.sd is not None for reading in monitor.readings] == [True] * 3
