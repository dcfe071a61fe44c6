"""Figures of the server beside the clients that people use."""

from __future__ import annotations

import statistics

from drawing import Figure, figure, results


@figure("server-clients")
def server_clients() -> Figure:
    """What each client's checks found."""
    rows = []
    for name, entry in results("server_clients")["clients"].items():
        checks = entry.get("checks", {})
        good = sum(value is True for value in checks.values())
        failed = ", ".join(check for check, value in checks.items() if value is not True)
        kept = f"{good} of {len(checks)}" if checks else "left out"
        rows.append([name.replace("_", " "), entry.get("version", "-"), kept, failed or "-"])
    headers = ["client", "version", "checks that hold", "those that do not"]
    return Figure("Stock clients against one server", ("server_clients",), headers, rows)


@figure("server-prefixes")
def server_prefixes() -> Figure:
    """Tokens of prompts that were read, with the cache of prefixes and without."""
    found = results("server_prefixes")["decodes"]
    rows = []
    for name, entry in found.items():
        on, off = (entry["prompt_tokens_and_those_read"][key] for key in ("on", "off"))
        second = f"{on['second turn']['read']} / {off['second turn']['read']} of {on['second turn']['prompt']}"
        again = f"{on['the second turn again']['read']} / {off['the second turn again']['read']}"
        shared = on["another user of the same system prompt"], off["another user of the same system prompt"]
        rows.append(
            [
                name,
                f"{entry['eight_choices_over_their_prompt']:.2f}x",
                second,
                again,
                f"{shared[0]['read']} / {shared[1]['read']} of {shared[0]['prompt']}",
                f"{entry['texts_equal_with_and_without']} of {entry['texts']}",
            ]
        )
    headers = ["decode", "read for 8 choices", "second turn", "the same again", "another user", "texts equal"]
    caption = "Tokens of prompts that the model read, with the cache / without it"
    return Figure(caption, ("server_prefixes",), headers, rows)


@figure("server-templates")
def server_templates() -> Figure:
    """Templates whose calls are read, and whether they came back."""
    found = results("server_templates")["templates"]
    rows = [
        [
            name,
            entry["form"],
            "one" if entry["one_call_an_answer"] else "several",
            str(entry["calls_read_back"]).lower(),
        ]
        for name, entry in found.items()
        if entry["form"]
    ]
    headers = ["template", "form", "calls an answer", "calls read back"]
    return Figure(
        f"Templates whose tool calls are read, {len(rows)} of {len(found)}", ("server_templates",), headers, rows
    )


@figure("server-soak")
def server_soak() -> Figure:
    """What a server went through, and what was left of it."""
    found, fuzzed = results("server_soak"), results("server_fuzz")
    soak, left = found["soak"], found["after_soak"]
    memory = [sample["rss_mb"] for sample in soak["samples"]]
    ends = found["sigterm"]["ends"]
    rows = [
        ["streams at a time, minutes", f"{soak['streams']}, {soak['seconds'] / 60:.0f}"],
        ["answers, of which the client left", f"{sum(soak['ends'].values())}, {soak['ends'].get('left', 0)}"],
        [
            "answers with a 5xx; rows, slots, branches left",
            f"{left['answers_5xx']}; {left['rows'] + left['slots'] + left['branches']:.0f}",
        ],
        [
            "resident memory: first, largest, last sample",
            " / ".join(f"{one:.0f} MB" for one in (memory[0], max(memory), memory[-1])),
        ],
        [
            "half-open headers, of which closed in 11 seconds",
            f"{found['half_open']['opened']}, {found['half_open']['closed_after_11_seconds']}",
        ],
        ["an honest request meanwhile", f"{1e3 * found['half_open']['honest_seconds']:.0f} ms"],
        [
            "SIGTERM under streams: ends",
            f"{found['sigterm']['streams']}: {', '.join(f'{n} {end}' for end, n in ends.items())}",
        ],
        ["fuzzed: answers, of which 5xx", f"{fuzzed['answers']:.0f}, {fuzzed['answers_5xx']}"],
    ]
    return Figure("A server after a soak", ("server_soak", "server_fuzz"), ["what", "found"], rows)


@figure("server-fairness")
def server_fairness() -> Figure:
    """How long a stream's tokens wait while long prompts are read."""
    found = results("server_fairness")
    names = {"alone": "alone", "while_reading": f"while prompts of {found['prompt_tokens']:,} tokens are read"}
    rows = [
        [
            label,
            str(found[name]["tokens"]),
            *(f"{found[name][key]:.0f}" for key in ("median_ms", "p99_ms", "largest_ms")),
        ]
        for name, label in names.items()
    ]
    caption = f"Milliseconds between two tokens of a stream, 44M model, one thread, {found['prompts']} long prompts"
    return Figure(caption, ("server_fairness",), ["stream", "gaps", "median", "99%", "largest"], rows)


@figure("server-llamacpp")
def server_llamacpp() -> Figure:
    """Beside llama.cpp's server on the same file, on a processor with matrix tiles."""
    return _beside_llamacpp("server_llamacpp_chats")


@figure("server-llamacpp-avx2")
def server_llamacpp_avx2() -> Figure:
    """The same on a processor that has AVX2 only."""
    return _beside_llamacpp("server_llamacpp_chats_avx2")


def _beside_llamacpp(source: str) -> Figure:
    found = results(source)
    rows, told = [], []
    for weights, run in found["servers"].items():
        for streams, own in run["streams"].items():
            sides = [own["rounds"][name] for name in ("telltale", "llama.cpp")]
            speeds, firsts = (
                [f"{statistics.median(one[key] for one in side):,.0f}" for side in sides]
                for key in ("tokens_per_second", "first_token_ms")
            )
            low, middle, high = own["ratio"]
            rows.append([weights, streams, *speeds, f"{middle:.2f}x ({low:.2f} to {high:.2f})", *firsts])
        offline = run["offline"]
        told.append(
            f"{weights}: {offline['texts_equal']} of {offline['texts']} texts equal to offline decoding, which makes "
            f"{offline['tokens_per_second']:.0f} tokens a second with one chat at a time"
        )
    caption = (
        f"SmolLM2-135M-Instruct, both servers on one file (BF16, and Q8_0 for int8), {found['server_threads']} threads each, "
        f"chats, {found['new_tokens']} tokens out"
    )
    headers = [
        "weights",
        "streams",
        "tokens/s, telltale",
        "llama.cpp",
        "ratio",
        "first token, ms, telltale",
        "llama.cpp",
    ]
    return Figure(caption, (source,), headers, rows, note="; ".join(told) + ".")
