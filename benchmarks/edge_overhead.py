"""What the link itself costs on loopback, and what micro-batches bring: no link emulation, a small model on the server.

Overhead is the time from handing a frame to the socket to the reply, less the model's time as the server measured it. Throughput:
32 clients at once against a server that takes one request at a time and one that takes up to 32 together.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import time
from typing import Any

import numpy as np
import torch
from transformers import ViTConfig, ViTForImageClassification

from measurement import write_result
from telltale.edge.arbitration import Arbiter
from telltale.edge.budget import ByteBudget
from telltale.edge.client import EdgeClient, EdgeModel, Policy
from telltale.edge.gate import Gate
from telltale.edge.server import CloudServer, served_model
from telltale.models.vision import open_vision

IMAGE = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)


def client(vision: Any, url: str) -> EdgeClient:
    """A client whose own model costs nothing."""
    generator = np.random.default_rng(1)
    found = np.log(np.full(10, 0.1)), generator.random(64), generator.normal(size=(64, 16)).astype(np.float32)
    model = EdgeModel(8, 8, 4, vision.labels, lambda image: found)
    policy = Policy("topk", codec="raw8", count=13, deadline=30.0, gate=Gate(threshold=0.0), arbiter=Arbiter("server"))
    return EdgeClient(model, url, policy=policy, budget=ByteBudget(4000))


def overhead(vision: Any, requests: int) -> dict[str, float]:
    with CloudServer(served_model(vision)).background() as url, client(vision, url) as edge:
        edge.check_server(10)
        taken, whole = [], []
        for number in range(requests + 50):
            answer = edge.predict(IMAGE)
            assert answer.source == "server", answer
            if number >= 50:
                taken.append(1000 * (answer.network_seconds - answer.server_seconds))
                whole.append(1000 * answer.seconds)
    return {
        "requests": requests,
        "overhead_p50_ms": float(np.median(taken)),
        "overhead_p95_ms": float(np.quantile(taken, 0.95)),
        "request_p50_ms": float(np.median(whole)),
    }


def throughput(vision: Any, max_batch: int, requests: int) -> float:
    """Requests per second of 32 clients at once."""
    server = CloudServer(served_model(vision), max_batch=max_batch, queue=256)
    with server.background() as url:
        clients = [client(vision, url) for _ in range(32)]
        for edge in clients:
            edge.check_server(10)

        def work(edge: EdgeClient) -> int:
            return sum(edge.predict(IMAGE).source == "server" for _ in range(requests // 32))

        with concurrent.futures.ThreadPoolExecutor(32) as pool:
            list(pool.map(lambda edge: edge.predict(IMAGE), clients))
            started = time.perf_counter()
            answered = sum(pool.map(work, clients))
            seconds = time.perf_counter() - started
        for edge in clients:
            edge.close()
        assert answered == requests // 32 * 32
    return answered / seconds


def model_only(vision: Any, batch: int) -> float:
    """Requests per second of the model's forward alone."""
    pixels = vision.pixels(np.repeat(IMAGE[None], batch, axis=0))
    indices = torch.arange(13).expand(batch, -1)
    with torch.inference_mode():
        for _ in range(10):
            vision.logits(pixels, indices)
        started = time.perf_counter()
        for _ in range(60):
            vision.logits(pixels, indices)
    return 60 * batch / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = {"image_size": 32, "patch_size": 4, "hidden_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4}
    model = ViTForImageClassification(ViTConfig(**shape, intermediate_size=192, num_labels=10)).eval()
    vision = open_vision(model)
    single = overhead(vision, arguments.requests)
    print(single, flush=True)
    rounds = [
        (throughput(vision, 1, arguments.requests), throughput(vision, 32, arguments.requests))
        for _ in range(arguments.rounds)
    ]
    ratios = [together / alone for alone, together in rounds]
    forward = {f"batch {batch}": model_only(vision, batch) for batch in (1, 32)}
    print(rounds, ratios, forward)
    write_result(
        "edge_overhead",
        model=shape,
        patches=13,
        loopback=single,
        requests_per_second={
            "one at a time": [alone for alone, _ in rounds],
            "micro-batches of up to 32": [together for _, together in rounds],
        },
        ratio=float(np.median(ratios)),
        forward_images_per_second=forward,
        targets={"overhead_p50_ms": 2, "ratio": 3},
    )


if __name__ == "__main__":
    main()
