"""Log-probabilities against the obvious softmax, and what has no distribution."""

from __future__ import annotations

import math

import pytest
import torch

from telltale.errors import ConfigError, DataError, NumericalError
from telltale.signals.confidence import entropy, margin, reduced, token_log_probabilities


def test_log_probabilities_are_gathered_log_softmax_and_never_positive() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 10 * torch.randn(3, 7, 50, generator=generator)
    tokens = torch.randint(50, (3, 7), generator=generator)
    found = token_log_probabilities(logits, tokens)
    wanted = logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert float(found.max()) <= 0.0
    certain = torch.full((1, 4), -1e4)
    certain[0, 2] = 1e4
    assert token_log_probabilities(certain, torch.tensor([2])).tolist() == [0.0]


def test_a_greedy_token_has_at_least_the_uniform_probability() -> None:
    logits = torch.randn(100, 31, generator=torch.Generator().manual_seed(1))
    assert float(token_log_probabilities(logits, logits.argmax(-1)).min()) >= -math.log(31) - 1e-6


def test_half_precision_is_summed_in_single_precision() -> None:
    logits = torch.randn(4, 5000, generator=torch.Generator().manual_seed(2)).bfloat16()
    found = token_log_probabilities(logits, torch.zeros(4, dtype=torch.long))
    assert found.dtype == torch.float32
    assert torch.allclose(found, logits.double().log_softmax(-1)[:, 0].float(), atol=1e-5)


def test_entropy_and_margin_at_their_ends() -> None:
    assert entropy(torch.zeros(6)).item() == pytest.approx(math.log(6))
    assert entropy(torch.tensor([0.0, -200.0])).item() == pytest.approx(0.0, abs=1e-6)
    assert margin(torch.tensor([[1.0, 4.0, 2.5]])).tolist() == [1.5]
    assert margin(torch.zeros(3)).item() == 0.0


@pytest.mark.parametrize(
    ("how", "wanted"), [("min", -5.0), ("mean", -2.0), ("sum", -24.0), ("q10", -2.9), ("group", -2.5)]
)
def test_reductions(how: str, wanted: float) -> None:
    values = torch.tensor([-1.0, -1, -1, -1, -5, -2, -2, -2, -3, -2, -2, -2])
    assert reduced(values, how).item() == pytest.approx(wanted, abs=1e-6)


def test_the_quantile_is_torchs_own() -> None:
    values = torch.randn(5, 33, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(
        reduced(values, "q10"), values.sort(-1).values[:, 3] * 0.8 + values.sort(-1).values[:, 4] * 0.2
    )


def test_bad_input() -> None:
    with pytest.raises(DataError, match=r"logits have shape \(2, 5\)"):
        token_log_probabilities(torch.zeros(2, 5), torch.zeros(3, dtype=torch.long))
    broken = torch.zeros(2, 3, 5)
    broken[1, 2, 0] = math.nan
    with pytest.raises(NumericalError, match=r"position \[1, 2\]"):
        token_log_probabilities(broken, torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(NumericalError):
        entropy(torch.full((4,), -math.inf))
    with pytest.raises(DataError, match="no tokens"):
        reduced(torch.zeros(0))
    with pytest.raises(ConfigError, match="reduce='median'"):
        reduced(torch.zeros(3), "median")
    with pytest.raises(DataError, match="two tokens"):
        margin(torch.zeros(3, 1))
