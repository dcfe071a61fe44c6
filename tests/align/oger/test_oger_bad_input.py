"""What verifiers, encoders and files can get wrong once training has begun, or before: each is a sentence, or is dealt with."""

import json
import math
import os
import signal

import pytest
import torch
from small_runs import config, dataset, policy, problems, store

from telltale.align.oger import (
    CallableEncoder,
    HiddenStateEncoder,
    OGERTrainer,
    TeacherStore,
    divergence,
    make_oger_reward,
)
from telltale.align.oger.encoders import open_encoder
from telltale.align.oger.inspection import inspect
from telltale.align.oger.job import train_policy
from telltale.align.oger.tokens import TokenisedTeachers, end_tokens
from telltale.errors import CheckpointError, ConfigError, DataError
from telltale.tasks import routes

TOKENIZER = routes.build_tokenizer()


def make(settings, **options):
    options = {"teachers": store(), "processing_class": TOKENIZER, "train_dataset": dataset()} | options
    return OGERTrainer(policy(), settings, **options)


def right(prompts, completions, **_):
    return [1.0] * len(completions)


def after_the_store(behaviour):
    """A verifier that passes every teacher's trace when the store is made and then does as ``behaviour``."""
    calls = []

    def verifier(prompts, completions, **_):
        calls.append(1)
        return [1.0] * len(completions) if len(calls) == 1 else behaviour(completions)

    return verifier


def fails(completions):
    raise KeyError("answer")


@pytest.mark.long
@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        (fails, "failed on a batch of completions, KeyError: 'answer'"),
        (lambda completions: ["yes"] * len(completions), "could not convert string to float: 'yes'"),
        (lambda completions: None, "'NoneType' object is not iterable"),
        (lambda completions: [1.0], "returned 1 rewards for 8 texts"),
        (lambda completions: [math.inf] * len(completions), "returned an infinite reward"),
    ],
)
def test_a_verifier_that_fails_in_training_or_evaluation(tmp_path, behaviour, message):
    with pytest.raises(DataError, match=message):
        make(config(tmp_path, max_steps=1), teachers=store(verifier=after_the_store(behaviour))).train()
    settings = config(tmp_path, per_device_eval_batch_size=8)
    trainer = make(settings, teachers=store(verifier=after_the_store(behaviour)), eval_dataset=dataset(2))
    with pytest.raises(DataError, match=message):
        trainer.evaluate()


class Own:
    """The least that an encoder has to be."""

    identity, centred = "own", False

    def __init__(self, function):
        self.function = function

    def encode(self, prompts, completions):
        return self.function(completions)

    def checksum(self):
        return "none"


WRONG_VECTORS = [
    (lambda texts: torch.ones(len(texts) + 1, 3), r"returned shape \(49, 3\) for 48 texts"),
    (lambda texts: torch.ones(len(texts)), r"returned shape \(48,\) for 48 texts"),
    (lambda texts: torch.ones(len(texts), 2, 3), r"returned shape \(48, 2, 3\)"),
    (lambda texts: [[1.0]] + [[1.0, 2.0]] * (len(texts) - 1), "failed on 48 texts, ValueError"),
    (lambda texts: None, "failed on 48 texts"),
    (lambda texts: 1 / 0, "ZeroDivisionError"),
    (lambda texts: torch.full((len(texts), 3), math.nan), "a vector of length nan"),
]


@pytest.mark.parametrize("kind", [Own, lambda function: CallableEncoder(function, name="wrong")])
@pytest.mark.parametrize(("function", "message"), WRONG_VECTORS)
def test_an_encoder_that_returns_something_else(kind, function, message):
    with pytest.raises(DataError, match=message):
        inspect(store(), kind(function))


@pytest.mark.long
def test_an_encoder_whose_dimensions_change(tmp_path):
    def growing(texts):
        return torch.ones(len(texts), 3 if "=" in texts[0] else 4)

    with pytest.raises(DataError, match="gave vectors of 4 dimensions and of 3"):
        make(config(tmp_path, max_steps=1), teachers=store(verifier=right), encoder=Own(growing)).train()


def test_vectors_of_other_types_are_read(tmp_path):
    for function in (
        lambda texts: [[1, len(text)] for text in texts],
        lambda texts: torch.tensor([[1.0, len(text)] for text in texts], dtype=torch.float64, requires_grad=True),
    ):
        assert inspect(store(4), Own(function)).similarity[0][1] > 0.9


def test_a_store_of_one_trace_has_nothing_to_take_off(tmp_path):
    """Its mean is the trace itself: centred on it, the teacher would have length 0."""
    (problem,) = problems(1)
    rows = [[("", row) for row in kind([problem])] for kind in (routes.prompt_rows, routes.teacher_rows)]
    one = TeacherStore.from_rows(rows[0], rows[1][:1], verifier=right)
    trainer = make(config(tmp_path, max_steps=1, num_generations=8), teachers=one, train_dataset=None)
    assert trainer._builder.centre is None
    trainer.train()
    assert trainer.state.log_history[0]["oger/divergence"] > 0


def test_reward_only_with_one_teacher_in_the_batch():
    (problem,) = problems(1)
    teacher = routes.solution(problem, "S5")
    rows = [{"prompt": problem.prompt, "teachers": [teacher]}]
    reward = make_oger_reward(right, HiddenStateEncoder(policy(), TOKENIZER), dataset=rows)
    totals = reward(prompts=[problem.prompt] * 2, completions=[teacher, "1 2 3"], teachers=[[teacher]] * 2)
    assert totals[0] == pytest.approx(1.0, abs=1e-5)
    assert totals[1] > 1.0


@pytest.mark.parametrize("teachers", ["x y", [1]])
def test_reward_only_with_teachers_that_are_no_list_of_texts(teachers):
    with pytest.raises(DataError, match=r"teachers of row 0 is .*; expected a list of texts"):
        make_oger_reward(right, "ngrams")(prompts=["a"], completions=["b"], teachers=[teachers])
    with pytest.raises(DataError, match="returned 1 rewards for 2 texts"):
        make_oger_reward(lambda **_: [1.0], "ngrams")(prompts=["a"] * 2, completions=["b"] * 2, teachers=[["c"]] * 2)


def test_the_centre_of_a_reward_is_that_of_its_dataset():
    """With one prompt a batch, a centre of its own teachers would give every completion the same divergence."""
    encoder = HiddenStateEncoder(policy(), TOKENIZER)
    rows = [{"prompt": p.prompt, "teachers": [routes.solution(p, r) for r in ("S5", "D2")]} for p in problems(8)]
    reward = make_oger_reward(right, encoder, dataset=rows)
    first, *others = rows
    written = [first["teachers"][0], "1 2 3", "7 + 7 + 7"]
    alone = reward(prompts=[first["prompt"]] * 3, completions=written, teachers=[first["teachers"]] * 3)
    assert max(alone) - min(alone) > 0.05
    both = reward(
        prompts=[first["prompt"]] * 3 + [others[0]["prompt"]],
        completions=[*written, "1 2 3"],
        teachers=[first["teachers"]] * 3 + [others[0]["teachers"]],
    )
    assert both[:3] == pytest.approx(alone, abs=1e-5)
    with pytest.raises(ConfigError, match=r"dataset=None, and the encoder hidden/.* is centred"):
        make_oger_reward(right, encoder)
    with pytest.raises(DataError, match="row 0 of dataset has no column 'teachers'"):
        make_oger_reward(right, encoder, dataset=[{"prompt": "1"}])


def test_a_prompt_that_is_another_one_than_the_stores(tmp_path):
    """Its group would get a trace that answers something else."""
    wrong = dataset().map(lambda row: {"prompt": "2 * 2 + 2 ="} if row["id"] == problems()[3].prompt else {})
    with pytest.raises(DataError, match=r"prompt with the id .* is not the teacher store's; it begins '2 \* 2"):
        make(config(tmp_path), train_dataset=wrong)
    everywhere = dataset().map(lambda row: {"prompt": "2 * 2 + 2 ="})
    streamed = make(config(tmp_path), train_dataset=everywhere.to_iterable_dataset())
    with pytest.raises(DataError, match="is not the teacher store's"):
        streamed.train()


def test_a_conversation_is_the_same_one_whatever_a_table_adds():
    rows = [
        ("", {"id": "a", "messages": [{"role": "developer", "content": "Add."}, {"role": "user", "content": "1 1"}]})
    ]
    teachers = TeacherStore.from_rows(rows, [("", {"prompt_id": "a", "teacher": "t", "text": "2"})], verifier=right)
    same = [
        {"role": "system", "content": "Add.", "tool_calls": None},
        {"role": "user", "content": "1 1", "tool_calls": None},
    ]
    teachers.check_prompt("a", same)
    teachers.check_prompt("unknown", "anything")
    for other in (same[1:], "Add.\n1 1", [same[0] | {"role": "user"}, same[1]]):
        with pytest.raises(DataError, match="is not the teacher store's"):
            teachers.check_prompt("a", other)


def test_a_dataset_whose_ids_are_of_something_else(tmp_path):
    strange = dataset().map(lambda row: {"id": f"q{row['id']}"})
    with pytest.raises(DataError, match="no id of train_dataset has a teacher trace"):
        make(config(tmp_path), train_dataset=strange)


def test_fewer_prompts_than_a_generation_takes(tmp_path):
    """TRL would leave the batch out and end after no step at all."""
    with pytest.raises(DataError, match="has 1 prompts and a generation takes 2"):
        make(config(tmp_path), train_dataset=dataset(1))


@pytest.mark.long
def test_a_checkpoint_from_inside_a_generation_is_not_resumed(tmp_path):
    """The last step of a run is saved wherever it falls."""
    steps = {"num_iterations": 2, "save_strategy": "steps", "save_steps": 2}
    make(config(tmp_path, max_steps=3, **steps)).train()
    longer = make(config(tmp_path, max_steps=6, **steps))
    with pytest.raises(CheckpointError, match="checkpoint-3 was made inside a generation"):
        longer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    make(config(tmp_path, max_steps=4, **steps)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def rows(prompts, teachers=({"prompt_id": "1", "teacher": "a", "text": "b"},)):
    return TeacherStore.from_rows(
        [(f"prompt {i}", row) for i, row in enumerate(prompts)],
        [(f"teacher {i}", row) for i, row in enumerate(teachers)],
        verifier=right,
    )


def test_prompts_that_make_no_table():
    talk = [{"role": "user", "content": "x"}]
    with pytest.raises(DataError, match="prompt 1 has another kind of prompt than the rows before"):
        rows([{"id": 1, "prompt": "x"}, {"id": 2, "messages": talk}])
    with pytest.raises(DataError, match="the prompts make no table"):
        rows([{"id": 1, "prompt": "x", "answer": 1}, {"id": 2, "prompt": "y", "answer": "b"}]).dataset()
    assert rows([{"id": 1, "prompt": None, "messages": talk}]).dataset()[0]["prompt"] == talk
    assert rows([{"id": 1, "prompt": "x"}, {"id": 2, "prompt": "y", "answer": "b"}]).dataset()["answer"] == [None, "b"]
    with pytest.raises(DataError, match=r"messages\[0\]"):
        rows([{"id": 1, "messages": [{"role": "user", "content": 3}]}])


@pytest.mark.parametrize("log_probs", [[math.nan], [0.5], [-math.inf], "12"])
def test_log_probabilities_that_are_none(log_probs):
    with pytest.raises(DataError, match=r"teacher 0: log_probs are .*; expected finite numbers of at most 0"):
        rows([{"id": 1, "prompt": "x"}], [{"prompt_id": 1, "teacher": "a", "text": "b", "log_probs": log_probs}])


def test_inspect_says_why_nothing_is_left():
    wrong = store(4, verifier=lambda completions, **_: [0.0] * len(completions))
    with pytest.raises(DataError, match="S5: 4 incorrect; S10: 4 incorrect; D2: 4 incorrect"):
        inspect(wrong, open_encoder("ngrams"))


def test_inspect_counts_prompts_whose_traces_the_policy_cannot_use():
    """Their groups stay online, though the store has a trace for each."""
    teachers = store(4, teachers=("S5", "S10"))
    tokens = TokenisedTeachers(teachers, TOKENIZER, end_ids=end_tokens(policy(), TOKENIZER), longest=7)
    assert inspect(teachers, open_encoder("ngrams")).without_teacher == 0
    assert inspect(teachers, open_encoder("ngrams"), tokens=tokens).without_teacher == 4


def test_ends_of_a_completion_are_the_tokenizers_and_the_models():
    model = policy()
    model.generation_config.eos_token_id = [7, TOKENIZER.eos_token_id]
    assert end_tokens(model, TOKENIZER) == [TOKENIZER.eos_token_id, 7]
    model.generation_config.eos_token_id = 9
    assert end_tokens(model, TOKENIZER) == [TOKENIZER.eos_token_id, 9]
    model.generation_config.eos_token_id = None
    assert end_tokens(model, TOKENIZER) == [TOKENIZER.eos_token_id]


@pytest.mark.parametrize(("distance", "said"), [(0.001, "all alike"), (1.0, "not by who wrote them")])
def test_inspect_says_in_which_way_an_encoder_does_not_tell_teachers_apart(distance, said):
    """Traces that look alike carry no signal; traces that differ by something else than their teacher carry another one."""
    teachers = store(24, teachers=("S5", "S10"))
    texts = sorted({trace.text for trace in teachers.traces()})
    noise = torch.randn(len(texts), 16, generator=torch.Generator().manual_seed(0))
    vectors = {text: torch.ones(16) + distance * row for text, row in zip(texts, noise, strict=True)}
    blind = CallableEncoder(lambda some: torch.stack([vectors[text] for text in some]), name="noise")
    found = inspect(teachers, blind)
    assert found.separates is False
    assert said in found.verdict


def test_teachers_that_share_no_two_prompts_cannot_be_compared():
    pairs = {"1": "ac", "2": "ad", "3": "be", "4": "bf"}
    prompts = [("", {"id": name, "prompt": f"add {name}"}) for name in pairs]
    traces = [
        ("", {"prompt_id": name, "teacher": teacher, "text": f"{teacher} {name}"})
        for name, both in pairs.items()
        for teacher in both
    ]
    found = inspect(TeacherStore.from_rows(prompts, traces, verifier=right), open_encoder("ngrams"))
    assert (found.recognised, found.separates) == (None, None)
    assert found.verdict.startswith("Too few prompts")


def test_a_special_token_without_a_role_is_markup():
    """Chat tokens are often only added tokens, such as Llama's headers: decoding leaves them out."""
    from tokenizers import AddedToken

    tokenizer = routes.build_tokenizer()
    tokenizer.add_tokens(AddedToken("<speaker>", special=True), special_tokens=True)
    (problem,) = problems(1)
    row = {"prompt_id": problem.prompt, "teacher": "a", "text": f"<speaker> {routes.solution(problem, 'S5')}"}
    one = rows(routes.prompt_rows([problem]), [row])
    tokens = TokenisedTeachers(one, tokenizer, end_ids=[tokenizer.eos_token_id], longest=32)
    assert dict(tokens.dropped["a"]) == {"chat markup": 1}


def test_a_prompt_without_text_is_repeated_by_nothing():
    tokenizer = routes.build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} <eos> {% endfor %}"
    one = rows(
        [{"id": 1, "messages": [{"role": "user", "content": None}]}], [{"prompt_id": 1, "teacher": "a", "text": "7"}]
    )
    tokens = TokenisedTeachers(one, tokenizer, end_ids=[tokenizer.eos_token_id], longest=4)
    assert len(tokens.of("1")) == 1


@pytest.mark.parametrize("reduce", ["mean", "max", "min", "centroid"])
def test_very_short_embeddings_are_compared_by_direction(reduce):
    online, offline = torch.tensor([[1.0, 0.0], [0.3, 0.7]]), torch.tensor([[1.0, 0.0], [0.2, 1.0]])
    torch.testing.assert_close(
        divergence(online * 1e-10, offline * 1e-12, reduce=reduce), divergence(online, offline, reduce=reduce)
    )


def test_fields_that_cannot_go_together(tmp_path):
    with pytest.raises(ConfigError, match="oger_offline_loss='sft' keeps traces out"):
        config(tmp_path, oger_offline_loss="sft", multi_objective_aggregation="normalize_then_sum")
    with pytest.raises(ConfigError, match="oger_pass_at=4 is no list"):
        config(tmp_path, oger_pass_at=4)


def job_files(folder):
    chosen = problems(8)
    for name, made in (("prompts", routes.prompt_rows(chosen)), ("teachers", list(routes.teacher_rows(chosen)))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    policy().save_pretrained(folder / "policy")
    TOKENIZER.save_pretrained(folder / "policy")
    return [folder / "policy", folder / "prompts.jsonl", folder / "teachers.jsonl"]


@pytest.mark.long
def test_ctrl_c_stops_at_a_generations_end_and_the_run_goes_on_as_if_nothing_had_been(tmp_path):
    files = job_files(tmp_path)
    fields = {
        "max_steps": 4,
        "use_cpu": True,
        "num_generations": 4,
        "save_steps": 4,
        "num_iterations": 2,
        "max_completion_length": 8,
        "learning_rate": 1e-3,
    }

    def interrupt(name, step, total, note):
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    options = {"verifier": routes.verify, "fields": fields}
    whole = train_policy(*files, tmp_path / "whole", **options)
    cut = train_policy(*files, tmp_path / "cut", progress=interrupt, **options)
    assert (cut["steps"], cut["finished"], whole["finished"]) == (2, False, True)
    assert train_policy(*files, tmp_path / "cut", resume=True, **options)["finished"]
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


@pytest.mark.long
def test_a_run_exists_only_once_nothing_is_refused_any_more(tmp_path):
    chosen, files = problems(8), [*job_files(tmp_path), tmp_path / "run"]
    fields = {"max_steps": 1, "use_cpu": True, "num_generations": 4, "save_steps": 1}
    with pytest.raises(DataError, match="no teacher trace is left"):
        train_policy(*files, verifier=routes.verify, fields=fields | {"max_completion_length": 3})
    fields["max_completion_length"] = 8
    train_policy(*files, verifier=routes.verify, fields=fields)
    longer = fields | {"max_steps": 2}
    with pytest.raises(ConfigError, match=r"begun with verifier='telltale\.tasks\.routes\.verify'"):
        train_policy(*files, verifier=right, fields=longer, resume=True)
    with pytest.raises(ConfigError, match="begun with encoder='hidden', not 'ngrams'"):
        train_policy(*files, verifier=routes.verify, fields=longer, encoder="ngrams", resume=True)
    (tmp_path / "teachers.jsonl").write_text(json.dumps(next(routes.teacher_rows(chosen))) + "\n")
    with pytest.raises(ConfigError, match="begun with teachers="):
        train_policy(*files, verifier=routes.verify, fields=longer, resume=True)
