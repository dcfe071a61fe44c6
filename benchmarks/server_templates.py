"""Models' own chat templates: which form of tool calls each is read as, and whether calls survive the way there and back.

Give a folder of ``*.jinja`` files, such as llama.cpp's ``models/templates``. A form is taken if the template shows tools and writes
past calls in it. Then two calls with nested arguments and other letters (one call, where it takes one an answer) are written by the
template and read by the server's reader, one character at a time; names, arguments and order have to be the same.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast

from measurement import write_result
from telltale.serve.http_errors import ApiError
from telltale.serve.tool_forms import ToolForm
from telltale.serve.tools import ToolCallReader

USER = {"role": "user", "content": "?"}
CALLS = [("weather", {"city": 'Köln "a"', "days": [1, 2.5, None], "more": {"deep": True}}), ("stop", {})]


def turn(tokenizer: Any, form: ToolForm, calls: list[tuple[str, dict[str, Any]]]) -> str:
    """The answer that the template writes for ``calls``, without what ends every answer."""
    tools = form.shown([{"type": "function", "function": {"name": name}} for name, _ in CALLS])

    def written(answer: dict[str, Any]) -> str:
        found = tokenizer.apply_chat_template([USER, answer], tokenize=False, **{form.variable: tools})
        return str(found)

    named = [
        {"id": f"call{place:05}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for place, (name, arguments) in enumerate(calls)
    ]
    plain = written({"role": "assistant", "content": "telltale"})
    own = written({"role": "assistant", "content": "", "tool_calls": named})
    start = next(place for place, (a, b) in enumerate(zip(plain, own, strict=False)) if a != b)
    return own[start:].removesuffix(plain.partition("telltale")[2])


def tried(path: Path) -> dict[str, Any]:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(token_models.WordLevel({"?": 0}, unk_token="?")), bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = path.read_text()
    try:
        form = ToolForm.of(tokenizer)
    except ApiError as error:
        return {"form": None, "why": "shows no tools" if "does not show" in error.message else "another form"}
    calls = CALLS[:1] if form.single else CALLS
    reader = ToolCallReader(form, [name for name, _ in CALLS])
    found = [call for letter in turn(tokenizer, form, calls) for call in reader.push(letter)[1]]
    found += reader.finish()[1]
    same = [(call.name, json.loads(call.arguments)) for call in found] == calls
    return {"form": form.kind, "one_call_an_answer": form.single, "calls_read_back": same}


def main() -> None:
    """Try every template and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--source", required=True, help="where the templates are from, with its version")
    asked = parser.parse_args()
    found = {path.stem: tried(path) for path in sorted(asked.folder.glob("*.jinja"))}
    if not found:
        raise SystemExit(f"there is no *.jinja in {asked.folder}; expected chat templates.")
    for name, one in found.items():
        print(f"{name:55} {one}")
    kinds = [one["form"] for one in found.values()]
    write_result(
        "server_templates",
        source=asked.source,
        counts={kind or "refused": kinds.count(kind) for kind in sorted(set(kinds), key=str)},
        templates=found,
    )


if __name__ == "__main__":
    main()
