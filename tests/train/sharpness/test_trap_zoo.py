"""Models whose double backward goes wrong, or might: every one is measured right or refused, for two products and two gradients.

Right is judged by values of the loss alone: u . H w by four of them in float64, on a copy of the model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from telltale.errors import TelltaleError
from telltale.train.sharpness import Probe

RIGHT, REFUSED = "right", "refused"
Batch = tuple[Tensor, Tensor]


class Net(nn.Module):
    """5 -> 5 -> 3 with ``between`` in the middle: a function of the net and what the first layer gives."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor] = lambda net, h: h.tanh(), **parts: nn.Module) -> None:
        super().__init__()
        self.first, self.last, self.between = nn.Linear(5, 5), nn.Linear(5, 3), between
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.between(self, self.first(inputs)))


class Tokens(nn.Module):
    """An embedding of 7 tokens, two a row, and a readout."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.table, self.last = nn.Embedding(7, 4, **options), nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.last(self.table(ids).flatten(1).tanh())


def inputs() -> Batch:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 5, generator=generator), torch.arange(6) % 3


def token_ids(ids: list[list[int]]) -> Batch:
    return torch.tensor(ids), torch.arange(len(ids)) % 3


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def function(forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
    """A custom autograd function."""
    made = type(
        "Made", (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    )
    return made.apply


def saving(save: Callable[[Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    def forward(context: Any, x: Tensor) -> Tensor:
        context.save_for_backward(save(x))
        return x**3

    return forward


def without_graph(context: Any, upstream: Tensor) -> Tensor:
    with torch.no_grad():
        return upstream * 3 * context.saved_tensors[0] ** 2


def replayed(context: Any, upstream: Tensor) -> Tensor:
    x = context.saved_tensors[0].detach().requires_grad_()
    with torch.enable_grad():
        y = x**3
    return torch.autograd.grad(y, x, upstream)[0]


def by_numpy(context: Any, upstream: Tensor) -> Tensor:
    return torch.from_numpy(upstream.detach().numpy() * 3 * context.saved_tensors[0].detach().numpy() ** 2)


keep_input = saving(lambda x: x)
saved_derivative = function(saving(lambda x: 3 * x * x), lambda c, g: g * c.saved_tensors[0])
hidden = function(keep_input, without_graph)
replay = function(keep_input, replayed)
numpy_backward = function(keep_input, by_numpy)
once = function(
    keep_input,
    torch.autograd.function.once_differentiable(lambda c, g: g * 3 * c.saved_tensors[0] ** 2),
)
honest = function(keep_input, lambda c, g: g * 3 * c.saved_tensors[0] ** 2)
doubled = function(lambda c, x: x.clone(), lambda c, g: 2 * g)
reversed_gradient = function(lambda c, x: x.clone(), lambda c, g: -g)
clipped_forward = function(lambda c, x: x.clamp(-0.2, 0.2), lambda c, g: g)
shrunk_upstream = function(lambda c, x: x.clone(), lambda c, g: g.clamp(-0.01, 0.01))
slightly_off = function(lambda c, x: x.clone(), lambda c, g: 1.02 * g)


def clamping_module_hook() -> nn.Module:
    net = Net(lambda net, h: net.act(h), act=nn.Tanh())
    net.act.register_full_backward_hook(lambda module, into, out: (into[0].clamp(-0.01, 0.01),))
    return net


def clamping_tensor_hook(net: Any, h: Tensor) -> Tensor:
    if h.requires_grad:
        h.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
    return h.tanh()


def hooked_parameters() -> nn.Module:
    net = Net()
    for parameter in net.parameters():
        parameter.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
    return net


def scaling_forward_hook() -> nn.Module:
    net = Net()
    net.first.register_forward_hook(lambda module, given, out: out * 1.5)
    return net


def in_place(net: Any, h: Tensor) -> Tensor:
    h = functional.gelu(h)
    h += 0.3
    return h.mul_(1.7)


def under_autocast(net: Any, h: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return (h @ net.last.weight.T @ net.last.weight).tanh()


class Counted(Net):
    """Its forward counts itself, and the count matters."""

    def __init__(self) -> None:
        super().__init__(lambda net, h: net.counted(h))
        self.calls, self.seen = 0, [torch.zeros(())]

    def counted(self, h: Tensor) -> Tensor:
        self.calls += 1
        self.seen[0] += 1
        return h.tanh() * (1 + 0.1 * self.calls + 0.1 * self.seen[0])


class Noisy(Net):
    """Noise from a generator of its own."""

    def __init__(self) -> None:
        super().__init__(lambda net, h: (h + torch.randn(h.shape, generator=net.generator)).tanh())
        self.generator = torch.Generator().manual_seed(0)

    def __deepcopy__(self, memo: Any) -> Noisy:
        other = Noisy()
        other.load_state_dict(self.state_dict())
        return other.to(self.last.weight.dtype)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.last = nn.LSTM(5, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.rnn(x[:, None] * torch.arange(1.0, 4.0)[:, None])[0][:, -1])


class Attending(nn.Module):
    """Fused attention over five copies of the row, by the function or by the module."""

    def __init__(self, module: bool) -> None:
        super().__init__()
        self.mix, self.last = nn.Linear(5, 12), nn.Linear(4, 3)
        self.heads = nn.MultiheadAttention(4, 2, batch_first=True) if module else None

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.mix(x[:, None] * torch.arange(1.0, 6.0)[:, None]).chunk(3, -1)
        if self.heads is not None:
            return self.last(self.heads(query, key, value, need_weights=False)[0][:, -1])
        return self.last(functional.scaled_dot_product_attention(query, key, value)[:, -1])


def penalised(model: nn.Module, batch: Batch) -> Tensor:
    """A gradient penalty: third derivatives are needed."""
    x = batch[0].clone().requires_grad_()
    loss = functional.cross_entropy(model(x), batch[1])
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    return loss + slope.square().sum()


def semi_gradient(model: nn.Module, batch: Batch) -> Tensor:
    scores = model(batch[0])
    return (scores - 0.9 * scores.detach().roll(1, 0) - 1.0).square().mean()


RANDOM = np.random.default_rng(0)


def unseeded(model: nn.Module, batch: Batch) -> Tensor:
    return cross_entropy(model, batch) * float(1 + RANDOM.random())


def norms(net: Any, h: Tensor) -> Tensor:
    return net.norm(h).tanh()


def zero_weights() -> nn.Module:
    net = Net()
    nn.init.zeros_(net.last.weight)
    return net


def row_bias(net: Any, h: Tensor) -> Tensor:
    return functional.linear(h, net.last.weight, net.last.bias[None]).tanh() @ net.last.weight


ONCE_EACH = [[0, 1], [2, 3], [4, 5]]
AGAIN = [[0, 1], [0, 1], [0, 3], [0, 5]]
Make = Callable[[], nn.Module]
TRAPS: dict[str, tuple[Make, Any, Batch, str]] = {
    "weight norm": (
        lambda: Net(norm=parametrizations.weight_norm(nn.Linear(5, 5)), between=norms),
        None,
        inputs(),
        RIGHT,
    ),
    "old weight norm": (lambda: Net(norm=nn.utils.weight_norm(nn.Linear(5, 5)), between=norms), None, inputs(), RIGHT),
    "weight norm along 1": (
        lambda: Net(norm=parametrizations.weight_norm(nn.Linear(5, 5), dim=1), between=norms),
        None,
        inputs(),
        RIGHT,
    ),
    "spectral norm, power iteration": (
        lambda: Net(norm=parametrizations.spectral_norm(nn.Linear(5, 5)), between=norms),
        None,
        inputs(),
        REFUSED,
    ),
    "spectral norm, settled": (
        lambda: Net(norm=parametrizations.spectral_norm(nn.Linear(5, 5)), between=norms).eval(),
        None,
        inputs(),
        RIGHT,
    ),
    "orthogonal": (
        lambda: Net(norm=parametrizations.orthogonal(nn.Linear(5, 5)), between=norms),
        None,
        inputs(),
        RIGHT,
    ),
    "module hook that clamps": (clamping_module_hook, None, inputs(), REFUSED),
    "tensor hook that clamps": (lambda: Net(clamping_tensor_hook), None, inputs(), REFUSED),
    "parameter hooks that clamp": (hooked_parameters, None, inputs(), RIGHT),
    "forward hook that scales": (scaling_forward_hook, None, inputs(), RIGHT),
    "saved derivative": (lambda: Net(lambda net, h: saved_derivative(h)), None, inputs(), REFUSED),
    "backward without a graph": (lambda: Net(lambda net, h: hidden(h)), None, inputs(), REFUSED),
    "replayed backward": (lambda: Net(lambda net, h: replay(h)), None, inputs(), REFUSED),
    "backward in NumPy": (lambda: Net(lambda net, h: numpy_backward(h)), None, inputs(), REFUSED),
    "once differentiable": (lambda: Net(lambda net, h: once(h)), None, inputs(), REFUSED),
    "honest custom function": (lambda: Net(lambda net, h: honest(h)), None, inputs(), RIGHT),
    "loss with a doubled gradient": (Net, lambda m, b: doubled(cross_entropy(m, b)), inputs(), REFUSED),
    "gradient reversal": (lambda: Net(lambda net, h: reversed_gradient(h).tanh()), None, inputs(), REFUSED),
    "gradient 2% too large": (lambda: Net(lambda net, h: slightly_off(h).tanh()), None, inputs(), REFUSED),
    "clamp with the identity's gradient": (lambda: Net(lambda net, h: clipped_forward(h)), None, inputs(), REFUSED),
    "clamped upstream": (lambda: Net(lambda net, h: shrunk_upstream(h).tanh()), None, inputs(), REFUSED),
    "straight-through rounding": (
        lambda: Net(lambda net, h: h + ((4 * h).round() / 4 - h).detach()),
        None,
        inputs(),
        REFUSED,
    ),
    "straight-through signs": (
        lambda: Net(lambda net, h: h.tanh() + (h.sign() - h.tanh()).detach()),
        None,
        inputs(),
        REFUSED,
    ),
    "fake quantisation": (
        lambda: Net(lambda net, h: torch.fake_quantize_per_tensor_affine(h, 0.1, 0, -128, 127)),
        None,
        inputs(),
        REFUSED,
    ),
    "data of a weight": (lambda: Net(lambda net, h: (h @ net.first.weight.data).tanh()), None, inputs(), REFUSED),
    "a part without gradient": (
        lambda: Net(lambda net, h: h.tanh() * torch.no_grad()(lambda: h.sigmoid())()),
        None,
        inputs(),
        REFUSED,
    ),
    "semi-gradient": (Net, semi_gradient, inputs(), REFUSED),
    "gradient scaled by frequency": (lambda: Tokens(scale_grad_by_freq=True), None, token_ids(AGAIN), REFUSED),
    "frequencies of one": (lambda: Tokens(scale_grad_by_freq=True), None, token_ids(ONCE_EACH), RIGHT),
    "max_norm, outside": (lambda: Tokens(max_norm=1.0), None, token_ids(ONCE_EACH), RIGHT),
    "max_norm, inside": (lambda: Tokens(max_norm=50.0), None, token_ids(AGAIN), RIGHT),
    "sparse embedding": (lambda: Tokens(sparse=True), None, token_ids(AGAIN), RIGHT),
    "sparse by the function": (
        lambda: Net(
            lambda net, h: h.tanh() + functional.embedding((h[:, 0] > 0).long(), net.first.weight, sparse=True)
        ),
        None,
        inputs(),
        RIGHT,
    ),
    "changed in place after GELU": (lambda: Net(in_place), None, inputs(), RIGHT),
    "in-place activation": (lambda: Net(lambda net, h: nn.SiLU(inplace=True)(h)), None, inputs(), RIGHT),
    "bias as a row": (lambda: Net(row_bias), None, inputs(), RIGHT),
    "fused attention": (lambda: Attending(False), None, inputs(), RIGHT),
    "multi-head attention": (lambda: Attending(True), None, inputs(), RIGHT),
    "checkpointing": (
        lambda: Net(lambda net, h: checkpoint(functional.gelu, h, use_reentrant=False)),
        None,
        inputs(),
        RIGHT,
    ),
    "reentrant checkpointing": (
        lambda: Net(lambda net, h: checkpoint(functional.gelu, h, use_reentrant=True)),
        None,
        inputs(),
        REFUSED,
    ),
    "autocast inside": (lambda: Net(under_autocast), None, inputs(), RIGHT),
    "there and back in half precision": (
        lambda: Net(lambda net, h: h.bfloat16().tanh().to(torch.float16).float()),
        None,
        inputs(),
        RIGHT,
    ),
    "a generator of its own": (Noisy, None, inputs(), RIGHT),
    "a forward pass that counts": (Counted, None, inputs(), RIGHT),
    "noise that nobody seeds": (Net, unseeded, inputs(), REFUSED),
    "LSTM": (Recurrent, None, inputs(), RIGHT),
    "batch norm in training": (lambda: Net(norm=nn.BatchNorm1d(5), between=norms), None, inputs(), RIGHT),
    "gradient penalty over GELU": (lambda: Net(lambda net, h: functional.gelu(h)), penalised, inputs(), RIGHT),
    "on a kink": (zero_weights, lambda m, b: m(b[0]).square().mean() + m.last.weight.abs().sum(), inputs(), REFUSED),
}


def numeric(
    make: Make, state: dict[str, Tensor], loss: Any, batch: Batch, u: Tensor, w: Tensor, step: float = 1e-4
) -> float:
    """u . H w by four values of the loss, in float64."""
    data = (batch[0].double() if batch[0].is_floating_point() else batch[0], batch[1])

    def at(shift: Tensor) -> float:
        moved, offset = make(), 0
        moved.load_state_dict(state)
        moved.double()
        with torch.no_grad():
            for parameter in moved.parameters():
                parameter.add_(shift[offset : offset + parameter.numel()].view_as(parameter))
                offset += parameter.numel()
        return float(loss(moved, data).detach())

    up, down = at(step * (u + w)) + at(-step * (u + w)), at(step * (u - w)) + at(step * (w - u))
    return (up - down) / (4 * step**2)


JUDGED: dict[str, Make] = {
    "max_norm, outside": lambda: Tokens(),
    "there and back in half precision": Net,
}
"""What stands for a trap whose own forward pass rounds, or moves its weights first."""


@pytest.mark.parametrize("name", TRAPS)
def test_every_trap_is_right_or_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, loss, batch, expected = TRAPS[name]
    loss = loss or cross_entropy
    torch.manual_seed(1)
    model = make()
    before = copy.deepcopy(model.state_dict())
    calls: list[bool] = []
    backward = torch.autograd._engine_run_backward
    with monkeypatch.context() as patch:
        probe = operator = refusal = None
        try:
            probe = Probe(model, loss, [batch])
            patch.setattr(
                torch.autograd, "_engine_run_backward", lambda *a, **k: (calls.append(True), backward(*a, **k))[1]
            )
            operator = probe.operator()
        except TelltaleError as error:
            refusal = error
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert (RIGHT if refusal is None else REFUSED) == expected, refusal
    if operator is None:
        return
    assert len(calls) <= 5 or name == "gradient penalty over GELU", (
        "one gradient to open it, two products, two gradients"
    )
    state = model.state_dict()
    if name == "max_norm, outside":
        # What training's own next forward pass makes of the weights; the projection is no part of the loss.
        model(batch[0])
        state = model.state_dict()
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        u, w = torch.randn(2, operator.size, generator=generator, dtype=torch.float64)
        true = numeric(JUDGED.get(name, make), state, loss, batch, u, w)
        assert float(u @ operator.matvec(w.float()).double()) == pytest.approx(true, rel=2e-3, abs=2e-4)


def test_the_zoo_is_as_large_as_it_is_said_to_be() -> None:
    assert len(TRAPS) >= 30
    assert sum(trap[3] == REFUSED for trap in TRAPS.values()) >= 15


def test_a_padding_row_has_no_part_in_the_hessian() -> None:
    """Its gradient is zero by design though the loss depends on it, as in most language models."""
    torch.manual_seed(0)
    model = Tokens(padding_idx=0)
    nn.init.normal_(model.table.weight)
    operator = Probe(model, cross_entropy, [token_ids(AGAIN)]).operator()
    assert operator.receipt.worst < 1e-5
    assert not operator.matvec(torch.eye(operator.size)[0]).any()


class Shared(nn.Module):
    """The readout has the table's weight; the padding token is the end of text, too, and comes as input and target."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mid = nn.Embedding(7, 4, padding_idx=2), nn.Linear(4, 4)
        nn.init.normal_(self.table.weight)

    def forward(self, ids: Tensor) -> Tensor:
        return self.mid(self.table(ids).mean(1)).tanh() @ self.table.weight.T


def test_a_padding_row_that_the_readout_shares_is_no_hidden_curvature() -> None:
    torch.manual_seed(0)
    model, batch = Shared(), (torch.tensor([[2, 1], [1, 2], [2, 3], [4, 5]]), torch.tensor([2, 2, 3, 0]))
    operator = Probe(model, cross_entropy, [batch]).operator()
    assert operator.receipt.worst < 1e-5
    u, w = torch.randn(2, operator.size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    u[8:12] = w[8:12] = 0
    true = numeric(Shared, model.state_dict(), cross_entropy, batch, u, w)
    assert float(u @ operator.matvec(w.float()).double()) == pytest.approx(true, rel=2e-3)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Net(lambda net, h: saved_derivative(h)), "MadeBackward"),
        (clamping_module_hook, r"the backward hook of act \(Tanh\)"),
        (lambda: Net(clamping_tensor_hook), r"\(parameter (first|last)"),
    ],
)
def test_a_refusal_says_what_is_wrong_and_where(make: Make, words: str) -> None:
    torch.manual_seed(1)
    with pytest.raises(TelltaleError, match=rf"residual .* tolerance .*{words}"):
        Probe(make(), cross_entropy, [inputs()]).operator()
