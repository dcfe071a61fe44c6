"""The one-process reference against plain torch loops and formulas written out by hand: the oracle needs one of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from telltale.errors import NumericalError, PlanError
from telltale.train.pipeline import reference
from telltale.train.pipeline.layers import sequential
from telltale.train.pipeline.plan import Plan
from train.pipeline.pipeline_models import OPTIMIZERS, Convolution, batch, build, loss

WHOLE = [list(range(8))]
HALVES = [[0, 1, 2], [3, 4, 5, 6, 7]]
QUARTERS = [[0, 1], [2, 3], [4, 5], [6, 7]]


def sure() -> nn.Sequential:
    """``mixed`` without dropout, so that a plain loop can repeat it."""
    net = build("mixed")
    net[4].p = 0.0
    return net


def trained(
    net: nn.Sequential, plan: Plan, *, stop: int = 12, optimizer: str = "sgd"
) -> tuple[nn.Sequential, list[float]]:
    return net, reference.train(net, plan, batch, optimizer=OPTIMIZERS[optimizer], stop=stop, loss=loss).losses


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    for (name, given), (_, wanted) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(given, wanted), name


def are_equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.long
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("policy", ["stash", "vertical", "flush", "gpipe", "none"])
def test_one_stage_is_a_plain_loop(policy: str, optimizer: str) -> None:
    plain = sure()
    stepper = OPTIMIZERS[optimizer](list(plain.named_parameters()))
    losses = []
    for t in range(12):
        inputs, targets = batch(t)
        value = loss(plain(inputs), targets)
        value.backward()
        stepper.step()
        stepper.zero_grad()
        losses.append(value.item())
    net, found = trained(sure(), Plan.manual(WHOLE, policy=policy), optimizer=optimizer)
    assert found == losses
    assert_equal(net, plain)


@pytest.mark.parametrize("policy", ["flush", "gpipe"])
@pytest.mark.parametrize("stages", [WHOLE, HALVES, QUARTERS], ids=["1", "2", "4"])
def test_flush_is_gradient_accumulation(policy: str, stages: list[list[int]]) -> None:
    """m = 4 over 11 minibatches: the last batch averages over the three that it has."""
    plain = sure()
    stepper = OPTIMIZERS["adamw"](list(plain.named_parameters()))
    for first in range(0, 11, 4):
        of_batch = range(first, min(first + 4, 11))
        for t in of_batch:
            inputs, targets = batch(t)
            loss(plain(inputs), targets).backward(torch.tensor(1 / len(of_batch)))
        stepper.step()
        stepper.zero_grad()
    net, _ = trained(sure(), Plan.manual(stages, policy=policy, microbatches=4), stop=11, optimizer="adamw")
    assert_equal(net, plain)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_double_buffering_does_not_depend_on_the_number_of_stages(optimizer: str) -> None:
    results = [
        trained(build("mixed"), Plan.manual(stages, policy="2bw", microbatches=4), stop=18, optimizer=optimizer)
        for stages in (WHOLE, HALVES, QUARTERS)
    ]
    assert results[0][1] == results[1][1] == results[2][1]
    assert_equal(results[0][0], results[1][0])
    assert_equal(results[0][0], results[2][0])


def test_double_buffering_is_the_gradient_of_the_weights_before() -> None:
    """W[b+1] = W[b] - lr * grad f(W[b-1]), with m = 1 on one stage."""
    newest, before = sure(), sure()
    stepper = torch.optim.SGD(newest.parameters(), lr=0.05)
    for t in range(8):
        inputs, targets = batch(t)
        before.zero_grad()
        loss(before(inputs), targets).backward()
        for live, old in zip(newest.parameters(), before.parameters(), strict=True):
            live.grad = old.grad.clone()
        before.load_state_dict(newest.state_dict())
        stepper.step()
    net = sure()
    make = lambda named: torch.optim.SGD(named, lr=0.05)  # noqa: E731
    reference.train(net, Plan.manual(WHOLE, policy="2bw"), batch, optimizer=make, stop=8, loss=loss)
    assert_equal(net, newest)


def scalars(*weights: float) -> nn.Sequential:
    """A chain of scalar factors in double precision."""
    net = nn.Sequential(*(nn.Linear(1, 1, bias=False) for _ in weights)).double()
    for layer, weight in zip(net, weights, strict=True):
        nn.init.constant_(layer.weight, weight)
    return net


def scalar_batch(t: int) -> tuple[Tensor, Tensor]:
    return torch.tensor([[1.0 + 0.3 * t]]).double(), torch.tensor([[0.5 - 0.1 * t]]).double()


def half_square(y: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (y - target).square().mean()


RATE = 0.03


def run_scalars(net: nn.Sequential, plan: Plan, stop: int) -> list[float]:
    make = lambda named: torch.optim.SGD(named, lr=RATE)  # noqa: E731
    reference.train(net, plan, scalar_batch, optimizer=make, stop=stop, loss=half_square)
    return [layer.weight.item() for layer in net]


def test_stashing_on_two_stages_written_out() -> None:
    """u, v in y = v u x: v[t+1] = v[t] - lr e u[t-1] x and u[t+1] = u[t] - lr e v[t] x, with e = v[t] u[t-1] x - target."""
    u, v = [0.7], [-0.4]
    for t in range(9):
        x, target = (value.item() for value in scalar_batch(t))
        seen = u[max(0, t - 1)]
        error = v[t] * seen * x - target
        u.append(u[t] - RATE * error * v[t] * x)
        v.append(v[t] - RATE * error * seen * x)
    found = run_scalars(scalars(0.7, -0.4), Plan.manual([[0], [1]]), 9)
    # One multiplication may be ordered differently: a few units in the last place of a double.
    assert found == pytest.approx([u[-1], v[-1]], rel=1e-13)


def test_the_ablation_written_out() -> None:
    """a, b on the first stage, c on the second: the backward of t meets b[t] where the forward read b[t-1]."""
    a, b, c = [0.7], [1.3], [-0.4]
    for t in range(9):
        x, target = (value.item() for value in scalar_batch(t))
        hidden = a[max(0, t - 1)] * x
        out = b[max(0, t - 1)] * hidden
        error = c[t] * out - target
        back = error * c[t]
        a.append(a[t] - RATE * back * b[t] * x)
        b.append(b[t] - RATE * back * hidden)
        c.append(c[t] - RATE * error * out)
    plan = Plan.manual([[0, 1], [2]], policy="none")
    assert run_scalars(scalars(0.7, 1.3, -0.4), plan, 9) == pytest.approx([a[-1], b[-1], c[-1]], rel=1e-13)
    stash = run_scalars(scalars(0.7, 1.3, -0.4), Plan.manual([[0, 1], [2]]), 9)
    assert stash != pytest.approx([a[-1], b[-1], c[-1]], rel=1e-6)


@pytest.mark.parametrize("policy", ["stash", "none"])
def test_replicas_average_their_round(policy: str) -> None:
    """2-1 in scalars: the first stage steps once per two minibatches with twice the rate of the second, relative to it."""
    u, v = [0.7], [-0.4]
    gradients = []
    for t in range(8):
        x, target = (value.item() for value in scalar_batch(t))
        seen = u[max(0, t // 2 - 1)]
        error = v[t] * seen * x - target
        gradients.append(error * v[t] * x)
        v.append(v[t] - RATE / 2 * error * seen * x)
        if t % 2:
            u.append(u[-1] - RATE * (gradients[-2] + gradients[-1]) / 2)
    plan = Plan.manual([[0], [1]], replicas=[2, 1], policy=policy)
    assert run_scalars(scalars(0.7, -0.4), plan, 8) == pytest.approx([u[-1], v[-1]], rel=1e-13)


@pytest.mark.parametrize("policy", ["stash", "vertical", "2bw", "none"])
def test_a_rate_of_zero_makes_all_versions_equal(policy: str) -> None:
    """Then every policy's losses and gradients are those of the initial weights."""
    net, untouched = build("mixed"), build("mixed")
    make = lambda named: torch.optim.SGD(named, lr=0.0)  # noqa: E731
    plan = Plan.manual(QUARTERS, policy=policy, microbatches=3)
    found = reference.train(net, plan, batch, optimizer=make, stop=9, loss=loss).losses
    still = Plan.manual(WHOLE, policy="flush")
    assert found == reference.train(build("mixed"), still, batch, optimizer=make, stop=9, loss=loss).losses
    assert_equal(net, untouched)


@pytest.mark.parametrize("first", [lambda: nn.LayerNorm(16), Convolution], ids=["layer norm", "convolution"])
def test_the_ablation_is_not_stashing(first: Callable[[], nn.Module]) -> None:
    def net() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), first(), nn.Linear(16, 4))

    def end(policy: str) -> nn.Sequential:
        return trained(net(), Plan.manual([[0, 1], [2]], policy=policy), stop=6)[0]

    assert not are_equal(end("none"), end("stash"))


def swapped_in_place(net: nn.Sequential, cut: int, stop: int) -> nn.Sequential:
    """The tempting implementation of stashing on two stages: ``p.data`` is pointed at the old version for the forward and
    back at the newest before the backward."""
    stages = [net[:cut], net[cut:]]
    steppers = [OPTIMIZERS["sgd"](list(stage.named_parameters())) for stage in stages]
    history = [[[p.detach().clone() for p in stage.parameters()]] for stage in stages]
    for t in range(stop):
        inputs, targets = batch(t)
        for parameter, old in zip(stages[0].parameters(), history[0][max(0, t - 1)], strict=True):
            parameter.data = old
        value = loss(stages[1](stages[0](inputs)), targets)
        for parameter, new in zip(stages[0].parameters(), history[0][t], strict=True):
            parameter.data = new.clone()
        value.backward()
        for stage, stepper, kept in zip(stages, steppers, history, strict=True):
            stepper.step()
            stepper.zero_grad()
            kept.append([p.detach().clone() for p in stage.parameters()])
    return net


@pytest.mark.parametrize(
    ("middle", "caught"),
    [
        (lambda: nn.Sequential(nn.Linear(16, 16), nn.Tanh()), False),
        (lambda: nn.LayerNorm(16), True),
        (Convolution, True),
    ],
    ids=["linear", "layer norm", "convolution"],
)
def test_what_a_comparison_can_catch(middle: Callable[[], nn.Module], caught: bool) -> None:
    """Swapped weights give wrong gradients without an error, and a model of linear layers alone would not show it: why all
    comparisons use a model with layer norm and convolution."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), middle(), nn.Linear(16, 4))
    wrong = swapped_in_place(copy.deepcopy(net), 2, 6)
    trained(net, Plan.manual([[0, 1], [2]]), stop=6)
    assert are_equal(net, wrong) != caught


def test_trace_of_forward_and_backward_versions() -> None:
    make = OPTIMIZERS["sgd"]
    found = reference.train(
        build("mixed"), Plan.manual(HALVES, policy="none"), batch, optimizer=make, stop=4, loss=loss
    ).trace
    assert found == [[(0, 0), (0, 0)], [(0, 1), (1, 1)], [(1, 2), (2, 2)], [(2, 3), (3, 3)]]


def test_runs_go_on_where_they_ended() -> None:
    whole, _ = trained(build("mixed"), Plan.manual(QUARTERS), stop=12)
    net = build("mixed")
    run = reference.Reference(sequential(net, loss), Plan.manual(QUARTERS), optimizer=OPTIMIZERS["sgd"])
    for stop in (1, 5, 12):
        run.run(batch, stop=stop)
    assert_equal(net, whole)


def test_errors() -> None:
    make, plan = OPTIMIZERS["sgd"], Plan.manual(HALVES)
    with pytest.raises(PlanError, match="the plan has 3 layers and the model 8"):
        reference.train(build("mixed"), Plan.even(3, 2), batch, optimizer=make, stop=3, loss=loss)
    with pytest.raises(PlanError, match="the model is Sequential; expected a LayeredModel"):
        reference.train(build("mixed"), plan, batch, optimizer=make, stop=3)
    with pytest.raises(NumericalError, match=r"the loss of minibatch 2 is nan \(weight version 2, policy stash\)"):
        reference.train(
            build("mixed"),
            plan,
            lambda t: (batch(t)[0] * (float("nan") if t == 2 else 1), batch(t)[1]),
            optimizer=make,
            stop=5,
            loss=loss,
        )
    run = reference.Reference(
        sequential(build("mixed"), loss), Plan.manual(HALVES, policy="flush", microbatches=4), optimizer=make
    )
    run.run(batch, stop=6)
    with pytest.raises(PlanError, match="minibatch 6 is inside a round; expected to go on at a multiple of 4"):
        run.run(batch, stop=8)
