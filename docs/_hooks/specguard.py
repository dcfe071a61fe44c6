"""Figures of step verification, its calibration and the server."""

from __future__ import annotations

from typing import Any

from drawing import COLOURS, Figure, bars, figure, interval, lines, number, quartiles, results
from matplotlib.axes import Axes

POLICIES: dict[tuple[str, str], str] = {
    ("ends", "target alone"): "target alone",
    ("ends", "draft alone"): "draft alone, 8 candidates",
    ("ends", "token-level speculative"): "token-level speculative",
    ("ends", "random 0.7"): "random, .7",
    ("ends", "random 0.5"): "random, .5",
    ("ends", "oracle"): "oracle",
    ("ends", "RSD, checker + noise"): "RSD, checker + noise",
    ("ends", "judge, checker + noise"): "judge, checker + noise",
    ("scores", "target log-probability"): "target log-probability, 75% accepted",
    ("scores", "draft log-probability"): "draft log-probability, 75% accepted",
    ("scores", "draft ensemble 0.3"): "the paper's score, 75% accepted",
    ("calibrated", "target log-probability, on-policy 0.05"): "target log-probability, alpha .05",
    ("calibrated", "draft log-probability, on-policy 0.05"): "draft log-probability, alpha .05",
    ("calibrated", "draft ensemble 0.3, on-policy 0.05"): "the paper's score, alpha .05",
}
HEADERS = ["policy", "accuracy", "by pair", "share", "accepted", "wrong among them", "over the target", "over random"]


def row(label: str, entry: dict[str, Any]) -> list[str]:
    """One policy as a line of the table."""
    wrong = [one for one in entry["wrong_among_accepted"] if one is not None]
    return [
        label,
        interval(entry["accuracy"]),
        ", ".join(f"{one:.3f}" for one in entry["accuracy_by_model"]),
        number(entry["target_share"]),
        number(entry["acceptance"]),
        number(sum(wrong) / len(wrong), 3) if wrong else "-",
        interval(entry["over_target"], sign=True),
        interval(entry["over_random"], sign=True),
    ]


def scatter(axes: Axes, entries: dict[str, dict[str, Any]]) -> None:
    """Accuracy by the target's share of the tokens."""
    for place, (label, entry) in enumerate(entries.items()):
        accuracy = entry["accuracy"]
        ends = [[accuracy["value"] - accuracy["low"]], [accuracy["high"] - accuracy["value"]]]
        shape = "oD^sv"[place // len(COLOURS)]
        colour = COLOURS[place % len(COLOURS)]
        axes.errorbar(
            entry["target_share"], accuracy["value"], yerr=ends, fmt=shape, color=colour, label=label, capsize=2
        )
    axes.set_xlabel("share of the tokens that the target decodes")
    axes.set_ylabel("accuracy")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7)


@figure("policies")
def policies() -> Figure:
    """Every policy on chains."""
    found = results("specguard_policies")["policies"]
    entries = {label: found[group][name] for (group, name), label in POLICIES.items()}
    rows = [row(label, entry) for label, entry in entries.items()]
    caption = "Policies on generated arithmetic: accuracy by the target's share of the tokens, 95% intervals"
    return Figure(caption, ("specguard_policies",), HEADERS, rows, lambda axes: scatter(axes, entries), (7.6, 4.0))


@figure("one-model")
def one_model() -> Figure:
    """One model in both roles."""
    found = results("specguard_policies")["policies"]["layerskip"]
    names = ["target alone", "draft alone", "random 0.7", "oracle", "target log-probability"]
    entries = {name: found[name] for name in names}
    rows = [row(name, entry) for name, entry in entries.items()]
    caption = "One model in both roles: two of four layers draft, one sampling seed"
    return Figure(caption, ("specguard_policies",), HEADERS, rows, lambda axes: scatter(axes, entries), (7.6, 3.0))


@figure("language-model")
def language_model() -> Figure:
    """SmolLM2-135M as the target, a truncated copy as the draft."""
    found = results("specguard_language_model")["policies"]
    entries = {name: entry for group in ("ends", "scores", "calibrated") for name, entry in found[group].items()}
    rows = [row(name, entry) for name, entry in entries.items()]
    caption = "SmolLM2-135M, fine-tuned, and its first eight layers as the draft: chains in words, one sampling seed"
    return Figure(
        caption, ("specguard_language_model",), HEADERS, rows, lambda axes: scatter(axes, entries), (7.6, 4.0)
    )


@figure("sweeps")
def sweeps() -> Figure:
    """Candidates, selectors, fallbacks and forms of grounding."""
    found = results("specguard_policies")["policies"]
    rows = [row(name, entry) for name, entry in found["sweeps"].items()]
    rows += [row(name, entry) for name, entry in found["scores"].items() if "ensemble" in name]
    caption = "Candidates, selectors, fallbacks, weights and forms of grounding, one sampling seed"
    return Figure(caption, ("specguard_policies",), HEADERS, rows)


@figure("risk")
def risk() -> Figure:
    """Realised against asked risk."""
    found = results("specguard_policies")["realised_risk"]
    rows = []
    for name, entry in found.items():
        by_pair = ", ".join(f"{one['rate']:.3f}" for one in entry["by_model"])
        thresholds = ", ".join(f"{one['threshold']:.4g}" for one in entry["by_model"])
        kept = "yes" if entry["within"] else "no"
        rows.append([name, f"{entry['alpha']:g}", interval(entry["realised"]), kept, by_pair, thresholds])

    def plot(axes: Axes) -> None:
        shown = {"realised risk": [entry["realised"]["value"] for entry in found.values()]}
        ends = {"realised risk": [(entry["realised"]["low"], entry["realised"]["high"]) for entry in found.values()]}
        bars(axes, list(found), shown, errors=ends, unit="accepted and wrong")
        for place, entry in enumerate(found.values()):
            axes.plot([entry["alpha"]] * 2, [place - 0.4, place + 0.4], color="#b23a48", linewidth=2)

    headers = ["threshold for", "alpha", "realised", "alpha not exceeded (95%)", "by pair", "thresholds"]
    caption = "Realised risk of calibrated thresholds; the red marks are the alpha that was asked for"
    return Figure(caption, ("specguard_policies",), headers, rows, plot, (7.2, 3.4))


@figure("signals")
def signals() -> Figure:
    """AUROC of the signals at fixed length."""
    pairs = results("specguard_policies")["signals"]
    names = [one["name"] for one in pairs[0]["signals"]]
    by_pair = [{one["name"]: one["fixed_length"] for one in pair["signals"]} for pair in pairs]
    rows = [[name, *(interval(pair[name], 2) for pair in by_pair)] for name in names]
    for index, extra in enumerate(pairs[0]["increments"]):
        added = [
            interval({"value": p["increments"][index]["difference"], **p["increments"][index]}, sign=True)
            for p in pairs
        ]
        rows.append([f"{extra['extra']} added to {extra['base']}", *added])

    def plot(axes: Axes) -> None:
        shown = {f"pair {index + 1}": [pair[name]["value"] for name in names] for index, pair in enumerate(by_pair)}
        bars(axes, names, shown, unit="AUROC for right steps, at fixed length", reference=0.5)

    headers = ["signal", *(f"pair {index + 1}" for index in range(len(pairs)))]
    return Figure(
        "Do the signals tell right steps from wrong ones?", ("specguard_policies",), headers, rows, plot, (7.2, 4.0)
    )


@figure("models")
def models() -> Figure:
    """The models of the experiment."""
    found = results("specguard_models")["models"]
    rows = [
        [
            f"{one['role']}, seed {one['seed']}",
            f"{one['parameters']:,}",
            number(one["right"], 3),
            number(one["answers"], 3),
            "yes" if one["passes_gate"] else "no",
        ]
        for one in found
    ]
    headers = ["model", "parameters", "greedy steps right", "answers right", "passes its gate"]
    return Figure("The models of the experiment", ("specguard_models",), headers, rows)


@figure("candidates")
def candidates() -> Figure:
    """The cost of candidates."""
    found = results("specguard_candidates")["candidates"]
    over = found["over_one_candidate"]
    rows = [[name, quartiles(entry, digits=2)] for name, entry in over.items()]
    peers = found["transformers_over_ours"]
    rows += [[f"Transformers over telltale: {name}", quartiles(entry, digits=2)] for name, entry in peers.items()]

    def plot(axes: Axes) -> None:
        bars(
            axes,
            list(over),
            {"cost": [entry["cpu"] for entry in over.values()]},
            unit="cost over one candidate",
            reference=1.0,
        )

    caption = "k candidates of a step behind 512 tokens, over one candidate"
    return Figure(caption, ("specguard_candidates",), ["what", "ratio (quartiles)"], rows, plot, (7.2, 2.4))


@figure("grounding-cost")
def grounding_cost() -> Figure:
    """The cost of reading grounding."""
    rows = []
    for case in results("specguard_candidates")["scoring"]:
        for backend in case["grounding_over_plain"]:
            cells = [
                quartiles(case[key][backend], digits=2) for key in ("grounding_over_plain", "run_again_over_grounding")
            ]
            rows.append(
                [f"{backend}, behind {case['prefix']:,} tokens", *cells, f"{case['largest_difference'][backend]:.1e}"]
            )
    headers = ["backend", "with grounding over without", "eager attentions over ours", "largest difference"]
    return Figure("What reading the grounding costs in a scoring pass", ("specguard_candidates",), headers, rows)


@figure("limits")
def limits() -> Figure:
    """What holds exactly."""
    found = results("specguard_limits")
    rows = [
        [
            f"greedy, {family}",
            f"{len(entry['differing'])} settings",
            f"{sum(entry['differing'].values())} sequences differ",
        ]
        for family, entry in found["greedy"].items()
    ]
    rows += [
        [f"sampled, {name}", "chi-squared test", f"p = {value:.2f}"] for name, value in found["law_p_values"].items()
    ]
    worst = max(found["grounding_largest_difference"].values())
    rows.append(
        [
            "grounding against the dense rollout",
            f"{len(found['grounding_largest_difference'])} settings",
            f"{worst:.1e}",
        ]
    )
    return Figure("What holds exactly", ("specguard_limits",), ["what", "over", "found"], rows)


@figure("gsm8k")
def gsm8k() -> Figure:
    """The arithmetic checker on public solutions."""
    found = results("gsm8k_realism")
    rows = []
    for name in ("a wrong step", "an untraced operand", "a wrong step or an untraced operand"):
        entry = found["model_solutions"][name]
        suspect = entry["suspect_and_incorrect"] + entry["suspect_and_correct"]
        low, high = entry["odds_ratio_interval"]
        odds = f"{entry['odds_ratio_of_a_wrong_answer']:.1f} [{low:.1f}, {high:.1f}]"
        rows.append(
            [name, str(suspect), f"{entry['correct_if_suspect']:.1%}", f"{entry['correct_if_clean']:.1%}", odds]
        )
    headers = ["the checker finds", "solutions", "right if found", "right if not", "odds ratio of a wrong answer"]
    caption = f"{found['model_solutions']['solutions']:,} published solutions of four models to GSM8K's test problems"
    return Figure(caption, ("gsm8k_realism",), headers, rows)


@figure("guard-monitor")
def guard_monitor() -> Figure:
    """False alarms of a guard under watch, and the audits that a drift takes."""
    found = results("guard_monitor")
    rows = []
    for entry in found["null"]:
        words = f"kept ({entry['streams']}), limit {entry['limit']:.0%}"
        rows.append([words, f"{entry['alarms']:.2%} [{entry['low']:.2%}, {entry['high']:.2%}]", "-"])
    for entry in found["drift"]:
        words = (
            f"{found['good']:.0%} for {entry['before']:,} audits, then {found['bad']:.0%}; limit {entry['limit']:.0%}"
        )
        low, high = entry["quartiles"]
        delay = f"{entry['median']:,.0f} ({low:,.0f} to {high:,.0f})"
        rows.append([words, f"{entry['false']:.2%}", delay])

    def plot(axes: Axes) -> None:
        series = {}
        for limit in sorted({entry["limit"] for entry in found["drift"]}):
            own = [entry for entry in found["drift"] if entry["limit"] == limit]
            series[f"limit {limit:.0%}"] = ([one["before"] for one in own], [one["median"] for one in own])
        lines(axes, series, x="audits before the rate rises from 3% to 10%", y="median audits to the alarm", marker="o")

    headers = ["the rate of wrong steps", "alarms while the promise holds", "audits to the alarm, median (quartiles)"]
    caption = f"{found['streams']:,} streams that keep the promise, watched for {found['length']:,} audits each"
    return Figure(caption, ("guard_monitor",), headers, rows, plot, (7.2, 3.2))


@figure("server-load")
def server_load() -> Figure:
    """The server with sixteen clients."""
    found = {entry["served"]["decode"]: entry for entry in results("server_load")["workloads"].values()}
    rows = []
    for name, entry in found.items():
        alone, busy = entry["in_turn"], entry["at_once"]
        seconds = [
            f"{way['first_step_ms']['p50'] / 1e3:.2f} / {way['first_step_ms']['p95'] / 1e3:.2f}"
            for way in (busy, alone)
        ]
        speed = [f"{alone['tokens_per_second']:.0f}", f"{busy['tokens_per_second']:.0f}"]
        rows.append([name, *speed, f"{entry['throughput_at_once_over_in_turn']:.1f}x", *seconds])

    def plot(axes: Axes) -> None:
        ways = {"one client at a time": "in_turn", "16 clients at once": "at_once"}
        shown = {label: [entry[key]["tokens_per_second"] for entry in found.values()] for label, key in ways.items()}
        bars(axes, list(found), shown, unit="tokens per second")

    headers = [
        "decode",
        "tokens/s, in turn",
        "at once",
        "ratio",
        "first step at once, p50 / p95, s",
        "alone, p50 / p95, s",
    ]
    caption = "The 44M preset (24 layers, float32, one thread), streaming clients"
    return Figure(caption, ("server_load",), headers, rows, plot)


@figure("server-lm-eval")
def server_lm_eval() -> Figure:
    """Log-likelihoods of lm-evaluation-harness over HTTP beside Transformers' own."""
    found = results("server_lm_eval")
    rows = [
        [
            name,
            f"{entry['largest_difference']:.1e}",
            f"{entry['largest_difference_per_token']:.1e}",
            f"{entry['greedy_agrees']} of {found['pairs']}",
        ]
        for name, entry in found["decodes"].items()
    ]
    headers = ["decode", "largest difference, nats", "per token", "same verdict on greedy"]
    caption = f"lm-evaluation-harness {found['lm_eval']}, local-completions, {found['pairs']} pairs of texts, float32"
    return Figure(caption, ("server_lm_eval",), headers, rows)


@figure("server-memory")
def server_memory() -> Figure:
    """Memory after killed clients."""
    rows = []
    for name, entry in results("server_load")["workloads"].items():
        kills = entry["kills"]
        growth = [
            f"{kills[key]:.1f}" for key in ("rss_growth_after_the_first_tenth_mb", "rss_growth_over_the_second_half_mb")
        ]
        left = f"{kills['slots_in_use']} / {kills['branches_in_use']}"
        rows.append([name, left, "yes" if kills["cache_bytes_as_before"] else "no", *growth])
    headers = [
        "server",
        "slots / branches in use",
        "caches as before",
        "growth after 10 kills, MB",
        "after 50 kills, MB",
    ]
    return Figure("After a hundred clients that were killed in mid-stream", ("server_load",), headers, rows)
