"""What the ranks do in the tests of the training job and the probe: all of it in one start of two processes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from telltale.errors import TelltaleError
from telltale.models.presets import build
from telltale.tasks.code import CodeCorpus
from telltale.train.layerskip import LayerSkipConfig
from telltale.train.pipeline.job import train_pipeline
from telltale.train.pipeline.plan import Plan
from telltale.train.pipeline.runtime.collectives import untie
from telltale.train.pipeline.stage_weights import without_weights
from telltale.train.pipeline.topology import probe
from telltale.train.run_config import TrainConfig

LAYERS = 6
CONFIG = TrainConfig(
    steps=6,
    batch_size=4,
    sequence_length=24,
    precision="float32",
    log_every=1,
    evaluate_every=4,
    evaluation_tokens=200,
    checkpoint_every=4,
)
CONSTANT = dataclasses.replace(CONFIG, steps=4, schedule="constant")
INTERLEAVED = Plan.even(LAYERS, 4, policy="interleaved", microbatches=2, chunks=2)
RECIPE = LayerSkipConfig(p_max=0.3, rotation=2)


def corpus() -> CodeCorpus:
    texts = [f"def function_{index}(x):\n    return x * {index} + 1\n" * 20 for index in range(9)]
    return CodeCorpus.from_texts(texts[:8], texts[8:], source="made up", vocabulary_size=300)


def model(data: CodeCorpus, *, untied: bool = False) -> Any:
    network = build("nano", vocabulary_size=len(data.tokenizer), seed=1)
    if untied:
        untie(network)
    return network


def plan(policy: str, microbatches: int = 1) -> Plan:
    return Plan.even(LAYERS, 2, policy=policy, microbatches=microbatches)


def jobs(rank: int, folder: str) -> dict[str, Any]:
    """Everything that the tests look at, by name."""
    torch.set_num_threads(1)
    data, root = corpus(), Path(folder)
    found: dict[str, Any] = {"probe": probe(message_bytes=2**16, repeats=3)}

    def train(name: str, policy: str, m: int = 1, *, untied: bool = False, **options: Any) -> Any:
        options = {"config": CONFIG, "layerskip": RECIPE, "tokenizer": data.tokenizer} | options
        network, config = options.pop("network", None) or model(data, untied=untied), options.pop("config")
        chosen = INTERLEAVED if policy == "interleaved" else plan(policy, m)
        return train_pipeline(network, data, config, chosen, run_dir=root / name, timeout=60.0, **options)

    found["flush"] = train("flush", "flush", 2)
    found["plain"] = train("plain", "flush", 2, layerskip=None)
    found["stash"] = train("stash", "stash", untied=True)
    found["again"] = _error(lambda: train("flush", "flush", 2))
    found["other"] = _error(lambda: train("flush", "flush", 4, resume=True))
    found["plan after other"] = Plan.load(root / "flush" / "plan.json")
    found["resumed"] = train("flush", "flush", 2, resume=True)
    found["tied"] = _error(lambda: train("tied", "stash"))
    if rank == 0:
        model(data).save_pretrained(root / "start", max_shard_size="60KB")
    dist.barrier()
    longer = dataclasses.replace(CONSTANT, steps=6, checkpoint_every=3)
    train("long", "flush", 2, config=longer, layerskip=None)
    for name, policy in (("own", "flush"), ("interleaved", "interleaved")):
        for number, config in enumerate((CONSTANT, longer)):
            network = without_weights(root / "start")
            own = {"network": network, "weights": root / "start", "layerskip": None, "resume": number > 0}
            found[name] = train(name, policy, 2, config=config, **own)
            found[f"{name} on meta"] = [key for key, tensor in network.named_parameters() if tensor.is_meta]
    found["shortened"] = _error(lambda: train("long", "flush", 2, config=CONSTANT, layerskip=None, resume=True))
    found["exits"] = _error(lambda: train("exits", "interleaved", 2))
    return found


def _error(action: Any) -> str:
    try:
        action()
    except TelltaleError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"
