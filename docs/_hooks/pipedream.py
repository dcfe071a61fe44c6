"""Figures of PipeDream."""

from __future__ import annotations

import statistics
from collections import Counter

from drawing import COLOURS, Figure, bars, figure, lines, number, results
from matplotlib.axes import Axes


@figure("bubbles")
def bubbles() -> Figure:
    """Schedules against torch's."""
    found = results("pipeline_bubbles")
    settings = {
        "emulated, 4 stages, 4 minibatches": found["emulated_compute"]["cases"]["M=4"],
        "real, 2 stages, 2 minibatches": found["real_compute"]["cases"]["M=2"],
        "real, 2 stages, 4 minibatches": found["real_compute"]["cases"]["M=4"],
    }
    policies = ["stash", "2bw", "flush", "torch 1F1B", "torch GPipe"]

    def cell(entry: list[float]) -> str:
        low, middle, high = entry
        return f"{middle:.2f} ({low:.2f} to {high:.2f})"

    rows = []
    for policy in policies:
        walls = [cell(case[policy]["wall_over_torch 1F1B"]) for case in settings.values()]
        cpu = cell(settings["real, 2 stages, 2 minibatches"][policy]["cpu_over_torch 1F1B"])
        rows.append([policy, *walls, cpu])

    def plot(axes: Axes) -> None:
        shown = {
            name: [case[policy]["wall_over_torch 1F1B"][1] for policy in policies] for name, case in settings.items()
        }
        bars(axes, policies, shown, unit="time over torch's Schedule1F1B", reference=1.0)

    headers = ["policy", *settings, "CPU time, real, 2 minibatches"]
    caption = "Time over torch's Schedule1F1B on the same stages and minibatches: median (quartiles)"
    return Figure(caption, ("pipeline_bubbles",), headers, rows, plot, (7.2, 3.6))


@figure("simulator")
def simulator() -> Figure:
    """Predicted against measured time."""
    found = results("pipeline_simulator")["rows"]
    rows = [
        [
            r["compute"],
            r["link"],
            r["plan"],
            r["policy"],
            number(r["measured_s"]),
            number(r["predicted_s"]),
            f"{r['error']:.1%}",
        ]
        for r in found
    ]

    def plot(axes: Axes) -> None:
        for place, compute in enumerate(dict.fromkeys(row["compute"] for row in found)):
            some = [row for row in found if row["compute"] == compute]
            axes.plot(
                [row["measured_s"] for row in some],
                [row["predicted_s"] for row in some],
                "o",
                color=COLOURS[place],
                label=f"{compute} compute",
            )
        top = max(row["measured_s"] for row in found) * 1.05
        axes.plot([0, top], [0, top], color="#444", linewidth=0.8, linestyle="--")
        axes.set_xlabel("measured, seconds")
        axes.set_ylabel("simulated, seconds")
        axes.legend()

    headers = ["compute", "link", "plan", "policy", "measured, s", "simulated, s", "error"]
    return Figure("Simulated against measured time of 36 minibatches", ("pipeline_simulator",), headers, rows, plot)


@figure("planner")
def planner() -> Figure:
    """Plans for the official profiles."""
    found = results("pipeline_planner")["plans"]
    rows = [
        [p["profile"], p["cost_model"], p["plan"], p["published"], "yes" if p["as_published"] else "no"]
        for p in found
        if p.get("published") and p["topology"] == "16 at 10 Gbit/s"
    ]
    headers = ["profile", "cost model", "plan here", "published", "equal"]
    return Figure("Plans for 16 workers at 10 Gbit/s", ("pipeline_planner",), headers, rows)


@figure("regret")
def regret() -> Figure:
    """The default plan against the best other plan that was found."""
    found = results("pipeline_regret")
    rows = [
        [
            row["profile"],
            row["topology"],
            row["plan"],
            f"{row['milliseconds']:.2f}",
            row["best"],
            f"{row['best_milliseconds']:.2f}",
            f"{row['regret']:.3f}",
            f"{row['planning_cpu_seconds']:.1f}",
        ]
        for row in found["rows"]
    ]
    headers = ["profile", "workers", "default plan", "ms", "best found", "ms", "regret", "planning, CPU s"]
    chance = (
        f", {found['random_plans']} random ones and the best two of these improved" if found["random_plans"] else ""
    )
    caption = f"The default plan and the fastest of all cost models' plans{chance}, by simulation"
    return Figure(caption, ("pipeline_regret",), headers, rows)


@figure("planner-time")
def planner_time() -> Figure:
    """CPU time of the planner against the official program."""
    found = [one for one in results("pipeline_planner")["official"] if "times_faster" in one]
    groups = [f"{one['profile']}, {'x'.join(map(str, one['machines']))} workers" for one in found]
    rows = [
        [
            name,
            f"{one['telltale_cpu_seconds']:.2f}",
            f"{one['official_cpu_seconds']:.2f}",
            f"{one['times_faster']:.1f}x",
        ]
        for name, one in zip(groups, found, strict=True)
    ]
    large = results("pipeline_planner")["thousand_layers"]
    rows += [[f"1,000 layers, {one['cost_model']}", f"{one['partition_cpu_seconds']:.2f}", "-", "-"] for one in large]

    def plot(axes: Axes) -> None:
        shown = {
            "telltale": [one["telltale_cpu_seconds"] for one in found],
            "official program": [one["official_cpu_seconds"] for one in found],
        }
        bars(axes, groups, shown, unit="CPU seconds", log=True)

    caption = "CPU time of planning under the official cost model; the objectives are equal"
    return Figure(caption, ("pipeline_planner",), ["profile", "telltale, s", "official, s", "ratio"], rows, plot)


@figure("bytes")
def sent_bytes() -> Figure:
    """Bytes on the wire."""
    found = results("pipeline_bytes")["results"]
    labels = {"pipeline": "pipeline, two stages", "ddp": "DistributedDataParallel"}
    rows = [
        [
            label,
            f"{found[key]['bytes_per_sample']:,.0f}",
            f"{found[key]['theory_bytes_per_sample']:,.0f}",
            number(found[key]["seconds"][0], 1),
            number(found[key]["final_accuracy"][0], 3),
        ]
        for key, label in labels.items()
    ]

    def plot(axes: Axes) -> None:
        shown = {"bytes per sample": [found[key]["bytes_per_sample"] for key in labels]}
        bars(axes, list(labels.values()), shown, unit="bytes per sample", log=True)

    headers = ["way", "bytes per sample", "theory", "264 updates, s", "accuracy"]
    caption = "Bytes that the kernel counted, loopback limited to 200 Mbit/s"
    return Figure(caption, ("pipeline_bytes",), headers, rows, plot, (7.2, 1.7))


def convergence(task: str, caption: str) -> Figure:
    """Every optimizer and policy of one task."""
    found = results("pipeline_convergence")[task]["rows"]
    policies = list(dict.fromkeys(row["policy"] for row in found))
    settings = list(dict.fromkeys((row["optimizer"], row["stages"]) for row in found))
    digits = 3 if task == "digits" else 2

    def cell(setting: tuple[str, int], policy: str) -> str:
        for row in found:
            if (row["optimizer"], row["stages"], row["policy"]) == (*setting, policy):
                if row["metric_mean"] is None:
                    return "all diverge"
                lost = f", {row['diverged']} of {row['seeds']} diverge" if row["diverged"] else ""
                return f"{row['metric_mean']:.{digits}f} ± {row['metric_sd'] or 0:.{digits}f}{lost}"
        return "-"

    names = [f"{optimizer}, {stages} stages" for optimizer, stages in settings]
    rows = [[name, *(cell(s, p) for p in policies)] for name, s in zip(names, settings, strict=True)]

    def plot(axes: Axes) -> None:
        shown = {}
        for policy in policies:
            values = {(r["optimizer"], r["stages"]): r["metric_mean"] for r in found if r["policy"] == policy}
            shown[policy] = [values.get(setting) or 0 for setting in settings]
        bars(axes, names, shown, unit="test accuracy" if task == "digits" else "held-out loss, nats")

    return Figure(caption, ("pipeline_convergence",), ["optimizer", *policies], rows, plot, (7.2, 4.6))


@figure("staleness-digits")
def staleness_digits() -> Figure:
    """Delayed updates on digits."""
    return convergence(
        "digits",
        "Test accuracy on digits, 5 seeds: what delayed updates do (larger is better; no bar: every seed diverged)",
    )


@figure("staleness-characters")
def staleness_characters() -> Figure:
    """Delayed updates on characters."""
    return convergence("characters", "Held-out loss of a character model, 3 seeds (smaller is better)")


@figure("pipeline-llama")
def pipeline_llama() -> Figure:
    """A 44M model on two ranks."""
    curves = results("pipeline_llama")["curves"]
    rows = [
        [k, number(c["seconds"], 1), f"{c['speed_up']:.2f}x", number(c["mean_loss_per_tenth"][-1])]
        for k, c in curves.items()
    ]

    def plot(axes: Axes) -> None:
        shown = {name: (range(1, 13), curve["mean_loss_per_tenth"]) for name, curve in curves.items()}
        lines(axes, shown, x="twelfths of the run", y="training loss, nats")

    headers = ["run", "seconds", "speed", "mean loss of the last minibatches"]
    return Figure("A 45.6M-parameter Llama in two stages", ("pipeline_llama",), headers, rows, plot)


@figure("equality")
def equality() -> Figure:
    """Bit equality with the reference."""
    found = results("pipeline_equality")["rows"]
    counts = Counter((row["policy"], row["equal"]) for row in found)
    policies = sorted({row["policy"] for row in found})
    rows = [
        [policy, str(counts[policy, True] + counts[policy, False]), str(counts[policy, False])] for policy in policies
    ]
    plans = ", ".join(sorted({row["plan"] for row in found}))
    headers = ["policy", "configurations", "weights or losses that differ"]
    caption = f"Distributed training against the one-process reference, to the last bit; plans {plans}"
    return Figure(caption, ("pipeline_equality",), headers, rows)


@figure("versioning")
def versioning() -> Figure:
    """What keeping versions costs."""
    found = results("pipeline_bubbles")["versioning"]
    rows = [
        [
            name,
            number(statistics.median(entry["cpu_s_all_ranks"])),
            number(statistics.median(entry["cpu_over_one process"]), 3),
            number(statistics.median(entry["wall_over_one process"]), 3),
        ]
        for name, entry in found.items()
    ]
    headers = ["run", "CPU seconds", "CPU over one process", "time over one process"]
    return Figure("What the runtime and two weight versions cost", ("pipeline_bubbles",), headers, rows)


@figure("pipeline-memory")
def memory() -> Figure:
    """Peak memory of the ranks that read their own stage alone."""
    found = results("pipeline_memory")

    def megabytes(size: float) -> str:
        return f"{size / 1e6:,.0f}"

    rows = []
    for name, run in found["runs"].items():
        if "ranks" not in run:
            rows.append([name, megabytes(found["limit_bytes"]), "", f"refused: {run['refused']}"])
            continue
        limit = "none" if "no limit" in name else megabytes(found["limit_bytes"])
        weights = ", ".join(megabytes(rank["stage_weight_bytes"]) for rank in run["ranks"])
        rows.append([name, limit, weights, ", ".join(megabytes(rank["peak_bytes"]) for rank in run["ranks"])])
    caption = (
        f"{found['parameters'] / 1e6:.0f} million parameters, {megabytes(found['weight_bytes'])} MB of weights, "
        f"{megabytes(found['training_state_bytes'])} MB with gradients and AdamW's moments; a rank "
        f"has {megabytes(found['bytes_of_a_rank_anyway'])} MB when it trains next to nothing"
    )
    headers = ["what a rank reads", "limit MB", "weights of the stages, MB", "peak resident MB of each rank"]
    return Figure(caption, ("pipeline_memory",), headers, rows)


@figure("order")
def order() -> Figure:
    """Plans that were run, in the order of their predictions."""
    found = results("pipeline_order")["links"]
    rows = []
    for link, result in found.items():
        for place, row in enumerate(result["rows"]):
            name = f"{row['plan']} {row['policy']}" + (f", cut behind layer {row['cuts'][0]}" if row["cuts"] else "")
            chosen = " (the planner's)" if place == 0 else ""
            times = [f"{row['predicted_ms']:.1f}", f"{row['measured_ms']:.1f}", f"{row['error']:+.1%}"]
            rows.append([link, name + chosen, *times])
    kept = ", ".join(f"{link}: {result['in_order']} of {result['pairs']}" for link, result in found.items())
    caption = f"Milliseconds per minibatch. Pairs predicted more than 5% apart that were measured in that order: {kept}"
    return Figure(caption, ("pipeline_order",), ["link", "plan", "predicted", "measured", "error"], rows)
