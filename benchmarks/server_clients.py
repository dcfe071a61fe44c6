"""The clients that people use against the server: OpenAI's for Python and JavaScript, LangChain's, and lm-evaluation-harness.

Each check is one thing that such a client does: it holds or it does not, and the JSON says which. The model is small and of random
weights; what is checked is the conversation between client and server, never what the model says. A client that is not installed
is left out by name. ``--javascript``: a folder in which ``npm install openai`` was run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import openai

from measurement import write_result
from server_process import checkpoint, serving

ASKS = [{"role": "user", "content": "one and two?"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "adds two numbers",
        "parameters": {
            "type": "object",
            "properties": {"a": {"enum": [1, 2, 3]}, "b": {"enum": [1, 2, 3]}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}
SCHEMA = TOOL["function"]["parameters"]
FORMAT = {"type": "json_schema", "json_schema": {"name": "pair", "schema": SCHEMA, "strict": True}}

JAVASCRIPT = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.argv[2] + "/v1/", apiKey: "none", maxRetries: 0 });
const tool = JSON.parse(process.argv[3]);
const asks = { model: "m", messages: [{ role: "user", content: "one and two?" }], max_tokens: 150, seed: 1 };
const checks = {
  models: async () => (await client.models.list()).data[0].id === "m",
  chat: async () => typeof (await client.chat.completions.create(asks)).choices[0].message.content === "string",
  stream: async () => {
    let text = "", usage = null;
    const stream = await client.chat.completions.create({ ...asks, stream: true, stream_options: { include_usage: true } });
    for await (const chunk of stream) { text += chunk.choices[0]?.delta?.content ?? ""; usage = chunk.usage ?? usage; }
    const whole = await client.chat.completions.create(asks);
    return text === whole.choices[0].message.content && usage.total_tokens === whole.usage.total_tokens;
  },
  completion: async () => {
    const answer = await client.completions.create({ model: "m", prompt: ["a", "b"], max_tokens: 3, n: 2 });
    return answer.choices.length === 4;
  },
  logprobs_in_a_stream: async () => {
    let count = 0;
    const wanted = { ...asks, max_tokens: 5, logprobs: true, top_logprobs: 2, stream: true };
    for await (const chunk of await client.chat.completions.create(wanted))
      count += chunk.choices[0]?.logprobs?.content?.length ?? 0;
    return count > 0 && count <= 5;
  },
  json_schema: async () => {
    const format = { type: "json_schema", json_schema: { name: "pair", strict: true, schema: tool.function.parameters } };
    const answer = await client.chat.completions.create({ ...asks, response_format: format });
    return [1, 2, 3].includes(JSON.parse(answer.choices[0].message.content).a);
  },
  tool_call_streamed: async () => {
    const runner = client.chat.completions.stream({ ...asks, tools: [tool], tool_choice: "required" });
    const message = await runner.finalMessage();
    const called = message.tool_calls[0].function;
    return called.name === "add" && [1, 2, 3].includes(JSON.parse(called.arguments).b);
  },
  error_names_the_field: async () => {
    try { await client.chat.completions.create({ ...asks, temperature: 9 }); return false; }
    catch (error) { return error instanceof OpenAI.BadRequestError && error.param === "temperature"; }
  },
};
const found = {};
for (const [name, check] of Object.entries(checks)) {
  try { found[name] = await check(); } catch (error) { found[name] = String(error).slice(0, 200); }
}
console.log(JSON.stringify(found));
"""


def outcome(check: Callable[[], bool]) -> bool | str:
    """Whether it holds, or the error."""
    try:
        return bool(check())
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]


def python_client(url: str) -> dict[str, Any]:
    client = openai.OpenAI(base_url=f"{url}/v1/", api_key="none", max_retries=0, timeout=120)
    chat = client.chat.completions.create
    asks: dict[str, Any] = {"model": "m", "messages": ASKS, "max_tokens": 150, "seed": 1}

    def streamed() -> bool:
        text, usage = "", None
        for chunk in chat(**asks, stream=True, stream_options={"include_usage": True}):
            text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
            usage = chunk.usage or usage
        whole = chat(**asks)
        return text == whole.choices[0].message.content and usage.total_tokens == whole.usage.total_tokens

    def logprobs_streamed() -> bool:
        found = [
            entry.logprob
            for chunk in chat(**asks | {"max_tokens": 5}, logprobs=True, top_logprobs=2, stream=True)
            if chunk.choices and chunk.choices[0].logprobs
            for entry in chunk.choices[0].logprobs.content
        ]
        return 0 < len(found) <= 5 and all(value <= 0 for value in found)

    def tools_round_trip() -> bool:
        message = chat(**asks, tools=[TOOL], tool_choice="required").choices[0].message
        call = message.tool_calls[0]
        said = [*ASKS, message, {"role": "tool", "tool_call_id": call.id, "content": "3"}]
        answer = chat(**asks | {"messages": said, "max_tokens": 4}, tools=[TOOL])
        return json.loads(call.function.arguments)["a"] in (1, 2, 3) and answer.choices[0].message.role == "assistant"

    def error_is_named() -> bool:
        try:
            chat(**asks, temperature=9)
        except openai.BadRequestError as error:
            return error.body["param"] == "temperature"
        return False

    async def together() -> bool:
        many = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
        own = asks | {"max_tokens": 12}
        answers = await asyncio.gather(*(many.chat.completions.create(**own | {"seed": n}) for n in range(8)))
        return len(answers) == 8

    def parsed() -> bool:
        from pydantic import BaseModel

        class Pair(BaseModel):
            a: bool
            b: bool

        return isinstance(client.chat.completions.parse(**asks, response_format=Pair).choices[0].message.parsed, Pair)

    parts = [{"role": "developer", "content": [{"type": "text", "text": "be brief"}]}, *ASKS]
    nulls = [*ASKS, {"role": "assistant", "content": None}, {"role": "user", "content": "so?"}]
    short = asks | {"max_tokens": 4}
    checks: dict[str, Callable[[], bool]] = {
        "models": lambda: client.models.list().data[0].id == "m" and client.models.retrieve("m").id == "m",
        "chat": lambda: isinstance(chat(**asks).choices[0].message.content, str),
        "same_seed_same_text": lambda: chat(**asks).choices[0].message == chat(**asks).choices[0].message,
        "stream": streamed,
        "completion": lambda: len(
            client.completions.create(model="m", prompt=["a", "b"], max_tokens=3, n=2).choices) == 4,
        "token_ids_and_echo": lambda: client.completions.create(
            model="m", prompt=[65, 66], max_tokens=0, echo=True, logprobs=1).choices[0].logprobs.token_logprobs[0] is None,
        "logprobs_in_a_stream": logprobs_streamed,
        "content_parts_and_developer": lambda: bool(chat(**short | {"messages": parts})),
        "content_null": lambda: bool(chat(**short | {"messages": nulls})),
        "stop_and_bias_and_penalties": lambda: bool(chat(
            **short, stop=["a", "b"], logit_bias={"5": 2}, presence_penalty=0.5, frequency_penalty=0.5)),
        "max_completion_tokens": lambda: chat(
            model="m", messages=ASKS, max_completion_tokens=3).usage.completion_tokens <= 3,
        "json_object": lambda: isinstance(json.loads(chat(
            **asks, response_format=FORMAT).choices[0].message.content), dict),
        "parse_into_a_model": parsed,
        "tools_round_trip": tools_round_trip,
        "eight_at_once": lambda: asyncio.run(together()),
        "error_names_the_field": error_is_named,
    }  # fmt: skip
    return {"version": openai.__version__, "checks": {name: outcome(check) for name, check in checks.items()}}


def javascript_client(url: str, folder: Path | None) -> dict[str, Any]:
    if folder is None or shutil.which("node") is None:
        return {"left_out": "no node, or no folder with the package"}
    package = json.loads((folder / "node_modules" / "openai" / "package.json").read_text("utf-8"))
    script = folder / "checks.mjs"
    script.write_text(JAVASCRIPT, "utf-8")
    run = subprocess.run(["node", script, url, json.dumps(TOOL)], capture_output=True, text=True, timeout=300)
    checks = json.loads(run.stdout) if run.returncode == 0 else {"started": run.stderr[-300:]}
    return {"version": package["version"], "checks": checks}


def langchain_client(url: str) -> dict[str, Any]:
    try:
        from langchain_openai import ChatOpenAI
    except ImportError as error:
        return {"left_out": f"langchain_openai is not installed: {error}"}
    model = ChatOpenAI(base_url=f"{url}/v1", api_key="none", model="m", max_tokens=150, seed=1, max_retries=0)

    def tool() -> bool:
        message = model.bind_tools([TOOL], tool_choice="add").invoke("one and two?")
        return message.tool_calls[0]["name"] == "add" and message.tool_calls[0]["args"]["a"] in (1, 2, 3)

    checks: dict[str, Callable[[], bool]] = {
        "invoke": lambda: isinstance(model.invoke("one and two?").content, str),
        "stream": lambda: "".join(part.content for part in model.stream("hi")) == model.invoke("hi").content,
        "batch": lambda: len(model.batch(["a", "b", "c"])) == 3,
        "system_and_history": lambda: bool(
            model.invoke([("system", "be brief"), ("human", "a"), ("ai", "b"), ("human", "c")])
        ),
        "tool": tool,
        "structured_output": lambda: (
            model.with_structured_output({"title": "pair", **SCHEMA}, method="json_schema").invoke("one")["a"]
            in (1, 2, 3)
        ),
        "logprobs": lambda: len(model.bind(logprobs=True).invoke("a").response_metadata["logprobs"]["content"]) > 0,
    }
    return {"version": version("langchain-openai"), "checks": {name: outcome(check) for name, check in checks.items()}}


def harness(url: str, folder: Path) -> dict[str, Any]:
    try:
        from lm_eval.api.instance import Instance
        from lm_eval.models.openai_completions import LocalCompletionsAPI
    except ImportError as error:
        return {"left_out": f"lm_eval is not installed: {error}; server_lm_eval.json has its figures"}
    client = LocalCompletionsAPI(
        base_url=f"{url}/v1/completions", model="m", tokenizer=str(folder), tokenizer_backend="huggingface"
    )
    asked = [Instance(request_type="loglikelihood", doc={}, arguments=("one ", "two"), idx=0)]
    checks = {"loglikelihood": outcome(lambda: client.loglikelihood(asked, disable_tqdm=True)[0][0] < 0)}
    return {"version": version("lm_eval"), "checks": checks}


def main() -> None:
    """Run every client and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--javascript", type=Path)
    folder = parser.parse_args().javascript
    with tempfile.TemporaryDirectory() as name:
        model = checkpoint(Path(name))
        with serving(model, "--cors", "*") as (url, _, _told):
            found = {
                "openai_python": python_client(url),
                "openai_javascript": javascript_client(url, folder),
                "langchain_openai": langchain_client(url),
                "lm_eval": harness(url, model),
            }
    for client, own in found.items():
        print(client, json.dumps(own))
    write_result("server_clients", clients=found)


if __name__ == "__main__":
    main()
