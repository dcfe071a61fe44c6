"""Figures of the Sharpness Dimension and the edge of stability."""

from __future__ import annotations

import statistics
from typing import Any

from drawing import Figure, bars, figure, interval, lines, number, results
from matplotlib.axes import Axes


@figure("edges")
def edges() -> Figure:
    """The ratio along training for every optimizer."""
    found = results("sharpness_edges")["runs"]
    names = list(dict.fromkeys(run["run"] for run in found))
    rows = []
    for name in names:
        some = [run for run in found if run["run"] == name]
        thirds = [run["last_third"] for run in some]
        low, high = min(third["min"] for third in thirds), max(third["max"] for third in thirds)
        middle = statistics.median(third["median"] for third in thirds)
        first = ", ".join("-" if run["first_at_edge"] is None else str(run["first_at_edge"]) for run in some)
        rows.append([name, some[0]["expected"], f"{low:.2f} to {high:.2f}", number(middle), first])

    def plot(axes: Axes) -> None:
        shown = {
            run["run"]: [*zip(*[point[:2] for point in run["timeline"]], strict=True)]
            for run in found
            if not run["seed"]
        }
        lines(axes, shown, x="step", y="ratio to the edge", reference=1.0)
        axes.legend(loc="lower right", fontsize=7)

    headers = [
        "optimizer",
        "expected",
        "ratio, last third, all seeds",
        "median of medians",
        "first reading >= .9, by seed",
    ]
    caption = "The ratio along full-batch training, seed 0; the dashed line is the edge"
    return Figure(caption, ("sharpness_edges",), headers, rows, plot, (7.2, 3.8))


@figure("estimator")
def estimator() -> Figure:
    """Errors of the estimators of the dimension."""
    summary = results("sharpness_estimator")["summary"]
    rows = [
        [name, number(entry["worst_percent_of_N"]), number(entry["root_mean_square_percent_of_N"])]
        for name, entry in summary.items()
    ]

    def plot(axes: Axes) -> None:
        shown = {"worst error": [entry["worst_percent_of_N"] for entry in summary.values()]}
        bars(axes, list(summary), shown, unit="worst error, % of N", log=True)

    caption = "Worst error of estimates of 750 products against exact spectra of 16 trained nets"
    headers = ["estimator", "worst error, % of N", "root mean square, % of N"]
    return Figure(caption, ("sharpness_estimator",), headers, rows, plot, (7.2, 3.6))


@figure("coverage")
def coverage() -> Figure:
    """How often the interval holds the population's value."""
    found = results("sharpness_coverage")
    rows = []
    for net in found["networks"]:
        name = f"rate {net['rate']:g}, batch {net['batch_size']}, N = {net['parameters']}"
        for count, entry in net["by_minibatches"].items():
            rows.append(
                [name, number(net["truth"], 1), count, f"{entry['coverage']:.1%}", number(entry["median_width"], 1)]
            )
    caption = (
        f"How often the {found['nominal']:.0%} interval holds the dimension of {found['population']} minibatches, "
        f"{found['repeats']} repeats"
    )
    return Figure(
        caption, ("sharpness_coverage",), ["net", "dimension", "minibatches", "coverage", "median width"], rows
    )


@figure("closed-forms")
def closed_forms() -> Figure:
    """What GELU's kept second derivative saves."""
    found = results("sharpness_closed_forms")
    rows = [[name, number(entry["median"]), number(entry["of_minima"])] for name, entry in found["models"].items()]
    headers = ["network of GELUs", "time of a product, median", "of the least times"]
    caption = "CPU time of a product with the kept second derivative over that with PyTorch's own"
    return Figure(caption, ("sharpness_closed_forms",), headers, rows)


@figure("critical")
def critical() -> Figure:
    """The forward-only channel beside Lanczos."""
    found = results("sharpness_critical")
    rows = []
    for name, row in found["optimizers"].items():
        rank, reached = row["spearman"], row["spearman_of_runs_that_go_there"]
        rows.append(
            [
                name,
                f"{number(rank)} ({row['readings_before']})" if rank is not None else "-",
                number(reached) if reached is not None else "-",
                number(row["plateau_median"], 3),
                f"{row['more_readings']:.1f}",
            ]
        )

    def plot(axes: Axes) -> None:
        shown = {}
        for run in found["runs"]:
            if run["seed"] == found["seeds"][0] and run["at_edge"]:
                steps, _, values = zip(*run["pairs"], strict=True)
                shown[run["run"]] = (steps, values)
        lines(axes, shown, x="step", y="ratio from forward passes alone", reference=1.0)
        axes.legend(loc="lower right", fontsize=7)

    headers = [
        "optimizer",
        "Spearman before .9, pooled (readings)",
        "of the runs that go to the edge",
        "median of |ratio - 1| on the plateau",
        "readings for a look's CPU time",
    ]
    caption = f"The forward-only channel on the edge runs, seeds {', '.join(map(str, found['seeds']))}"
    return Figure(caption, ("sharpness_critical",), headers, rows, plot, (7.2, 3.8))


@figure("where")
def where() -> Figure:
    """How often the layer of a tenfold rate is named."""
    found = results("sharpness_where")
    rows = []
    for kind in dict.fromkeys(run["optimizer"] for run in found["runs"]):
        some = [run for run in found["runs"] if run["optimizer"] == kind]
        first = sum(run["named"][0] == run["faster"] for run in some)
        shares = [run["shares"][1].get(run["faster"], 0.0) for run in some]
        rows.append(
            [
                kind,
                str(len(some)),
                str(first),
                str(sum(run["found"] for run in some)),
                f"{statistics.median(shares):.0%}",
            ]
        )
    headers = ["optimizer", "runs", "named at reading 1", "within 2 readings", "median share at reading 2"]
    return Figure(
        "The layer that trains at ten times the rate, by its share of the steepest direction",
        ("sharpness_where",),
        headers,
        rows,
    )


MEASURES = {
    "sd_rank": "SD (per rank)",
    "trace": "trace",
    "lambda_max": "lambda_max",
    "minus_batch_size": "control: minus batch size",
    "null_space": "control: null space",
    "rate_over_batch": "control: rate / batch size",
    "weight_norm": "control: weight norm",
    "train_loss": "control: train loss",
    "ph_dimension": "persistence dimension",
    "sd_full": "SD, full-batch Jacobian",
}


def sweep(gap: str) -> Figure:
    """Kendall's tau of every measure with a gap, by filter on train accuracy."""
    filters = results("sharpness_sweep")["filters"]

    def tau(name: str, measure: str) -> dict[str, float] | None:
        return next((r["tau"] for r in filters[name]["rows"] if (r["measure"], r["gap"]) == (measure, gap)), None)

    names = list(filters)
    rows = []
    for measure, label in MEASURES.items():
        found = [tau(name, measure) for name in names]
        rows.append([label, *("-" if one is None else interval(one, 2, sign=True) for one in found)])

    def plot(axes: Axes) -> None:
        found: dict[str, Any] = {label: tau(">= .9", measure) for measure, label in MEASURES.items()}
        kept = {label: one for label, one in found.items() if one}
        shown = {"tau": [one["value"] for one in kept.values()]}
        ends = {"tau": [(one["low"], one["high"]) for one in kept.values()]}
        bars(axes, list(kept), shown, errors=ends, unit=f"Kendall's tau with the {gap} gap", reference=0.0)

    headers = ["measure", *(f"{name} ({filters[name]['passed']} nets)" for name in names)]
    caption = f"Kendall's tau with the {gap} gap, nets of train accuracy .9 or more: mean over seeds, 95% interval"
    return Figure(caption, ("sharpness_sweep",), headers, rows, plot, (7.2, 3.6))


@figure("sweep-loss")
def sweep_loss() -> Figure:
    """Ordering of the loss gap."""
    return sweep("loss")


@figure("sweep-accuracy")
def sweep_accuracy() -> Figure:
    """Ordering of the accuracy gap."""
    return sweep("accuracy")


@figure("sweep-differences")
def sweep_differences() -> Figure:
    """SD against each competitor."""
    filters = results("sharpness_sweep")["filters"]
    rows = []
    for gap in ("loss", "accuracy"):
        for what in filters["all"]["differences"][gap]:
            cells = (filters[name]["differences"][gap].get(what) for name in filters)
            rows.append([f"{gap} gap: {what}", *("-" if one is None else interval(one, 2, sign=True) for one in cells)])
    for gap in ("loss", "accuracy"):
        for held in ("minus_batch_size", "null_space"):
            cells = []
            for name in filters:
                row = next(r for r in filters[name]["rows"] if (r["measure"], r["gap"]) == ("sd_rank", gap))
                one = row["given"].get(held)
                cells.append("-" if one is None else interval(one, 2, sign=True))
            rows.append([f"{gap} gap: tau given {held}", *cells])
    caption = "SD per rank against its competitors, and with one control held fixed"
    return Figure(caption, ("sharpness_sweep",), ["comparison", *filters], rows)


@figure("grokking")
def grokking() -> Figure:
    """Kendall's tau over time in grokking."""
    found = results("sharpness_grokking")["mean_tau"]
    labels = {
        "sd_gd": "SD, the paper's Jacobian",
        "sd_gd_decay": "SD with decay",
        "sd_optimizer": "SD of the optimizer",
        "lambda_max": "lambda_max",
        "trace": "trace",
        "weight_norm": "weight norm",
        "train_loss": "train loss",
        "minus_step": "control: minus step",
    }
    wanted = [("all", "accuracy"), ("all", "loss"), ("fitted", "accuracy"), ("fitted", "loss")]
    rows = [[label, *(f"{found[part][key][gap]:+.2f}" for part, gap in wanted)] for key, label in labels.items()]

    def plot(axes: Axes) -> None:
        shown = {f"{gap} gap": [found["all"][key][gap] for key in labels] for gap in ("accuracy", "loss")}
        bars(axes, list(labels.values()), shown, unit="Kendall's tau over time")

    headers = ["measure", *(f"{gap} gap, {part}" for part, gap in wanted)]
    caption = "Kendall's tau with the gap over the checkpoints of a run, mean of three seeds"
    return Figure(caption, ("sharpness_grokking",), headers, rows, plot, (7.2, 3.6))


@figure("lanczos-speed")
def lanczos_speed() -> Figure:
    """CPU time against two libraries."""
    models = results("sharpness_speed")["models"]
    rows, groups = [], []
    series: dict[str, list[float]] = {}
    for name, model in models.items():
        groups.append(f"{name}, {model['parameters']:,} parameters")
        cells = []
        for peer, entry in model["ratios"].items():
            series.setdefault(peer, []).append(entry["median"])
            cells.append(f"{entry['median']:.3f} ({entry['q1']:.3f} to {entry['q3']:.3f})")
        rows.append([groups[-1], str(model["steps"]), *cells])

    def plot(axes: Axes) -> None:
        bars(axes, groups, series, unit="CPU time of telltale over theirs", reference=1.0)

    headers = ["model", "steps", *series]
    return Figure(
        "CPU time of one Lanczos run over two libraries'", ("sharpness_speed",), headers, rows, plot, (7.2, 1.9)
    )


@figure("monitor-cost")
def monitor_cost() -> Figure:
    """What the monitor costs."""
    rows = []
    for name, work in results("sharpness_monitor_cost")["workloads"].items():
        extra, own = work["extra_cpu"], [one["share_of_training"] for one in work["own_account"]]
        rounds = ", ".join(f"{one:.1%}" for one in extra["rounds"])
        readings = str(work["own_account"][0]["readings"])
        equal = "yes" if work["bit_equal"] else "no"
        cells = [f"{extra['median']:.1%} ({rounds})", f"{min(own):.1%} to {max(own):.1%}", readings, equal]
        rows.append([f"{name}, {work['steps']:,} steps", *cells])
    headers = ["training", "extra CPU time, median (rounds)", "by its own account", "readings", "weights bit-equal"]
    return Figure("What the monitor costs at the default budget of 5%", ("sharpness_monitor_cost",), headers, rows)


@figure("layerskip-run")
def layerskip_run() -> Figure:
    """The edge along a LayerSkip run."""
    arms = {
        "recipe": results("sharpness_layerskip")["arms"]["both"],
        "plain": results("sharpness_layerskip")["arms"]["none"],
    }
    rows = []
    for name, arm in arms.items():
        for entry in arm["dimensions"]:
            gd, near = entry["gd"], min(arm["edge"], key=lambda reading: abs(reading["step"] - entry["step"]))
            left = [gd["parameters"] - end for end in (gd["sd"], *reversed(gd["interval"]))]
            ratio = number(near["ratio"]) if near["step"] == entry["step"] else "-"
            controls = gd["controls"]
            cells = [ratio, number(controls["lambda_max"], 1), number(controls["trace"], 0)]
            rows.append([name, str(entry["step"]), *cells, f"{left[0]:.0f} [{left[1]:.0f}, {left[2]:.0f}]"])

    def plot(axes: Axes) -> None:
        shown = {
            name: ([reading["step"] for reading in arm["edge"]], [reading["ratio"] for reading in arm["edge"]])
            for name, arm in arms.items()
        }
        lines(axes, shown, x="step", y="ratio to AdamW's edge", marker=".", reference=1.0)

    headers = ["training", "step", "ratio", "lambda_max", "trace", "N - SD of I - rate H"]
    caption = "The ratio along 500 AdamW steps, with the LayerSkip recipe and without"
    return Figure(caption, ("sharpness_layerskip",), headers, rows, plot)


@figure("stale-weights")
def stale_weights() -> Figure:
    """The edge under stale weights."""
    found = results("sharpness_staleness")["rows"]
    stages = sorted({row["stages"] for row in found})
    rows = []
    for count in stages:
        some = [row for row in found if row["stages"] == count]
        medians = ", ".join(number(row["last_third"]["median"]) for row in some)
        low = min(row["last_third"]["low"] for row in some)
        high = max(row["last_third"]["high"] for row in some)
        loss = ", ".join(number(row["loss"], 4) for row in some)
        dimension = ", ".join(f"{row['sd']:,.0f}" for row in some)
        rows.append([str(count), medians, f"{low:.2f} to {high:.2f}", loss, dimension])

    def plot(axes: Axes) -> None:
        shown = {
            f"{row['stages']} stage{'s' * (row['stages'] > 1)}": (row["steps"], row["ratios"])
            for row in found
            if row["seed"] == 0
        }
        lines(axes, shown, x="minibatch", y="ratio, threshold without delay", reference=1.0)

    headers = ["stages", "median, by seed", "range, all seeds", "loss, by seed", "SD of 4,522, by seed"]
    caption = "Gradient descent with stale weights, seed 0; the ratio uses the threshold without delay"
    return Figure(caption, ("sharpness_staleness",), headers, rows, plot)


@figure("analytic")
def analytic() -> Figure:
    """Checks against known values."""
    checks = results("sharpness_analytic")["checks"]
    rows = [[c["check"], f"{c['error']:.1e}", f"{c['tolerance']:.0e}", "yes" if c["passed"] else "no"] for c in checks]
    caption = "Checks against values that are known in closed form"
    return Figure(caption, ("sharpness_analytic",), ["check", "error", "tolerance", "passed"], rows)
