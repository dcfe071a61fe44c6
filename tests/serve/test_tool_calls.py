"""Tools in the form of the model's own template: shown to it, read from what it says, streamed, or refused by name."""

from __future__ import annotations

import copy
import json

import openai
import pytest
import torch

from serve.small_servers import CONFIGS, NAME, running, served
from serve.small_tokenizers import CHAT, byte_level
from telltale.decode.grammar import Grammars
from telltale.serve.http_errors import ApiError
from telltale.serve.tools import ToolCallReader, ToolForm

HERMES = (
    "{% if tools %}<turn>tools: {% for t in tools %}{{ t | tojson }}\n{% endfor %}"
    'For each call write <tool_call>\n{"name": <name>, "arguments": <arguments>}\n</tool_call>\n{% endif %}'
    "{% for m in messages %}<turn>{{ m.role }}: {{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}\n'
    "{% endfor %}<turn>assistant: "
)
LLAMA = (
    '{% if tools %}Respond in the format {"name": function name, "parameters": dictionary}.\n'
    "{% for t in tools %}{{ t | tojson }}\n{% endfor %}{% endif %}"
    "{% for m in messages %}<turn>{{ m.role }}: {{ m.content }}\n{% endfor %}<turn>assistant: "
)
XML = HERMES.replace('{"name": <name>, "arguments": <arguments>}', "<function=name>")
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"enum": [1, 2]}},
            "required": ["a"],
            "additionalProperties": False,
        },
    },
}
OTHER = {"type": "function", "function": {"name": "none", "parameters": {"enum": [{}]}}}
ASKS = {"model": NAME, "messages": [{"role": "user", "content": "1 and 3?"}], "max_tokens": 120, "seed": 2}


def tokenizer(template: str):
    found = copy.deepcopy(byte_level())
    found.chat_template = template
    return found


def read(form: ToolForm, text: str, sizes: int, **options):
    reader = ToolCallReader(form, ["add", "none"], **options)
    said, calls = "", []
    for start in range(0, len(text), sizes):
        more, found = reader.push(text[start : start + sizes])
        said, calls = said + more, calls + found
    more, found = reader.finish()
    return said + more, [(call.name, json.loads(call.arguments)) for call in calls + found]


ONE = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
TWO = '<tool_call>{"name": "none", "arguments": {}}</tool_call>'


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_calls_between_tags_are_read_however_the_text_comes(size):
    form = ToolForm("arguments", True)
    assert read(form, f"So: {ONE}\n{TWO}", size) == ("So: ", [("add", {"a": 1}), ("none", {})])
    assert read(form, f"{ONE}{TWO}", size, single=True) == ("", [("add", {"a": 1})])
    # The end token may take the place of the last tag.
    assert read(form, ONE.removesuffix("\n</tool_call>"), size) == ("", [("add", {"a": 1})])
    assert read(form, f"{ONE} \n and {TWO} ", size) == (" \n and ", [("add", {"a": 1}), ("none", {})])
    for plain in ("a < b <tool", "<tool_call>{nothing}</tool_call> x", ONE.replace("add", "sub"), "<tool_call>{"):
        assert read(form, plain, size) == (plain, [])


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_calls_that_are_the_whole_answer_are_read(size):
    form = ToolForm("parameters", False)
    one = '{"name": "add", "parameters": {"a": 1}}'
    assert read(form, one, size) == ("", [("add", {"a": 1})])
    assert read(form, f'{one}; {{"name": "none", "parameters": {{}}}}', size) == ("", [("add", {"a": 1}), ("none", {})])
    for plain in ("No.", '{"sum": 4}', one + " is it", '{"name": "sub", "parameters": {}}', "", "Well: " + one):
        assert read(form, plain, size) == (plain, [])


def test_the_form_is_the_templates():
    assert ToolForm.of(tokenizer(HERMES)) == ToolForm("arguments", True)
    assert ToolForm.of(tokenizer(HERMES.replace("tools %}", "xml_tools %}"))) == ToolForm(
        "arguments", True, "xml_tools"
    )
    assert ToolForm.of(tokenizer(LLAMA)) == ToolForm("parameters", False)
    for template, word in ((CHAT, "does not show tools"), (XML, "a form that is not read here")):
        with pytest.raises(ApiError, match=word):
            ToolForm.of(tokenizer(template))


@pytest.mark.long
@pytest.mark.parametrize("decode", CONFIGS)
def test_a_tool_is_called_and_its_answer_goes_back(decode):
    pytest.importorskip("llguidance")
    for template in (HERMES, LLAMA):
        with running(served(decode, tokenizer=tokenizer(template))) as server:
            ask = server.client(timeout=60).chat.completions.create
            choice = ask(
                **ASKS, tools=[OTHER, TOOL], tool_choice={"type": "function", "function": {"name": "add"}}
            ).choices[0]
            assert choice.finish_reason == "tool_calls"
            assert choice.message.content is None
            [call] = choice.message.tool_calls
            arguments = json.loads(call.function.arguments)
            assert call.function.name == "add"
            assert arguments["a"] in (1, 2)
            streamed = {}
            ends = []
            for chunk in ask(**ASKS, tools=[OTHER, TOOL], tool_choice="required", stream=True):
                for one in chunk.choices[0].delta.tool_calls or ():
                    own = streamed.setdefault(one.index, {"id": None, "name": "", "arguments": ""})
                    own["id"] = one.id or own["id"]
                    own["name"] += one.function.name or ""
                    own["arguments"] += one.function.arguments or ""
                ends.append(chunk.choices[0].finish_reason)
            assert ends[-1] == "tool_calls"
            assert list(streamed) == [0]
            assert streamed[0]["id"].startswith("call_")
            assert streamed[0]["name"] in ("add", "none")
            assert isinstance(json.loads(streamed[0]["arguments"]), dict)
            said = [*ASKS["messages"], choice.message, {"role": "tool", "tool_call_id": call.id, "content": "4"}]
            assert (
                ask(**ASKS | {"messages": said, "max_tokens": 3}, tools=[TOOL]).choices[0].message.content is not None
            )
            server.settle()


def test_tools_that_the_template_does_not_show_are_refused_by_name():
    with running(served("autoregressive")) as server:
        with pytest.raises(openai.BadRequestError) as refusal:
            server.client().chat.completions.create(**ASKS, tools=[TOOL])
        assert refusal.value.body["param"] == "tools"
        # A model that must not call any is not shown any.
        assert server.client().chat.completions.create(**ASKS | {"max_tokens": 2}, tools=[TOOL], tool_choice="none")
        server.settle()


@pytest.mark.parametrize("name", ['["add"]', '{"a": 1}', "null", "1"])
@pytest.mark.parametrize("form", [ToolForm("arguments", True), ToolForm("parameters", False)])
def test_what_a_model_calls_by_no_name_is_text(form, name):
    inner = f'{{"name": {name}, "{form.arguments}": {{}}}}'
    text = f"<tool_call>{inner}</tool_call>" if form.tagged else inner
    assert read(form, text, 3) == (text, [])


def test_arguments_that_are_not_json_are_text():
    text = '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>'
    assert read(ToolForm("arguments", True), text, 5) == (text, [])


@pytest.mark.parametrize("form", [ToolForm("arguments", True), ToolForm("parameters", False)])
def test_schemas_with_definitions_of_their_own_stand_side_by_side(form):
    """As pydantic writes a tool's nested parameters: references begin at the schema's own root."""
    pytest.importorskip("llguidance")
    width = len(byte_level())
    grammars = Grammars(byte_level(), vocabulary=width, eos=[2])

    def tool(name, inner):
        nested = {"$defs": {"N": inner}, "properties": {"n": {"$ref": "#/$defs/N"}}, "required": ["n"]}
        nested["additionalProperties"] = False
        return {"type": "function", "function": {"name": name, "parameters": nested}}

    tools = [tool("a", {"enum": [1]}), tool('q"\u00e9', {"enum": [2]})]
    grammar = grammars.lark(form.grammar(tools))

    def allowed(text):
        ids = torch.tensor([byte_level().encode(text, add_special_tokens=False)])
        for end in range(ids.shape[1]):
            if not torch.isfinite(grammar.processor(0)(ids[:, :end], torch.zeros(1, width))[0, ids[0, end]]):
                return False
        return True

    def call(name, number):
        inner = json.dumps({"name": name, form.arguments: {"n": number}}, ensure_ascii=False)
        return f"<tool_call>\n{inner}\n</tool_call>" if form.tagged else inner

    assert allowed(call("a", 1))
    assert allowed(call('q"\u00e9', 2))
    assert not allowed(call("a", 2))
    assert not allowed(call('q"\u00e9', 1))
