"""The recipe in loops of a user's own: whatever wraps the model, the gradients are those of the loop written out.

DistributedDataParallel in three ways, Accelerate, FSDP, Lightning; on two processes, and what averages nothing is refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from telltale.errors import ConfigError
from telltale.train.layerskip import LayerSkipConfig, apply
from train.exit_reference import independent, model
from train.test_hf_trainer_contract import ON, packed, same, texts, torchrun

ROWS = 8


def batch(rank: int, rows: Callable[[], list] = texts) -> dict[str, Tensor]:
    """What a rank trains on: rows of its own, some of them with fewer tokens to predict."""
    found = rows()[ROWS * rank : ROWS * (rank + 1)]
    return {key: torch.stack([row[key] for row in found]) for key in found[0]}


def normalizer(rows: Callable[[], list] = texts) -> float:
    """Tokens of all ranks over the number of ranks."""
    return sum(int((batch(rank, rows)["labels"][:, 1:] != -100).sum()) for rank in (0, 1)) / 2


def named(net: nn.Module) -> dict[str, Tensor]:
    """Whole gradients by the model's own names, whatever wraps it."""
    gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return {key: (g.full_tensor() if hasattr(g, "full_tensor") else g).clone() for key, g in gradients.items()}


def wrapped_afterwards(rank: int, **options: Any) -> dict[str, Tensor]:
    net = model().train()
    recipe, ddp = apply(net, ON), DDP(net, **options)
    loss, _ = recipe.loss(**batch(rank), model=ddp, normalizer=normalizer())
    loss.backward()
    return named(net)


def wrapped_before(rank: int) -> dict[str, Tensor]:
    net = model().train()
    recipe = apply(DDP(net), ON)
    loss, _ = recipe.loss(**batch(rank), normalizer=normalizer())
    loss.backward()
    return named(net)


def recipe_wrapped(rank: int) -> dict[str, Tensor]:
    net = model().train()
    ddp = DDP(apply(net, ON))
    loss, _ = ddp(**batch(rank), normalizer=normalizer())
    loss.backward()
    return named(net)


def packed_rows(rank: int) -> dict[str, Tensor]:
    net = model().train()
    recipe, ddp = apply(net, ON), DDP(net)
    loss, _ = recipe.loss(**batch(rank, packed), model=ddp, normalizer=normalizer(packed))
    loss.backward()
    return named(net)


def accelerated(rank: int, *, first: bool) -> dict[str, Tensor]:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    net = model().train()
    if first:
        recipe = apply(net, ON)
        ready = accelerator.prepare(net)
        loss, _ = recipe.loss(**batch(rank), model=ready, normalizer=normalizer())
    else:
        recipe = apply(accelerator.prepare(net), ON)
        loss, _ = recipe.loss(**batch(rank), normalizer=normalizer())
    accelerator.backward(loss)
    return named(net)


def sharded(rank: int, *, first: bool) -> dict[str, Tensor]:
    from torch.distributed.fsdp import fully_shard

    net = model().train()
    recipe = apply(net, ON) if first else None
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for layer in net.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh, reshard_after_forward=True)
    recipe = recipe or apply(net, ON)
    loss, _ = recipe.loss(**batch(rank), normalizer=normalizer())
    loss.backward()
    return named(net)


def lightning_module(rank: int, folder: str) -> dict[str, Tensor]:
    lightning = pytest.importorskip("lightning.pytorch")
    found: dict[str, Tensor] = {}

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model().train()
            self.recipes = [apply(self.net, ON)]  # in a list, so that Lightning sees each weight once

        def training_step(self, inputs: Any, index: int) -> Tensor:
            self.recipes[0].set_step(self.global_step)
            return self.recipes[0].loss(**batch(rank), normalizer=normalizer())[0]

        def on_after_backward(self) -> None:
            found.update(named(self.net))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net.parameters(), lr=0.1)

    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.zeros(4, 1)))
    return found


WAYS: dict[str, Callable[[int, str], dict[str, Tensor]]] = {
    "DDP around the model": lambda rank, folder: wrapped_afterwards(rank),
    "DDP that looks for unused weights": lambda rank, folder: wrapped_afterwards(rank, find_unused_parameters=True),
    "DDP with a static graph": lambda rank, folder: wrapped_afterwards(rank, static_graph=True),
    "the recipe on DDP": lambda rank, folder: wrapped_before(rank),
    "DDP around the recipe": lambda rank, folder: recipe_wrapped(rank),
    "packed rows": lambda rank, folder: packed_rows(rank),
    "Accelerate, prepared afterwards": lambda rank, folder: accelerated(rank, first=True),
    "Accelerate, prepared before": lambda rank, folder: accelerated(rank, first=False),
    "FSDP, sharded afterwards": lambda rank, folder: sharded(rank, first=True),
    "FSDP, sharded before": lambda rank, folder: sharded(rank, first=False),
    "Lightning": lightning_module,
}


def every_way(folder: str) -> None:
    """What each of two processes runs."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    found: dict[str, Any] = {}
    for name, way in WAYS.items():
        found[name] = way(rank, folder)
    net = model().train()
    recipe = apply(net, ON)
    with pytest.raises(ConfigError, match="nothing averages the gradients"):
        recipe.loss(**batch(rank))
    recipe.loss(**batch(rank), model=net)[0].backward()
    with pytest.raises(ConfigError, match="not the LlamaModel that the recipe is on"):
        recipe.loss(**batch(rank), model=DDP(model()))
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    dist.barrier()


@pytest.mark.slow
def test_gradients_are_the_written_out_loops_whatever_wraps_the_model(tmp_path):
    torchrun(tmp_path, "train.test_layerskip_loops", "every_way")
    found = torch.load(tmp_path / "rank0.pt", weights_only=True)
    for name in WAYS:
        rows = packed if name == "packed rows" else texts
        losses, wanted, dropped = independent([[[batch(0, rows)], [batch(1, rows)]]], learning_rate=0.1)
        assert dropped > 0
        same((losses, [found[name]]), (losses, wanted))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_on_one_process(precision):
    accelerate = pytest.importorskip("accelerate")
    found = []
    for first in (True, False):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
        net = model().train()
        if first:
            recipe = apply(net, ON)
            ready = accelerator.prepare(net)
        else:
            ready = accelerator.prepare(net)
            recipe = apply(ready, ON)
        seen: list[torch.dtype] = []
        net.model.layers[3].mlp.down_proj.register_forward_hook(
            lambda m, a, output, seen=seen: seen.append(output.dtype)
        )
        loss, _ = recipe.loss(**batch(0), model=ready)
        accelerator.backward(loss)
        assert seen == [torch.bfloat16 if precision == "bf16" else torch.float32]
        found.append((loss.item(), named(net)))
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    assert found[0][0] == pytest.approx(found[1][0])
    losses, wanted, _ = independent([[[batch(0)]]], learning_rate=0.1)
    if precision == "no":
        same(([found[0][0]], [found[0][1]]), (losses, wanted))
    else:
        assert found[0][0] == pytest.approx(losses[0], rel=2e-2)


@pytest.mark.parametrize("first", [True, False])
def test_layers_that_pytorch_recomputes(first):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    net = model().train()
    recipe = apply(net, ON) if first else None
    layers = tuple(net.model.layers)
    apply_activation_checkpointing(net, check_fn=lambda module: module in layers)
    recipe = recipe or apply(net, ON)
    loss, _ = recipe.loss(**batch(0))
    loss.backward()
    gradients = {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in named(net).items()}
    losses, wanted, dropped = independent([[[batch(0)]]], learning_rate=0.1)
    assert dropped > 0
    same(([loss.item()], [gradients]), (losses, wanted))
    recipe.remove()
    assert all("forward" not in vars(layer) for layer in layers)


def test_lightning_on_one_process(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model().train()
            self.recipes = [apply(self.net, ON)]
            self.losses: list[float] = []
            self.gradients: list[dict[str, Tensor]] = []

        def training_step(self, inputs: Any, index: int) -> Tensor:
            self.recipes[0].set_step(self.global_step)
            loss, _ = self.recipes[0].loss(**batch(index))
            self.losses.append(loss.item())
            return loss

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.gradients.append(named(self.net))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net.parameters(), lr=0.1)

    job = Module()
    assert sum("lm_head" in key for key in job.state_dict()) == 1
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(job, torch.utils.data.DataLoader(torch.zeros(3, 1)))
    wanted = independent([[[batch(step)]] for step in range(3)], learning_rate=0.1)
    same((job.losses, job.gradients), wanted[:2])


def test_what_the_model_takes_beside_ids_goes_to_it():
    recipe = apply(model().train(), ON)
    rows = batch(0, packed)
    loss, _ = recipe.loss(**rows)
    ids = rows.pop("input_ids")
    embedded, _ = apply(model().train(), ON).loss(inputs_embeds=model().model.embed_tokens(ids), **rows)
    torch.testing.assert_close(embedded, loss)
    without, _ = apply(model().train(), ON).loss(ids, labels=rows["labels"])
    assert abs(without.item() - loss.item()) > 1e-3


def test_the_first_token_of_a_packed_text_is_not_predicted():
    recipe = apply(model().train(), LayerSkipConfig(p_max=0.0, curriculum="none"))
    rows = batch(0, packed)
    own, _ = recipe.loss(rows["input_ids"], position_ids=rows["position_ids"])
    labels = rows["input_ids"].masked_fill(rows["position_ids"] == 0, -100)
    given, _ = recipe.loss(rows["input_ids"], labels=labels, position_ids=rows["position_ids"])
    assert torch.equal(own, given)


def test_neither_ids_nor_labels_is_refused():
    with pytest.raises(ConfigError, match="neither input_ids nor labels"):
        apply(model(), ON).loss(inputs_embeds=torch.zeros(1, 3, 16))


def test_boundaries_in_one_piece_for_several_rows_are_refused_where_rows_are_dropped():
    recipe = apply(model().train(), LayerSkipConfig(p_max=0.9))
    rows = batch(0, packed)
    with pytest.raises(ConfigError, match="cu_seq_lens_q"):
        recipe.loss(**rows, cu_seq_lens_q=torch.arange(0, 97, 12))
