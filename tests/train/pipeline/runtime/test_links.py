"""What crosses a cut arrives in the memory layout that it had."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from telltale.train.pipeline.runtime.links import TensorSpec, _header, _read_header

X = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).view(2, 3, 4, 5)


@pytest.mark.parametrize(
    "value",
    [
        X,
        X.to(memory_format=torch.channels_last),
        X.transpose(1, 2),
        X[:, 1:, ::2],
        X[1:, :1].expand(3, 1, 4, 5),
        X[:, :, :1, :1].to(memory_format=torch.channels_last),
        X[:0],
        torch.tensor(3),
        X.to(torch.complex64).conj(),
    ],
    ids=["plain", "channels last", "transposed", "slice", "expanded", "one pixel", "empty", "number", "conjugate"],
)
def test_a_tensor_arrives_as_its_copy_would_lie(value: Tensor) -> None:
    spec = TensorSpec.of(value)
    assert _read_header(_header([spec], torch.device("cpu"))) == (spec,)
    flat = spec.flat(value)
    assert flat.is_contiguous()
    arrived = spec.shaped(flat.clone())
    assert torch.equal(arrived, value)
    assert arrived.stride() == value.detach().clone().stride()


def test_another_layout_is_brought_into_the_one_that_is_expected() -> None:
    spec, other = TensorSpec.of(X), X.to(memory_format=torch.channels_last)
    assert torch.equal(spec.shaped(spec.flat(other)), X)
    assert TensorSpec.of(other) == spec
