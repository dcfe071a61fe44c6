"""Tools in the form of the model's own template: shown to it, read from what it says, streamed, or refused by name."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import openai
import pytest
import torch

from serve.small_servers import CONFIGS, NAME, running, served
from serve.small_tokenizers import CHAT, byte_level
from telltale.decode.grammar import Grammars
from telltale.serve.http_errors import ApiError
from telltale.serve.tool_forms import ToolForm
from telltale.serve.tools import ToolCallReader

WRITTEN = (
    "{% for c in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
)
HERMES = (
    "{% if tools %}<turn>tools: {% for t in tools %}{{ t | tojson }}\n{% endfor %}"
    'For each call write <tool_call>\n{"name": <name>, "arguments": <arguments>}\n</tool_call>\n{% endif %}'
    "{% for m in messages %}<turn>{{ m.role }}: {{ m.content }}" + WRITTEN + "\n{% endfor %}<turn>assistant: "
)
LLAMA = (
    '{% if tools %}Respond in the format {"name": function name, "parameters": dictionary}.\n'
    "{% for t in tools %}{{ t | tojson }}\n{% endfor %}{% endif %}"
    "{% for m in messages %}<turn>{{ m.role }}: {% if m.tool_calls %}"
    "{% if m.tool_calls | length > 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    "{% set c = m.tool_calls[0].function %}"
    '{"name": "{{ c.name }}", "parameters": {{ c.arguments | tojson }}}{% else %}{{ m.content }}{% endif %}\n{% endfor %}'
    "{% if add_generation_prompt %}<turn>assistant: {% endif %}"
)
MISTRAL = (
    "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}{% for m in messages %}"
    "{% if m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}"
    "{% if c.id | length != 9 %}{{ raise_exception('nine letters') }}{% endif %}"
    '{{ (c.function | tojson)[:-1] }}, "id": "{{ c.id }}"}{{ "" if loop.last else ", " }}{% endfor %}]'
    "{% elif m.role == 'assistant' %}{{ m.content }}{% elif m.role == 'tool' %}"
    "{% if m.tool_call_id | length != 9 %}{{ raise_exception('nine letters') }}{% endif %}{{ m.content }}"
    "{% else %}[INST]{{ m.content }}[/INST]{% endif %}{% endfor %}"
)
SILENT = HERMES.replace(WRITTEN, "")
CALL = '"{{ c.function.name }}", "arguments"'
OTHERS = {
    "it writes <function=name>": HERMES.replace('<tool_call>\n{"name": ' + CALL, "<tool_call><function=" + CALL),
    "tags of another name": HERMES.replace("tool_call>", "function_call>"),
    "parameters between tags": HERMES.replace(CALL, CALL.replace("arguments", "parameters")),
    "a word before the object": LLAMA.replace('{"name": "{{', 'Action: {"name": "{{'),
    "a list by another name": MISTRAL.replace("[TOOL_CALLS]", "calls:"),
    "a function's name before its arguments": MISTRAL.replace(
        "{{ (c.function | tojson)[:-1] }}", "{{ c.function.name }}[ARGS]{{ (c.function.arguments | tojson)[:-1] }}"
    ),
    "no calls, and no form in its words": SILENT.replace('{"name": <name>, "arguments": <arguments>}', "the call"),
}
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
TAGS = ToolForm("tags", before="<tool_call>\n", after="\n</tool_call>")
FORMS = [TAGS, ToolForm("whole"), ToolForm("list", before="[TOOL_CALLS] [", after="]", with_id=True)]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_calls_between_tags_are_read_however_the_text_comes(size):
    assert read(TAGS, f"So: {ONE}\n{TWO}", size) == ("So: ", [("add", {"a": 1}), ("none", {})])
    assert read(TAGS, f"{ONE}{TWO}", size, single=True) == ("", [("add", {"a": 1})])
    # The end token may take the place of the last tag.
    assert read(TAGS, ONE.removesuffix("\n</tool_call>"), size) == ("", [("add", {"a": 1})])
    assert read(TAGS, f"{ONE} \n and {TWO} ", size) == (" \n and ", [("add", {"a": 1}), ("none", {})])
    for plain in ("a < b <tool", "<tool_call>{nothing}</tool_call> x", ONE.replace("add", "sub"), "<tool_call>{"):
        assert read(TAGS, plain, size) == (plain, [])


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_calls_that_are_the_whole_answer_are_read(size):
    form = ToolForm("whole")
    one = '{"name": "add", "parameters": {"a": 1}}'
    both = f'{one}; {{"name": "none", "parameters": {{}}}}'
    assert read(form, one, size) == ("", [("add", {"a": 1})])
    assert read(form, both, size) == ("", [("add", {"a": 1}), ("none", {})])
    assert read(ToolForm("whole", single=True), both, size) == ("", [("add", {"a": 1})])
    for plain in ("No.", '{"sum": 4}', one + " is it", '{"name": "sub", "parameters": {}}', "", "Well: " + one):
        assert read(form, plain, size) == (plain, [])


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_list_of_calls_is_read(size):
    form = ToolForm("list", short_ids=True)
    text = '[{"name": "add", "arguments": {"a": 1}, "id": "abcdefghi"}, {"name": "none", "arguments": {}}]'
    calls = [("add", {"a": 1}), ("none", {})]
    assert read(form, text, size) == read(form, f" {text}\n", size) == read(form, text + " ", size) == ("", calls)
    assert read(form, f"[TOOL_CALLS] {text}", size) == ("", calls)
    for plain in ("[1, 2]", "[a]", text + ".", text[:-1], "[]", "No.", text.replace("none", "sub")):
        assert read(form, plain, size) == (plain, [])
    reader = ToolCallReader(form, ["add"])
    reader.push('[{"name": "add", "arguments": {}}]')
    [call] = reader.finish()[1]
    assert len(call.id) == 9
    assert call.id.isalnum()


def test_the_form_is_what_the_template_makes_of_a_call():
    assert ToolForm.of(tokenizer(HERMES)) == TAGS
    other = ToolForm.of(tokenizer(HERMES.replace("tools %}", "xml_tools %}").replace("in tools", "in xml_tools")))
    assert other == replace(TAGS, variable="xml_tools")
    assert ToolForm.of(tokenizer(SILENT)) == TAGS
    assert ToolForm.of(tokenizer(LLAMA)) == ToolForm("whole", single=True)
    listed = ToolForm("list", before="[TOOL_CALLS] [", after="]", with_id=True, short_ids=True)
    assert ToolForm.of(tokenizer(MISTRAL)) == listed
    special = tokenizer(MISTRAL)
    special.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]"]})
    hidden = special.convert_tokens_to_ids("[TOOL_CALLS]")
    assert ToolForm.of(special) == replace(listed, before=" [", opening=hidden)
    hides = tokenizer(HERMES)
    hides.add_special_tokens({"additional_special_tokens": ["<tool_call>"]})
    for found, word in ((tokenizer(CHAT), "does not show tools"), (hides, "hides <tool_call>")):
        with pytest.raises(ApiError, match=word):
            ToolForm.of(found)


def test_a_template_that_takes_no_tool_without_a_description_gets_one():
    strict = HERMES.replace("{{ t | tojson }}", "{{ t.function.name + t.function.description }}")
    form = ToolForm.of(tokenizer(strict))
    assert form == replace(TAGS, fills=True)
    bare = {"type": "function", "function": {"name": "add"}}
    assert form.shown([bare])[0]["function"]["description"] == ""
    assert form.shown([TOOL])[0]["function"]["parameters"] == TOOL["function"]["parameters"]
    assert TAGS.shown([bare]) == [bare]
    found = tokenizer(strict).apply_chat_template(ASKS["messages"], tools=form.shown([bare]), tokenize=False)
    assert "add" in found


@pytest.mark.parametrize("name", OTHERS)
def test_templates_of_other_forms_are_refused(name):
    assert OTHERS[name] not in (HERMES, LLAMA, MISTRAL, SILENT)
    with pytest.raises(ApiError, match="a form that is not read here") as refusal:
        ToolForm.of(tokenizer(OTHERS[name]))
    assert refusal.value.param == "tools"


@pytest.mark.long
@pytest.mark.parametrize("decode", CONFIGS)
def test_a_tool_is_called_and_its_answer_goes_back(decode):
    pytest.importorskip("llguidance")
    for template in (HERMES, LLAMA, MISTRAL):
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
            assert streamed[0]["id"].startswith("call_") or (template == MISTRAL and len(streamed[0]["id"]) == 9)
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
@pytest.mark.parametrize("form", FORMS)
def test_what_a_model_calls_by_no_name_is_text(form, name):
    inner = f'{{"name": {name}, "{form.arguments}": {{}}}}'
    text = f"{form.before}{inner}{form.after}"
    assert read(form, text, 3) == (text, [])


def test_arguments_that_are_not_json_are_text():
    text = '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>'
    assert read(TAGS, text, 5) == (text, [])


@pytest.mark.parametrize("form", FORMS)
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
        own = {"id": "abcdefgh1"} if form.with_id else {}
        inner = json.dumps({"name": name, form.arguments: {"n": number}} | own, ensure_ascii=False)
        return f"{form.before}{inner}{form.after}"

    assert allowed(call("a", 1))
    assert allowed(call('q"\u00e9', 2))
    assert not allowed(call("a", 2))
    assert not allowed(call('q"\u00e9', 1))


def test_a_tool_whose_schema_is_none_is_named():
    pytest.importorskip("llguidance")
    wrong = {"type": "function", "function": {"name": "wrong", "parameters": {"type": "foo"}}}
    with running(served("autoregressive", tokenizer=tokenizer(HERMES))) as server:
        with pytest.raises(openai.BadRequestError) as refusal:
            server.client().chat.completions.create(**ASKS, tools=[TOOL, wrong], tool_choice="required")
        assert refusal.value.body["param"] == "tools[1].function.parameters"
        # A tool that may not be called is not looked at.
        one = {"type": "function", "function": {"name": "add"}}
        assert server.client().chat.completions.create(**ASKS | {"max_tokens": 2}, tools=[TOOL, wrong], tool_choice=one)
        server.settle()
