"""Selection speed: SAGE and facility location beside submodlib and beside Algorithm 1 as it is written. One thread, CPU time.

N = 196 patches, width 192, budget 48, one image unless told; random normal embeddings. Contestants are interleaved.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch

from measurement import interleave, ratio, write_result
from telltale.edge.selection import select

PATCHES, WIDTH, BUDGET, BATCH = 196, 192, 48, 64


def algorithm_1(importance: torch.Tensor, embeddings: torch.Tensor, budget: int, k: int = 2) -> list[int]:
    """The pseudo-code line by line: similarities to all chosen patches are computed anew at every step."""
    pool = importance.topk(min(len(importance), k * budget)).indices.tolist()
    units = embeddings / embeddings.norm(dim=1, keepdim=True)
    chosen = [pool[0]]
    while len(chosen) < budget:
        left = [index for index in pool if index not in chosen]
        nearest = (units[left] @ units[chosen].T).max(dim=1).values
        chosen.append(left[int(nearest.argmin())])
    return chosen


def submodlib(kind: str, data: np.ndarray, optimizer: str) -> Callable[[], int]:
    import submodlib as peer

    def run() -> int:
        function = getattr(peer, kind)(n=len(data), mode="dense", data=data, metric="cosine")
        function.maximize(
            budget=BUDGET, optimizer=optimizer, stopIfZeroGain=False, stopIfNegativeGain=False, show_progress=False
        )
        return 1

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    generator = np.random.default_rng(0)
    embeddings = generator.normal(size=(BATCH, PATCHES, WIDTH)).astype(np.float32)
    importance = generator.random((BATCH, PATCHES))
    importance /= importance.sum(axis=1, keepdims=True)
    one_a, one_z = importance[0], embeddings[0]
    torch_a, torch_z = torch.from_numpy(importance), torch.from_numpy(embeddings)

    def ours(name: str, repeats: int) -> Callable[[], int]:
        def run() -> int:
            for _ in range(repeats):
                select(name, one_a, one_z, BUDGET)
            return repeats

        return run

    def batch(name: str) -> Callable[[], int]:
        def run() -> int:
            select(name, torch_a, torch_z, BUDGET)
            return BATCH

        return run

    def literal() -> int:
        algorithm_1(torch_a[0], torch_z[0], BUDGET)
        return 1

    contestants = {
        "sage": ours("sage", 50),
        "facility": ours("facility", 10),
        "mmr": ours("mmr", 10),
        "dpp": ours("dpp", 10),
        "fps": ours("fps", 10),
        "sage, batch of 64 in torch": batch("sage"),
        "facility, batch of 64 in torch": batch("facility"),
        "Algorithm 1 as written (torch)": literal,
        "submodlib DisparityMin, from data": submodlib("DisparityMinFunction", one_z, "NaiveGreedy"),
        "submodlib FacilityLocation, lazy, from data": submodlib("FacilityLocationFunction", one_z, "LazyGreedy"),
    }
    timings = interleave(contestants, rounds=arguments.rounds, warm_up=2)
    milliseconds = {name: timing.summary() for name, timing in timings.items()}
    ratios = {
        "sage over submodlib DisparityMin": ratio(timings["submodlib DisparityMin, from data"], timings["sage"]),
        "sage over Algorithm 1 as written": ratio(timings["Algorithm 1 as written (torch)"], timings["sage"]),
        "facility over submodlib FacilityLocation": ratio(
            timings["submodlib FacilityLocation, lazy, from data"], timings["facility"]
        ),
    }
    for name, values in milliseconds.items():
        print(f"{name:<46} {values['cpu_ms_per_token']:.3f} ms CPU per image")
    for name, values in ratios.items():
        print(f"{name:<46} {values['cpu']:.1f}x ({values['cpu_q1']:.1f} to {values['cpu_q3']:.1f})")
    write_result(
        "edge_selection",
        patches=PATCHES,
        width=WIDTH,
        budget=BUDGET,
        batch=BATCH,
        rounds=arguments.rounds,
        unit="milliseconds per image (a 'token' of these fields is an image)",
        contestants=milliseconds,
        ratios=ratios,
        targets={
            "sage over submodlib DisparityMin": 100,
            "sage over Algorithm 1 as written": 20,
            "facility": 10,
            "batch_ms": 0.25,
        },
    )


if __name__ == "__main__":
    main()
