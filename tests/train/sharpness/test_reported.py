"""Faults as they were reported, each a script that exits with 0 once it is mended, and another instance of each kind."""

from __future__ import annotations

import runpy
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from telltale.errors import DataError, TelltaleError
from telltale.signals.hessian import materialise
from telltale.train.sharpness import CriticalStep, Probe, SharpnessMonitor, measure

REPORTED = Path(__file__).parent / "reported"


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """The scripts set process-wide defaults."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    with warnings.catch_warnings():
        yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


def exit_code(name: str) -> Any:
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(REPORTED / name))
    return ended.value.code


@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    [
        path.name
        for path in sorted(REPORTED.glob("*.py"))
        if path.name not in ("06-deflation-out-of-range.py", "08-interval-few-minibatches.py")
    ],
)
def test_a_reported_fault_is_mended(name: str) -> None:
    assert not exit_code(name)


def test_deflation_is_gone() -> None:
    with pytest.raises(TypeError, match="deflation"):
        runpy.run_path(str(REPORTED / "06-deflation-out-of-range.py"))


@pytest.mark.long
def test_an_interval_over_two_minibatches_is_refused() -> None:
    with pytest.raises(DataError, match="2 minibatches; expected at least 4"):
        runpy.run_path(str(REPORTED / "08-interval-few-minibatches.py"))


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(12, 5, generator=generator), torch.randint(3, (12,), generator=generator)


def cross_entropy(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(data[0]), data[1])


def network(*middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), *(middle or (nn.Tanh(),)), nn.Linear(6, 3))


class Restless(nn.Module):
    """Everything that a forward pass may leave behind: a count, lists, running values that are no buffers, own generators."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.bag = nn.Linear(5, 6), nn.Linear(6, 3), nn.Embedding(9, 6, max_norm=0.5)
        self.calls, self.history, self.mean = 0, [torch.zeros(6)], torch.zeros(6)
        self.generator, self.numpy = torch.Generator().manual_seed(1), np.random.default_rng(1)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x) + self.bag((x[:, :2].abs() * 3).long().clamp_max(8)).sum(1)
        noise = torch.rand(h.shape, generator=self.generator) + float(self.numpy.random())
        moved = h * (1 + 0.1 * noise) - self.mean * 0.1 + 0.01 * self.calls + 0.01 * self.seen + self.history[0] * 0.01
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        self.history[0] += h.detach().mean(0)
        self.history.append(self.mean)
        self.seen += 1
        self.extra = self.calls
        return self.last(functional.dropout(moved.tanh(), 0.2))


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_training_is_bit_identical_whatever_the_forward_pass_leaves_behind(kind: str) -> None:
    def trained(watched: bool) -> list[Any]:
        model, noise = Restless(), torch.Generator().manual_seed(2)
        centres = nn.BatchNorm1d(3)

        def loss(m: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
            scores = centres(m(data[0]))
            return functional.cross_entropy(scores + 0.01 * torch.rand(scores.shape, generator=noise), data[1])

        parameters = [*model.parameters()]
        optimizer: torch.optim.Optimizer = torch.optim.SGD(parameters, lr=0.1)
        if kind == "adam":
            optimizer = torch.optim.Adam(parameters, lr=0.01)
        torch.manual_seed(3)
        monitor = None
        if watched:
            monitor = SharpnessMonitor(model, loss, [batch(99)], optimizer=optimizer, every=1, budget=1.0, sd_every=4)
        for step in range(8):
            optimizer.zero_grad()
            loss(model, batch(step)).backward()
            optimizer.step()
            if monitor is not None:
                assert monitor.step() is not None
        states = [value for entry in optimizer.state.values() for value in entry.values() if value is not None]
        return [
            *model.state_dict().values(),
            *centres.state_dict().values(),
            *states,
            *model.history,
            model.mean,
            torch.tensor([model.calls, model.extra, len(model.history)]),
            model.generator.get_state(),
            noise.get_state(),
            torch.tensor(model.numpy.random()),
            torch.get_rng_state(),
        ]

    assert all(torch.equal(one, other) for one, other in zip(trained(True), trained(False), strict=True))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(5, 12)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.mix(x[:, None]).chunk(3, -1)
        return functional.scaled_dot_product_attention(query, key, value)[:, 0]


def test_two_monitors_in_two_threads_leave_the_process_as_it_was() -> None:
    flags = lambda: (  # noqa: E731
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.autocast.__enter__,
        torch._dynamo.eval_frame._stance.stance,
    )
    before, meet, failed = flags(), threading.Barrier(2), []

    def job(seconds: tuple[float, float]) -> None:
        import time

        waits = iter(seconds)

        def loss(m: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
            time.sleep(next(waits, 0.0))
            return cross_entropy(m, data)

        try:
            model = nn.Sequential(Attention(), nn.Linear(4, 3))
            meet.wait()
            Probe(model, loss, [batch()]).operator()
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=job, args=(waits,)) for waits in ((0.05, 0.02), (0.12, 0.03))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert flags() == before


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_a_measurement_is_the_same_inside_whatever_it_is_called_from(around: Any) -> None:
    model = network(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 2, 3, padding=1), nn.Flatten(), nn.Tanh(), nn.Linear(12, 6))
    batches = [batch(seed) for seed in range(4)]
    expected = measure(model, cross_entropy, batches, rate=0.5, exact=False, steps=8)
    with around():
        found = measure(model, cross_entropy, batches, rate=0.5, exact=False, steps=8)
        monitor = SharpnessMonitor(
            model, cross_entropy, batches, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), budget=1.0
        )
        inside = monitor.check()
        product = monitor.probe.operator()
    assert (found.sd, found.interval, found.controls) == (expected.sd, expected.interval, expected.controls)
    outside = SharpnessMonitor(
        model, cross_entropy, batches, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), budget=1.0
    )
    assert inside.lambda_max == outside.check().lambda_max
    vector = torch.ones(product.size)
    with around():
        under = product.matvec(vector)
    assert torch.equal(under, outside.probe.operator().matvec(vector))


class Margin(nn.Module):
    """A loss with weights of its own, as an ArcFace head has them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
        return functional.cross_entropy(model(data[0]) * self.scale.exp(), data[1])


def test_a_loss_with_parameters_of_its_own_is_told_of() -> None:
    model, head = network(), Margin()
    optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=0.1)
    with pytest.warns(UserWarning, match="1 tensor"):
        monitor = SharpnessMonitor(model, head, [batch()], optimizer=optimizer, budget=1.0)
    assert monitor.probe.excluded == {"beside.1.scale": "outside the model"}
    assert monitor.probe.size == sum(parameter.numel() for parameter in model.parameters())
    # Not trained by this optimizer: listed, but nothing to warn of.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SharpnessMonitor(model, head, [batch()], optimizer=torch.optim.SGD(model.parameters(), lr=0.1), budget=1.0)


class Loose(nn.Module):
    """A parameter in a plain list, which PyTorch does not register."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.loose = network(), [nn.Parameter(torch.ones(3))]

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.loose[0]


def test_a_trained_tensor_that_nothing_registers_is_told_of() -> None:
    model, free = Loose(), torch.ones((), requires_grad=True)
    for extra in (model.loose[0], free):
        optimizer = torch.optim.SGD([*model.parameters(), extra], lr=0.1)
        with pytest.warns(UserWarning, match="trains 1 tensor"):
            SharpnessMonitor(model, lambda m, b: cross_entropy(m, b) * free, [batch()], optimizer=optimizer, budget=1.0)


def test_a_parameter_without_numbers_is_no_obstacle() -> None:
    model = network()
    model.register_parameter("empty", nn.Parameter(torch.empty(0)))
    found = Probe(model, lambda m, b: cross_entropy(m, b) + m.empty.sum(), [batch()])
    assert torch.equal(found.operator().gradient, Probe(network(), cross_entropy, [batch()]).operator().gradient)


@pytest.mark.parametrize(
    "options", [{"probe": {"inputs": 1}}, {"parameters": 5}, {"on_reading": print}, {"on_reading": [5]}]
)
def test_options_of_another_kind_end_in_a_sentence(options: dict[str, Any]) -> None:
    model = network()
    given = {"probe": [batch()], "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)} | options
    with pytest.raises(TelltaleError, match="expected a list"):
        SharpnessMonitor(model, cross_entropy, **given)


def test_the_forward_only_channel_refuses_a_loss_that_is_no_number() -> None:
    model = network()
    channel = CriticalStep(model, lambda m, b: functional.cross_entropy(m(b[0]), b[1], reduction="none"), [batch()])
    channel.before()
    with pytest.raises(TelltaleError, match=r"the loss is \(.*scalar"):
        channel.after()


@pytest.mark.parametrize(
    ("model", "loss"),
    [
        (nn.LazyLinear(3), cross_entropy),
        (network(), lambda m, b: m(b[0]).argmax().long()),
        (network(), lambda m, b: functional.cross_entropy(m(b[0][:, :3]), b[1])),
        (network(), lambda m, b: torch.tensor(1.0, requires_grad=True) * 2),
    ],
)
def test_what_cannot_be_measured_ends_in_a_sentence(model: nn.Module, loss: Any) -> None:
    with pytest.raises(TelltaleError):
        Probe(model, loss, [batch()]).operator()


def test_parameters_are_chosen_by_name_by_module_and_by_pattern() -> None:
    model = network()
    whole = materialise(Probe(model, cross_entropy, [batch()]).operator())
    for chosen, rows in ((["2"], slice(36, 57)), (["0.weight"], slice(0, 30)), ("0*", slice(0, 36))):
        probe = Probe(model, cross_entropy, [batch()], parameters=chosen)
        assert torch.allclose(materialise(probe.operator()), whole[rows, rows], atol=1e-6)
        assert set(probe.excluded.values()) == {"not chosen"}
    with pytest.raises(TelltaleError, match="'head', which the model does not have"):
        Probe(model, cross_entropy, [batch()], parameters=["head"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = SharpnessMonitor(model, cross_entropy, [batch()], optimizer=optimizer, parameters=["2"], budget=1.0)
    expected = float(torch.linalg.eigvalsh(whole[36:, 36:]).max())
    assert monitor.check().lambda_max == pytest.approx(expected, rel=1e-3)
    found = measure(model, cross_entropy, [batch()], rate=0.1, parameters=["2"])
    assert found.size == 21
