import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from models.tiny_models import tiny_model
from telltale.errors import ConfigError, DataError, NumericalError, UnsupportedModelError
from telltale.signals.hessian import materialise
from telltale.train.sharpness.probe import Probe, language_model_loss


def cross_entropy(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1])


def batches(count=2, width=4, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(8, width, generator=generator), torch.randint(0, classes, (8,), generator=generator))
        for _ in range(count)
    ]


def network(*middle, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), *middle, nn.Linear(6, 3))


def state(model):
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "objects": [id(tensor) for tensor in (*model.parameters(), *model.buffers())],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "flags": [module.training for module in model.modules()],
        "random": (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()),
    }


def assert_unchanged(model, before):
    after = state(model)
    assert after["objects"] == before["objects"]
    assert after["flags"] == before["flags"]
    assert all(torch.equal(after["tensors"][name], tensor) for name, tensor in before["tensors"].items())
    for one, other in zip(after["grads"], before["grads"], strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)
    assert torch.equal(after["random"][0], before["random"][0])
    assert after["random"][1:] == before["random"][1:]


def noisy_loss(model, batch):
    """Draws from every random source that a user's loss might."""
    return cross_entropy(model, batch) * (1 + torch.rand(()) + random.random() + np.random.rand())


def test_it_leaves_no_trace_even_with_dropout_batch_norm_and_a_loss_that_draws():
    model = network(nn.BatchNorm1d(6), nn.Dropout(0.5))
    model[2].eval()
    cross_entropy(model, batches()[0]).backward()
    before = state(model)
    probe = Probe(model, noisy_loss, batches(), seed=7)
    vector = torch.randn(probe.size, generator=torch.Generator().manual_seed(0))
    operator = probe.operator(0)
    first = operator.matvec(vector)
    assert_unchanged(model, before)
    assert torch.equal(first, operator.matvec(vector))
    assert torch.equal(first, probe.operator(0).matvec(vector)), "the masks come from the probe's seed"
    assert not torch.allclose(first, Probe(model, noisy_loss, batches(), seed=8).operator(0).matvec(vector))


def test_batch_norm_in_training_mode_uses_the_minibatch_and_its_running_statistics_stay():
    model = network(nn.BatchNorm1d(6))
    before = state(model)
    training = Probe(model, cross_entropy, batches(), mode="train")
    evaluating = Probe(model, cross_entropy, batches(), mode="eval")
    vector = torch.ones(training.size)
    assert not torch.allclose(training.operator(0).matvec(vector), evaluating.operator(0).matvec(vector))
    assert_unchanged(model, before)
    with pytest.raises(ConfigError, match="mode"):
        Probe(model, cross_entropy, batches(), mode="test")


def test_training_with_a_probe_is_bit_identical_to_training_without():
    def train(probing):
        model = network(nn.BatchNorm1d(6), nn.Dropout(0.3))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        probe = Probe(model, cross_entropy, batches(seed=1)) if probing else None
        torch.manual_seed(3)
        for step in range(50):
            optimizer.zero_grad()
            cross_entropy(model, batches(1, seed=step)[0]).backward()
            if probe is not None and step % 5 == 0:
                probe.operator(step % 2).matvec(torch.ones(probe.size))
            optimizer.step()
        moments = [value for entry in optimizer.state.values() for value in entry.values()]
        return [*model.state_dict().values(), *moments, torch.get_rng_state()]

    assert all(torch.equal(one, other) for one, other in zip(train(True), train(False), strict=True))


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 6), network()[1:2], nn.Linear(6, 3)
        self.reentrant = reentrant

    def forward(self, inputs):
        hidden = self.first(inputs)
        return self.last(checkpoint(self.inner, hidden, use_reentrant=self.reentrant))


def test_reentrant_checkpointing_is_refused():
    probe = Probe(Checkpointed(False), cross_entropy, batches())
    assert float(probe.operator(0).matvec(torch.ones(probe.size)).norm()) > 0
    with pytest.raises(UnsupportedModelError, match="use_reentrant=False"):
        Probe(Checkpointed(True), cross_entropy, batches()).operator(0)


def test_compiled_models_are_probed_as_the_original_module():
    model = network()
    expected = materialise(Probe(model, cross_entropy, batches()).operator(0))
    compiled = torch.compile(model, backend="eager")
    probe = Probe(compiled, cross_entropy, batches())
    assert probe.model is model
    assert torch.equal(materialise(probe.operator(0)), expected)
    model.compile(backend="eager")
    assert torch.equal(materialise(Probe(model, cross_entropy, batches()).operator(0)), expected)


class Attention(nn.Module):
    def __init__(self, fused):
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.head, self.fused = nn.Linear(4, 12), nn.Linear(4, 3), fused

    def forward(self, inputs):
        query, key, value = self.mix(inputs[:, None, :] + torch.arange(5.0)[:, None]).chunk(3, dim=-1)
        if self.fused:
            mixed = functional.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])[:, 0]
        else:
            mixed = (query @ key.transpose(1, 2) / 2).softmax(-1) @ value
        return self.head(mixed[:, -1])


def test_fused_attention_runs_on_the_math_kernel_inside_the_probe_only():
    fused, plain = Attention(True), Attention(False)
    expected = materialise(Probe(plain, cross_entropy, batches()).operator(0))
    assert torch.allclose(materialise(Probe(fused, cross_entropy, batches()).operator(0)), expected, atol=1e-6)
    loss = cross_entropy(fused, batches()[0])
    gradient = torch.autograd.grad(loss, fused.mix.weight, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="not implemented"):
        torch.autograd.grad(gradient.sum(), fused.mix.weight)


def test_half_precision_is_probed_in_float32_copies():
    model = network().bfloat16()
    before = state(model)
    halves = [(inputs.bfloat16(), targets) for inputs, targets in batches()]
    probe = Probe(model, cross_entropy, halves)
    found = materialise(probe.operator(0))
    assert found.dtype == torch.float32
    assert_unchanged(model, before)
    exact = Probe(network().bfloat16().float(), cross_entropy, [(x.float(), y) for x, y in halves])
    assert torch.allclose(found, materialise(exact.operator(0)), atol=1e-6)


def test_frozen_and_unused_parameters_are_excluded_with_the_reason():
    model = network()
    model.spare = nn.Linear(5, 5)
    model[0].bias.requires_grad_(False)

    def loss(module, batch):
        return functional.cross_entropy(module[3 - 1](module[1](module[0](batch[0]))), batch[1])

    probe = Probe(model, loss, batches())
    assert probe.excluded == {"0.bias": "frozen", "spare.weight": "unused", "spare.bias": "unused"}
    assert probe.size == 24 + 18 + 3
    assert probe.names == ["0.weight", "2.weight", "2.bias"]
    assert probe.operator(0).size == probe.size


class OneExpert(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])

    def forward(self, batch):
        return self.experts[batch[2]](batch[0])


def test_a_parameter_counts_if_any_minibatch_uses_it():
    routed = [(*batch, index) for index, batch in enumerate(batches())]
    probe = Probe(OneExpert(), lambda m, b: functional.cross_entropy(m(b), b[1]), routed)
    assert probe.excluded == {}
    assert probe.size == 30
    matrix = materialise(probe.operator(1))
    assert float(matrix[:15].abs().max()) == 0.0 < float(matrix[15:].abs().max())


def test_sparse_embedding_gradients_are_dense_inside_the_probe():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3))
    rows = [(torch.randint(0, 9, (6, 2)), torch.randint(0, 3, (6,)))]
    probe = Probe(model, cross_entropy, rows)
    assert float(probe.operator(0).matvec(torch.ones(probe.size)).norm()) > 0
    assert model[0].sparse


def test_parameters_or_losses_that_are_not_finite_are_refused():
    model = network()
    with pytest.raises(NumericalError, match="loss"):
        Probe(model, lambda m, b: cross_entropy(m, b) * float("inf"), batches()).operator(0)
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(NumericalError, match=r"0\.weight|loss"):
        Probe(model, cross_entropy, batches()).operator(0)


def test_empty_probes_and_models_with_nothing_to_train_are_refused():
    with pytest.raises(DataError, match="no minibatches"):
        Probe(network(), cross_entropy, [])
    with pytest.raises(DataError, match="trainable"):
        Probe(network().requires_grad_(False), cross_entropy, batches())
    with pytest.raises(DataError, match="none of the model"):
        Probe(network(), lambda m, b: torch.zeros((), requires_grad=True), batches())
    with pytest.raises(NumericalError, match="nan"):
        Probe(network(), cross_entropy, [(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))]).operator(0)


def test_a_data_loader_is_read_once_without_touching_the_random_state():
    model, data = network(), torch.utils.data.TensorDataset(*batches(1)[0])
    before = state(model)
    probe = Probe(model, cross_entropy, torch.utils.data.DataLoader(data, batch_size=4, shuffle=True))
    assert_unchanged(model, before)
    assert len(probe.batches) == len(probe.operators) == 2
    assert torch.equal(materialise(probe.operator(0)), materialise(probe.operator(0)))


@pytest.mark.parametrize("training", [True, False])
def test_a_hugging_face_causal_lm_with_sdpa_and_tied_embeddings(training):
    model = tiny_model("llama")
    model.train(training)
    if training:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    implementation = model.config._attn_implementation
    ids = torch.randint(0, model.config.vocab_size, (2, 7), generator=torch.Generator().manual_seed(0))
    before = state(model)
    probe = Probe(model, None, [ids, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    operator = probe.operator(0)
    vector = torch.ones(probe.size)
    assert torch.equal(operator.matvec(vector), probe.operator(1).matvec(vector))
    assert float(operator.matvec(vector).norm()) > 0
    assert probe.size == sum(parameter.numel() for parameter in model.parameters())
    assert operator.loss == pytest.approx(float(model(ids, labels=ids).loss.detach()), rel=1e-5)
    assert model.config._attn_implementation == implementation
    assert_unchanged(model, before)
    with pytest.raises(DataError, match="input_ids"):
        language_model_loss(model, {"ids": ids})
