"""Does the gate help, does decorrelation, and where not? Experiments A, B and C on public preferences, split by prompt.

A: RM-Bench, all nine style pairs of a prompt. B: the same, trained and stopped only on pairs whose right answer is the fancier
one, tested on all. C: AlpacaEval's GPT-4 preferences, whose labels themselves like the longer answer. Sixty per cent of the
prompts train, twenty stop the training and choose the gate's temperature, twenty test; nothing is chosen on the test prompts.
Beside them LLMBar's 419 pairs, scored by the judges of A. ``--data`` is the folder with ``rm-bench``, ``llmbar`` and
``alpaca_eval_preferences.jsonl.gz``.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from judge_data import OBJECTIVES, Judged, ResponseFeatures, alpaca_eval, counted, encoded_prompts, llmbar, rm_bench
from measurement import write_result
from telltale.align.judge.baselines import Baselines, fit_baselines
from telltale.align.judge.benchmarks import Item
from telltale.align.judge.decorrelation import correlation, fit_transform
from telltale.align.judge.gate_fit import PairFeatures, held_out_rows, reward_differences, train_gate
from telltale.align.judge.head import GateConfig, Head
from telltale.align.judge.ridge import fit_ridge
from telltale.signals.statistics import CountedEstimate, clustered_mean

GATE = GateConfig(hidden=256, layers=3, steps=1500, batch_size=1024)
TEMPERATURES = (1.0, 10.0)
NUISANCE = "verbosity"
SCOPES = ("raw", "pooled", "within-prompt")
ALPACA_MARGIN = 0.2
STYLES = 3


Reader = Callable[[Sequence[str], Sequence[str]], Tensor]
"""Features (n, d) of the responses (second argument) to the prompts (first)."""


@dataclass(frozen=True)
class Source:
    """What the experiments are made on: preferences, and how responses and prompts become features."""

    items: list[Item]
    """RM-Bench."""
    judged: list[Judged]
    """AlpacaEval."""
    outside: list[Item]
    """LLMBar."""
    reader: Callable[[Sequence[str], int], Reader]
    """From training responses and a seed."""
    states: Callable[[Sequence[str]], Tensor]
    """Of prompts."""
    gate: GateConfig = GATE
    scopes: tuple[str, ...] = SCOPES


def words_and_minilm(folder: Path) -> Source:
    """Hashed words of the responses, MiniLM's states of the prompts: all rows."""

    def reader(texts: Sequence[str], seed: int) -> Reader:
        words = ResponseFeatures(texts, seed=seed)
        return lambda prompts, responses: words(responses)

    return Source(rm_bench(folder), alpaca_eval(folder), llmbar(folder), reader, encoded_prompts)


def asked(item: Item) -> str:
    """The text of an item's one turn."""
    return item.prompt[0]["content"]


def logarithm_of_words(texts: Sequence[str]) -> Tensor:
    """(n,): what "length only" goes by."""
    return torch.tensor([math.log1p(len(text.split())) for text in texts])


@dataclass
class Data:
    """Everything of one seed: responses of RM-Bench by prompt and side, rated rows, and who is in which split."""

    items: list[Item]
    states: Tensor
    """(prompts, 384)."""
    features: Tensor
    """(prompts, 6, d): three chosen and three rejected styles."""
    lengths: Tensor
    """(prompts, 6)."""
    split: Tensor
    """(prompts,): 0 train, 1 stop, 2 test."""
    reference: Tensor
    """(n, d): training responses of both sources."""
    groups: Tensor
    labels: Tensor
    """(n, K), NaN where AlpacaEval's judge has not spoken."""
    reader: Reader
    held_out: Tensor
    """(m, d): responses of both sources to unseen prompts."""
    held_out_groups: Tensor


def split_of(items: Sequence[Item], seed: int) -> Tensor:
    """60/20/20 by prompt inside each domain."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.zeros(len(items), dtype=torch.long)
    for domain in sorted({item.subset for item in items}):
        rows = torch.tensor([index for index, item in enumerate(items) if item.subset == domain])
        order = rows[torch.randperm(len(rows), generator=generator)]
        first, second = round(0.6 * len(rows)), round(0.8 * len(rows))
        found[order[first:second]] = 1
        found[order[second:]] = 2
    return found


def prepared(source: Source, seed: int) -> Data:
    """Features fitted on training text alone, and the rated rows."""
    items = source.items
    split = split_of(items, seed)
    training = [item for item, part in zip(items, split.tolist(), strict=True) if part == 0]
    texts = [text for item in training for text in (*item.chosen, *item.rejected)]
    owners = [asked(item) for item in training for _ in range(2 * STYLES)]
    drawn, unseen = alpaca_rows(source.judged, seed)
    texts += [row.second for row in drawn]
    owners += [row.prompt for row in drawn]
    by_judge = [math.nan] * (len(texts) - len(drawn)) + [row.better for row in drawn]
    reader = source.reader(texts, seed)
    labels = torch.tensor(
        [[said, *counted(p, t)] for said, p, t in zip(by_judge, owners, texts, strict=True)], dtype=torch.float64
    )
    number = {prompt: index for index, prompt in enumerate(dict.fromkeys(owners))}
    sides = [[*item.chosen, *item.rejected] for item in items]
    features = torch.stack([reader([asked(i)] * len(own), own) for i, own in zip(items, sides, strict=True)])
    return Data(
        items,
        source.states([asked(item) for item in items]),
        features,
        torch.stack([logarithm_of_words(own) for own in sides]),
        split,
        reader(owners, texts),
        torch.tensor([number[prompt] for prompt in owners]),
        labels,
        reader,
        *held_out_reference(items, features, split, unseen, reader),
    )


def held_out_reference(
    items: Sequence[Item], features: Tensor, split: Tensor, unseen: Sequence[Judged], reader: Reader
) -> tuple[Tensor, Tensor]:
    """Responses of both sources to prompts that nothing was fitted on, and their groups."""
    own = features[split == 2].reshape(-1, features.shape[-1])
    number = {prompt: index for index, prompt in enumerate(dict.fromkeys(row.prompt for row in unseen))}
    groups = torch.tensor([len(items) + number[row.prompt] for row in unseen])
    return torch.cat([own, reader([row.prompt for row in unseen], [row.second for row in unseen])]), torch.cat(
        [torch.arange(len(own)) // (2 * STYLES), groups]
    )


def alpaca_rows(judged: Sequence[Judged], seed: int) -> tuple[list[Judged], list[Judged]]:
    """4,000 rated responses of four fifths of AlpacaEval's prompts, and 1,000 of the others."""
    number = {prompt: index for index, prompt in enumerate(dict.fromkeys(row.prompt for row in judged))}
    outside = held_out_rows(torch.tensor([number[row.prompt] for row in judged]), 0.2, seed=seed)
    order = torch.randperm(len(judged), generator=torch.Generator().manual_seed(seed)).tolist()
    sides = [[judged[index] for index in order if bool(outside[index]) == out] for out in (False, True)]
    return sides[0][:4000], sides[1][:1000]


def pairs_of(
    data: Data, parts: Sequence[int], keep: Callable[[int, int], bool]
) -> tuple[PairFeatures, Tensor, list[tuple[int, int, int]]]:
    """Style pairs (i right, j wrong) with ``keep(i, j)`` of the prompts in ``parts``; their split; and (prompt, i, j)."""
    places = [
        (prompt, i, j)
        for prompt in range(len(data.items))
        if int(data.split[prompt]) in parts
        for i in range(STYLES)
        for j in range(STYLES)
        if keep(i, j)
    ]
    prompts, right, wrong = (torch.tensor(column) for column in zip(*places, strict=True))
    found = PairFeatures(
        data.features[prompts, right], data.features[prompts, STYLES + wrong], data.states[prompts], prompts
    )
    return found, data.split[prompts], places


def heads_of(data: Data, source: Source) -> tuple[dict[str, Head], dict[str, float], dict[str, float]]:
    """Untrained heads by scope; held-out |rho| with the nuisance by scope, pooled and within prompts."""
    fit = fit_ridge(data.reference, data.labels, groups=data.groups)
    heads, pooled, within = {}, {}, {}
    column = OBJECTIVES.index(NUISANCE)
    test, test_groups = data.held_out, data.held_out_groups
    for scope in source.scopes:
        nuisances = () if scope == "raw" else (NUISANCE,)
        head = Head(
            OBJECTIVES, data.reference.shape[1], prompt_size=data.states.shape[1], gate=source.gate, nuisances=nuisances
        )
        head.set_regression(fit.weights)
        if nuisances:
            with torch.no_grad():
                rewards = head.rewards(data.reference).double()
            head.set_transform(
                fit_transform(rewards, [column], groups=data.groups if scope == "within-prompt" else None)
            )
        heads[scope] = head
        with torch.no_grad():
            raw = head.rewards(test)
            turned = head.transformed(raw)
        others = [index for index in range(len(OBJECTIVES)) if index != column]
        pooled[scope] = max(abs(correlation(turned[:, i], raw[:, column])) for i in others)
        within[scope] = max(abs(correlation(turned[:, i], raw[:, column], groups=test_groups)) for i in others)
    return heads, pooled, within


def trained(head: Head, pairs: PairFeatures, held_out: Tensor, gate: GateConfig, seed: int) -> dict[str, Any]:
    """The gate at the temperature with the better held-out loss."""
    best: dict[str, Any] | None = None
    for temperature in TEMPERATURES:
        config = replace(gate, temperature=temperature)
        fresh = Head(
            head.objectives,
            head.regression_layer.in_features,
            prompt_size=head.gating.prompt_size,
            gate=config,
            nuisances=head.nuisances,
        )
        fresh.set_regression(head.regression_layer.weight)
        fresh.set_transform(head.reward_transform_matrix)
        told = train_gate(fresh, pairs, config, seed=seed, held_out=held_out)
        if best is None or told.training.held_out_loss < best["loss"]:
            best = {"loss": told.training.held_out_loss, "temperature": temperature, "head": fresh, "told": told}
    assert best is not None
    return best


def cells(correct: Tensor, places: list[tuple[int, int, int]], data: Data) -> dict[str, float]:
    """Accuracy over all pairs, by difficulty and by domain."""
    names = [("hard" if i < j else "normal" if i == j else "easy") for _, i, j in places]
    domains = [data.items[prompt].subset for prompt, _, _ in places]
    found = {"all": float(correct.mean())}
    for cell in ("easy", "normal", "hard"):
        found[cell] = float(correct[torch.tensor([name == cell for name in names])].mean())
    for domain in sorted(set(domains)):
        found[domain] = float(correct[torch.tensor([name == domain for name in domains])].mean())
    safety = torch.tensor([name.startswith("safety") for name in domains])
    return found | {"safety": float(correct[safety].mean())}


def credit(margins: Tensor) -> Tensor:
    """1, 1/2 or 0 for each pair."""
    return (margins > 0).double() + 0.5 * (margins == 0).double()


@torch.no_grad()
def margins_of(head: Head, baselines: Baselines, pairs: PairFeatures) -> dict[str, Tensor]:
    """Margins of the gate and of what it has to beat."""
    differences = reward_differences(head, pairs)
    return {
        "gate": (head.weights(pairs.prompts) * differences).sum(-1),
        "global softmax": baselines.fixed(differences),
        "global signed": baselines.signed(differences),
        "Bradley-Terry linear": baselines.linear(pairs.chosen) - baselines.linear(pairs.rejected),
        "Bradley-Terry MLP": baselines.mlp(pairs.chosen, pairs.prompts) - baselines.mlp(pairs.rejected, pairs.prompts),
    }


def compared(
    data: Data, heads: dict[str, Head], keep: Callable[[int, int], bool], gate: GateConfig, seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One experiment on RM-Bench: every model's cells on the test prompts, and the trained gates."""
    pairs, parts, _ = pairs_of(data, (0, 1), keep)
    test, _, places = pairs_of(data, (2,), lambda i, j: True)
    held_out = parts == 1
    prompt, right, wrong = (torch.tensor(column) for column in zip(*places, strict=True))
    longer = data.lengths[prompt, right] - data.lengths[prompt, STYLES + wrong]
    found = {"length only": cells(credit(longer), places, data)}
    raw = heads["raw"]
    found["constant gate (official bug)"] = cells(credit(reward_differences(raw, test).sum(-1)), places, data)
    gates: dict[str, Any] = {}
    for scope, head in heads.items():
        gates[scope] = trained(head, pairs, held_out, gate, seed)
        baselines = fit_baselines(head, pairs, gate, seed=seed, held_out=held_out)
        gates[scope]["baselines"] = baselines
        margins = margins_of(gates[scope]["head"], baselines, test)
        gates[scope]["gate_minus"] = gate_minus(margins, prompt)
        for name, values in margins.items():
            if name.startswith("Bradley") and scope != "raw":
                continue
            found[name if name.startswith("Bradley") else f"{name}, {scope}"] = cells(credit(values), places, data)
    return found, gates


def gate_minus(margins: dict[str, Tensor], prompts: Tensor) -> dict[str, CountedEstimate]:
    """The gate's accuracy less that of each other model, with paired intervals over prompts."""
    credits = {name: credit(values).numpy() for name, values in margins.items()}
    return {
        name: clustered_mean(credits["gate"] - values, prompts.numpy())
        for name, values in credits.items()
        if name != "gate"
    }


def on_llmbar(data: Data, gates: dict[str, Any], source: Source) -> dict[str, dict[str, float]]:
    """The judges of A on LLMBar, and length alone."""
    items = source.outside
    prompts = [asked(item) for item in items]
    texts = [[getattr(item, side)[0] for item in items] for side in ("chosen", "rejected")]
    right, wrong = (data.reader(prompts, own) for own in texts)
    pairs = PairFeatures(right, wrong, source.states(prompts), torch.arange(len(items)))
    adversarial = torch.tensor([item.subset != "natural" for item in items])
    margins = {"length only": logarithm_of_words(texts[0]) - logarithm_of_words(texts[1])}
    for scope in source.scopes:
        for name, found in margins_of(gates[scope]["head"], gates[scope]["baselines"], pairs).items():
            margins.setdefault(name if name.startswith("Bradley") else f"{name}, {scope}", found)
    return {
        name: {
            "all": float(credit(m).mean()),
            "natural": float(credit(m[~adversarial]).mean()),
            "adversarial": float(credit(m[adversarial]).mean()),
        }
        for name, m in margins.items()
    }


def gate_weights(data: Data, head: Head) -> dict[str, dict[str, float]]:
    """Mean weights of some objectives by domain, on test prompts, over their sum."""
    found = {}
    for domain in sorted({item.subset for item in data.items}):
        rows = torch.tensor([item.subset == domain for item in data.items]) & (data.split == 2)
        with torch.no_grad():
            weights = head.gating.distribution(data.states[rows]).mean(0)
        found[domain] = dict(zip(OBJECTIVES, weights.tolist(), strict=True))
    return found


def where_it_does_not_help(source: Source, seed: int) -> dict[str, Any]:
    """Experiment C: AlpacaEval's preferences with a clear margin, features and objectives as before."""
    judged = [row for row in source.judged if abs(row.better - 0.5) > ALPACA_MARGIN]
    prompts = list(dict.fromkeys(row.prompt for row in judged))
    number = {prompt: index for index, prompt in enumerate(prompts)}
    groups = torch.tensor([number[row.prompt] for row in judged])
    test = held_out_rows(groups, 0.2, seed=seed)
    stop = held_out_rows(groups[~test], 0.25, seed=seed + 1)
    training = [row for row, out in zip(judged, test.tolist(), strict=True) if not out]
    texts = [text for row in training for text in (row.first, row.second)]
    owners = [row.prompt for row in training for _ in range(2)]
    reader = source.reader(texts, seed)
    said = [value for row in training for value in (1 - row.better, row.better)]
    labels = torch.tensor(
        [[s, *counted(p, t)] for s, p, t in zip(said, owners, texts, strict=True)], dtype=torch.float64
    )
    owned = torch.tensor([number[prompt] for prompt in owners])
    every = [row.prompt for row in judged]
    sides = [[row.first for row in judged], [row.second for row in judged]]
    (first, second), (at_first, at_second) = ([reader(every, s) for s in sides], [logarithm_of_words(s) for s in sides])
    later = torch.tensor([row.better > 0.5 for row in judged])[:, None]
    chosen, rejected = torch.where(later, second, first), torch.where(later, first, second)
    states = source.states(prompts)
    pairs = PairFeatures(chosen, rejected, states[groups], groups)
    longer = torch.where(later[:, 0], at_second - at_first, at_first - at_second)
    reference = reader(owners, texts)
    fit = fit_ridge(reference, labels, groups=owned)
    found: dict[str, Any] = {"pairs": len(judged), "label prefers the longer": float(credit(longer).mean())}
    shorter = longer[test] < 0
    found["length only"] = {"all": float(credit(longer[test]).mean()), "chosen shorter": 0.0}
    for scope in source.scopes:
        head = Head(
            OBJECTIVES,
            reference.shape[1],
            prompt_size=states.shape[1],
            gate=source.gate,
            nuisances=() if scope == "raw" else (NUISANCE,),
        )
        head.set_regression(fit.weights)
        if scope != "raw":
            with torch.no_grad():
                rewards = head.rewards(reference).double()
            column = [OBJECTIVES.index(NUISANCE)]
            head.set_transform(fit_transform(rewards, column, groups=owned if scope == "within-prompt" else None))
        best = trained(head, pairs.take(~test), stop, source.gate, seed)
        baselines = fit_baselines(head, pairs.take(~test), source.gate, seed=seed, held_out=stop)
        for name, margins in margins_of(best["head"], baselines, pairs.take(test)).items():
            key = name if name.startswith("Bradley") else f"{name}, {scope}"
            found.setdefault(
                key, {"all": float(credit(margins).mean()), "chosen shorter": float(credit(margins[shorter]).mean())}
            )
    return found


def one_seed(source: Source, seed: int) -> dict[str, Any]:
    """All experiments of one seed."""
    began = time.process_time()
    data = prepared(source, seed)
    heads, pooled, within = heads_of(data, source)
    a, gates = compared(data, heads, lambda i, j: True, source.gate, seed)
    b, confounded = compared(data, heads, lambda i, j: i > j, source.gate, seed)
    found = {
        "seed": seed,
        "A": a,
        "B": b,
        "C": where_it_does_not_help(source, seed),
        "llmbar": on_llmbar(data, gates, source),
        "gate_minus": {
            name: {scope: trained_on[scope]["gate_minus"] for scope in source.scopes}
            for name, trained_on in (("A", gates), ("B", confounded))
        },
        "held_out_rho": {"pooled": pooled, "within prompts": within},
        "gate_weights": gate_weights(data, gates["raw"]["head"]),
        "temperatures": {scope: gates[scope]["temperature"] for scope in source.scopes},
        "cpu_seconds": time.process_time() - began,
    }
    told = (
        {name: round(cells["all"], 3) for name, cells in a.items()},
        {name: round(cells["hard"], 3) for name, cells in b.items()},
    )
    print(seed, round(found["cpu_seconds"]), *told, found["held_out_rho"], flush=True)
    return found


def accepted(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """The targets, from means over seeds, in points."""

    def mean(experiment: str, model: str, cell: str) -> float:
        return 100 * statistics.mean(seed[experiment][model][cell] for seed in seeds)

    rows = {
        "A: gate - global softmax >= 7": mean("A", "gate, raw", "all") - mean("A", "global softmax, raw", "all"),
        "A: gate - constant gate >= 15": mean("A", "gate, raw", "all")
        - mean("A", "constant gate (official bug)", "all"),
        "B hard: within-prompt gate - raw gate >= 20": mean("B", "gate, within-prompt", "hard")
        - mean("B", "gate, raw", "hard"),
        "B all: within-prompt gate - Bradley-Terry MLP >= 4": mean("B", "gate, within-prompt", "all")
        - mean("B", "Bradley-Terry MLP", "all"),
        "held-out |rho| pooled, pooled lambda <= .11": max(seed["held_out_rho"]["pooled"]["pooled"] for seed in seeds),
        "held-out |rho| within, within lambda <= .11": max(
            seed["held_out_rho"]["within prompts"]["within-prompt"] for seed in seeds
        ),
    }
    limits = (7, 15, 20, 4, 0.11, 0.11)
    return {
        name: {"value": value, "passed": value <= limit if "<=" in name else value >= limit}
        for (name, value), limit in zip(rows.items(), limits, strict=True)
    }


def spread(seeds: list[dict[str, Any]], experiment: str) -> dict[str, dict[str, list[float]]]:
    """Mean and standard deviation over seeds of every model's cells."""
    found: dict[str, dict[str, list[float]]] = {}
    for model, cells_of in seeds[0][experiment].items():
        if isinstance(cells_of, dict):
            for cell in cells_of:
                values = [seed[experiment][model][cell] for seed in seeds]
                found.setdefault(model, {})[cell] = [
                    statistics.mean(values),
                    statistics.stdev(values) if len(values) > 1 else 0.0,
                ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("TELLTALE_JUDGE_DATA"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--trial", action="store_true", help="write no result")
    arguments = parser.parse_args()
    if arguments.data is None:
        raise SystemExit("give --data (or TELLTALE_JUDGE_DATA), the folder of the preference data.")
    torch.set_num_threads(1)
    source = words_and_minilm(Path(arguments.data))
    seeds: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        seeds.append(one_seed(source, seed))
        acceptance = accepted(seeds)
        if not arguments.trial:  # after every seed: a run that is stopped leaves what it has
            write_result(
                "judge_experiments",
                objectives=list(OBJECTIVES),
                acceptance=acceptance,
                mean_and_deviation={name: spread(seeds, name) for name in ("A", "B", "C", "llmbar")},
                seeds=seeds,
            )
    for name, row in acceptance.items():
        print("ok  " if row["passed"] else "FAIL", name, round(row["value"], 3))


if __name__ == "__main__":
    main()
