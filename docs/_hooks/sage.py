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


def _accuracy(data: str) -> Figure:
    found = results("edge_accuracy")["data"][data]
    table = found["accuracy_on_offloaded"]
    budgets = list(next(iter(table.values())))
    rows = [[name, *(number(entry[budget]) for budget in budgets)] for name, entry in table.items()]

    def plot(axes: Axes) -> None:
        shown = {name: ([int(budget) for budget in budgets], list(entry.values())) for name, entry in table.items()}
        lines(axes, shown, x="patches of 64", y="server's accuracy on offloaded images, %")
        axes.legend(fontsize=6)

    pairs = found["pairs"]
    edge = sum(pair["edge_on_offloaded"] for pair in pairs.values()) / len(pairs)
    caption = f"{data.capitalize()}, {len(pairs)} pair(s) of edge and server; the edge alone has {edge:.1f}% on the same images"
    return Figure(caption, ("edge_accuracy",), ["contestant", *budgets], rows, plot, (7.2, 4.2))


@figure("edge-accuracy-scenes")
def accuracy_scenes() -> Figure:
    """Digit scenes."""
    return _accuracy("scenes")


@figure("edge-differences")
def differences() -> Figure:
    """Paired differences, pooled, on both data sets."""
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
    for data, found in results("edge_accuracy")["data"].items():
        for key, told in names.items():
            pooled, by_budget = found[key]["pooled"], found[key]["by_budget"]
            each = "; ".join(
                f"{budget}: {entry['points']:+.1f} ± {entry['error']:.1f}" for budget, entry in by_budget.items()
            )
            rows.append([data, told, f"{pooled['points']:+.2f} ± {pooled['error']:.2f}", f"{pooled['z']:.1f}", each])
    headers = ["data", "difference, points", "pooled", "z", "by patches of 64"]
    return Figure("Paired differences; errors clustered by image", ("edge_accuracy",), headers, rows)


@figure("edge-audit")
def audit() -> Figure:
    """The audit's verdict for every pair."""
    rows = []
    for data, found in results("edge_accuracy")["data"].items():
        for name, pair in found["pairs"].items():
            for entry in pair["audit"]:
                rows.append(
                    [
                        data,
                        name,
                        entry["importance"],
                        number(entry["top"]),
                        number(entry["random"]),
                        number(entry["bottom"]),
                        entry["verdict"],
                        pair["choice"],
                    ]
                )
    headers = ["data", "pair", "importance", "top %", "random %", "bottom %", "verdict", "chosen"]
    return Figure("Deletion test at 30% of the patches", ("edge_accuracy",), headers, rows)


@figure("edge-whole-images")
def whole_images() -> Figure:
    """Patches and whole images on the byte axis, first pair of each data set."""
    rows = []
    for data, found in results("edge_accuracy")["data"].items():
        for name, table in list(found["bytes"].items())[:1]:
            for row in table:
                rows.append(
                    [
                        data,
                        name,
                        row["name"],
                        str(row["budget"]),
                        f"{row['bytes']:.0f}",
                        number(row["server"]),
                        number(row["fused"]),
                    ]
                )
    headers = ["data", "pair", "contestant", "patches or setting", "bytes", "server %", "fused %"]
    return Figure("Accuracy on the byte axis, through real codecs", ("edge_accuracy",), headers, rows)
