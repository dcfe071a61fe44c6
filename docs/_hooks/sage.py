"""Figures of SAGE: selection, bytes, faults, accuracy."""

from __future__ import annotations

from typing import Any

from drawing import Figure, bars, figure, lines, number, results
from matplotlib.axes import Axes


@figure("edge-selection")
def selection() -> Figure:
    """CPU time of every selector and of its peers."""
    found = results("edge_selection")
    contestants = found["contestants"]
    rows = [
        [
            name,
            number(entry["cpu_ms_per_token"]),
            f"{number(entry['cpu_ms_per_token_q1'])} to {number(entry['cpu_ms_per_token_q3'])}",
        ]
        for name, entry in contestants.items()
    ]
    rows += [
        [f"ratio: {name}", f"{number(entry['cpu'])}x", f"{number(entry['cpu_q1'])} to {number(entry['cpu_q3'])}"]
        for name, entry in found["ratios"].items()
    ]

    def plot(axes: Axes) -> None:
        bars(
            axes,
            list(contestants),
            {"CPU": [entry["cpu_ms_per_token"] for entry in contestants.values()]},
            unit="ms of CPU per image",
            log=True,
        )

    caption = f"Selecting {found['budget']} of {found['patches']} patches, one thread"
    return Figure(
        caption, ("edge_selection",), ["selector", "ms of CPU per image", "quartiles"], rows, plot, (7.2, 3.6)
    )


@figure("edge-bytes")
def distortion() -> Figure:
    """Bytes against distortion on photographs."""
    found = results("edge_bytes")
    rows = [
        [row["codec"], str(row["setting"]), row["patches"], f"{row['bytes']:.0f}", number(row["psnr"])]
        for row in found["distortion"]
    ]

    def plot(axes: Axes) -> None:
        shown: dict[str, Any] = {}
        for row in found["distortion"]:
            if row["patches"] in ("random", "whole") and row["psnr"] < 90:
                shown.setdefault(row["codec"], []).append((row["bytes"], row["psnr"]))
        lines(
            axes,
            {name: [*zip(*sorted(points), strict=True)] for name, points in shown.items()},
            x="bytes on the socket",
            y="PSNR, dB",
        )
        axes.set_xscale("log")
        axes.legend(fontsize=7)

    photographs = len(found["photographs"])
    caption = (
        f"{found['patches']} of {found['of']} patches of {photographs} photographs, 224 x 224; dB over the pixels sent"
    )
    return Figure(
        caption, ("edge_bytes",), ["codec", "setting", "patches", "bytes", "PSNR, dB"], rows, plot, (7.2, 3.6)
    )


@figure("edge-faults")
def faults() -> Figure:
    """Who answered, and when, under faults."""
    found = results("edge_faults")["faults"]
    rows = [
        [
            name,
            str(entry["requests"]),
            f"{entry['deadline_ms']:.0f}",
            str(entry["answered_in_time"]),
            f"{entry['latest_ms']:.0f}",
            str(entry["by_server"]),
        ]
        for name, entry in found.items()
        if "requests" in entry
    ]
    headers = [
        "fault",
        "requests",
        "deadline, ms",
        "answered by deadline + 50 ms",
        "latest, ms",
        "answered by the server",
    ]
    return Figure("Every request is answered", ("edge_faults",), headers, rows)


@figure("edge-overhead")
def overhead() -> Figure:
    """Loopback overhead and micro-batches."""
    found = results("edge_overhead")
    single, rates = found["loopback"], found["requests_per_second"]
    rows = [
        ["overhead of a request, p50", f"{number(single['overhead_p50_ms'])} ms"],
        ["overhead of a request, p95", f"{number(single['overhead_p95_ms'])} ms"],
        *(
            [f"requests per second, {name}", ", ".join(f"{value:.0f}" for value in values)]
            for name, values in rates.items()
        ),
        ["ratio, median of rounds", f"{number(found['ratio'])}x"],
    ]
    return Figure("The link on loopback, without the model's time", ("edge_overhead",), ["what", "measured"], rows)


def _tables() -> dict[str, Any]:
    found: dict[str, Any] = results("edge_accuracy")["data"]
    return found


@figure("edge-accuracy")
def accuracy() -> Figure:
    """The server's accuracy from what was sent, beside the edge's own, on every data set."""
    drawn = ("sage(cls_last, last)", "topk(cls_last)", "random", "audit's choice")
    rows, shown = [], {}
    headers: list[str] = []
    for data, found in _tables().items():
        table, pairs = found["accuracy_on_offloaded"], list(found["pairs"].values())
        budgets = list(next(iter(table.values())))
        headers = ["data", "contestant", *budgets]

        def mean(key: str, pairs: list[dict[str, Any]] = pairs) -> float:
            return float(sum(pair[key] for pair in pairs) / len(pairs))

        rows += [[data, name, *(number(entry[budget]) for budget in budgets)] for name, entry in table.items()]
        for told, key in (("edge alone", "edge_on_offloaded"), ("server, whole image", "server_whole_image")):
            rows.append([data, told, *[number(mean(key))] * len(budgets)])
        if "subsets" not in data:
            shown |= {
                f"{data}: {name}": ([int(budget) for budget in budgets], list(table[name].values())) for name in drawn
            }

    def plot(axes: Axes) -> None:
        lines(axes, shown, x="patches of 64", y="server's accuracy on offloaded images, %")
        axes.legend(fontsize=6)

    counts = "; ".join(f"{data}: {len(found['pairs'])} pairs" for data, found in _tables().items())
    caption = f"Accuracy (%) on the images that the gate offloads, by patches sent, means over pairs of edge and server ({counts})"
    return Figure(caption, ("edge_accuracy",), headers, rows, plot, (7.2, 4.2))


@figure("edge-claims")
def claims() -> Figure:
    """What holds and what does not, on every data set."""
    rows = []
    for data, found in _tables().items():
        for entry in found["claims"]:
            told = f"{entry['points']:+.2f} ± {entry['error']:.2f}"
            below = ", ".join(str(budget) for budget in entry["below_at"])
            rows.append([data, entry["claim"], told, f"{entry['z']:.1f}", entry["verdict"], below or "none"])
    headers = ["data", "claim", "difference, points", "z", "verdict", "below 0 at (patches)"]
    return Figure("Pooled over pairs and budgets; two standard errors decide", ("edge_accuracy",), headers, rows)


@figure("edge-differences")
def differences() -> Figure:
    """Paired differences by budget."""
    names = {
        "sage_minus_topk_same_importance": "SAGE - top-k (same importance)",
        "sage_minus_random": "SAGE - random",
        "sage_minus_uniform": "SAGE - uniform",
        "audits_choice_minus_sage": "audit's choice - SAGE",
        "fixed_default_minus_sage": "facility(rollout, patch) - SAGE",
        "server_alone_minus_edge": "server alone - edge",
        "fused_minus_edge": "fused - edge",
    }
    rows = []
    for data, found in _tables().items():
        budgets = list(found["fused_minus_edge"]["by_budget"])
        for key, told in names.items():
            by_budget = found[key]["by_budget"]
            cells = [by_budget.get(budget) for budget in budgets]
            rows.append([data, told, *(f"{c['points']:+.1f} ± {c['error']:.1f}" if c else "" for c in cells)])
    headers = ["data", "difference, points", *(f"{budget} patches" for budget in budgets)]
    return Figure("Paired differences; errors clustered by image", ("edge_accuracy",), headers, rows)


@figure("edge-audit")
def audit() -> Figure:
    """The audit's verdict for every pair."""
    rows = []
    for data, found in _tables().items():
        for name, pair in found["pairs"].items():
            told = [
                f"{entry['importance']}: {entry['top']:.0f} / {entry['random']:.0f} / {entry['bottom']:.0f}, {entry['verdict']}"
                for entry in pair["audit"]
            ]
            rows.append([data, name, "; ".join(told), pair["choice"]])
    headers = ["data", "pair", "importance: top / random / bottom %, verdict", "chosen"]
    return Figure("Deletion test at 30% of the patches", ("edge_accuracy",), headers, rows)


@figure("edge-whole-images")
def whole_images() -> Figure:
    """Patches and whole images on the byte axis, means over pairs."""
    rows = []
    for data, found in _tables().items():
        pairs = len(found["pairs"])
        rows += [
            [
                data,
                row["name"],
                str(row["budget"]),
                f"{row['bytes']:.0f}",
                number(row["server"]),
                f"{row['server_minus_edge']:+.1f}",
                f"{row['fused_minus_edge']:+.1f}",
            ]
            for row in found["bytes"]
            if row["pairs"] == pairs
        ]
    headers = ["data", "contestant", "patches or setting", "bytes", "server %", "server - edge", "fused - edge"]
    return Figure("Accuracy on the byte axis, through real codecs", ("edge_accuracy",), headers, rows)
