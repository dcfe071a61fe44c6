"""OGERTrainer beside TRL's own: equal where nothing is added, and consistent where something is (properties 1, 5, 11, 14, 15)."""

import copy
import functools

import pytest
import torch
from small_runs import arguments, config, dataset, parameters, policy, store
from trl import GRPOConfig, GRPOTrainer

from telltale.align.oger import CallableEncoder, OGERTrainer, TeacherStore, token_entropies
from telltale.tasks import routes

pytestmark = pytest.mark.long
TOKENIZER = routes.build_tokenizer()
BASE = policy()


@pytest.fixture(autouse=True, scope="module")
def saved_base(tmp_path_factory):
    """TRL loads its reference policy from the folder that the policy came from."""
    folder = tmp_path_factory.mktemp("base")
    BASE.save_pretrained(folder)
    BASE.config._name_or_path = str(folder)


def odd(prompts, completions, **_):
    """A reward that an untrained policy earns now and then, and every teacher of these problems too."""
    return [1.0 if "=" in text else float(len(set(text.split())) % 2) for text in completions]


def short(completions, **_):
    return [-0.1 * len(text.split()) for text in completions]


def trained(kind, settings, **options):
    trainer = kind(
        copy.deepcopy(BASE),
        args=settings,
        processing_class=TOKENIZER,
        train_dataset=options.pop("data", dataset()),
        **options,
    )
    trainer.train()
    return trainer


IDENTITY = [
    {},
    {"num_iterations": 2, "beta": 0.1, "epsilon_high": 0.3, "loss_type": "bnpo"},
    {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "loss_type": "grpo", "scale_rewards": "batch"},
]


@pytest.mark.parametrize("overrides", IDENTITY)
def test_without_teachers_parameters_are_trls_bit_for_bit(tmp_path, overrides):
    steps = {"max_steps": 4} | overrides
    theirs = trained(GRPOTrainer, GRPOConfig(**arguments(tmp_path, **steps)), reward_funcs=[odd, short])
    off = config(tmp_path, oger_coef=0.0, oger_hybrid=0, **steps)
    ours = trained(OGERTrainer, off, verifier=odd, reward_funcs=[short])
    assert torch.equal(parameters(ours.model), parameters(theirs.model))
    assert not torch.equal(parameters(ours.model), parameters(BASE))
    with_store = trained(OGERTrainer, off, teachers=store(verifier=odd), reward_funcs=[short])
    assert torch.equal(parameters(with_store.model), parameters(theirs.model))


def test_reading_entropies_leaves_sampling_alone(tmp_path):
    """With a bonus that is always 0 and no traces, all of OGER's machinery runs and nothing may change."""
    theirs = trained(
        GRPOTrainer, GRPOConfig(**arguments(tmp_path, max_steps=3, scale_rewards="none")), reward_funcs=odd
    )
    same = CallableEncoder(lambda texts: torch.ones(len(texts), 3), name="all alike")
    ours = trained(
        OGERTrainer, config(tmp_path, max_steps=3, oger_hybrid=0), teachers=store(verifier=odd), encoder=same
    )
    assert torch.equal(parameters(ours.model), parameters(theirs.model))


class Watched(OGERTrainer):
    """Notes what goes into every loss, and the rollouts before the swap."""

    def __init__(self, *positional, **options):
        self.generated, self.outputs, self.before = [], [], []
        super().__init__(*positional, **options)

    def _build_groups(self, prompts, prompt_ids, completion_ids, completions):
        self.before.append(([list(ids) for ids in completion_ids], list(completions), prompt_ids))
        made = super()._build_groups(prompts, prompt_ids, completion_ids, completions)
        self.generated.append((made, self._captured))
        return made

    def _generate_and_score_completions(self, inputs):
        made = super()._generate_and_score_completions(inputs)
        self.outputs.append((inputs, made))
        return made


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched")
    seen = []

    def other(completions, completion_ids, oger_offline, oger_divergence, **_):
        seen.append((completions, completion_ids, oger_offline))
        return short(completions)

    settings = config(folder, max_steps=3, num_iterations=2, beta=0.05, oger_hybrid=1)
    trainer = trained(Watched, settings, teachers=store(verifier=odd), reward_funcs=[other])
    return trainer, seen


def test_ids_masks_log_probs_and_rewards_of_hybrid_groups_agree(watched):
    trainer, seen = watched
    for (before, texts, prompts), (groups, _), (_, output), (completions, ids, offline) in zip(
        trainer.before, trainer.generated, trainer.outputs, seen, strict=True
    ):
        assert offline == groups.offline.tolist()
        assert groups.offline.view(-1, 4).sum(1).tolist() == [1, 1]
        for row, trace in enumerate(groups.traces):
            expected = list(trace.ids) if trace is not None else before[row]
            assert ids[row] == expected
            assert completions[row] == (trace.text if trace is not None else texts[row])
            length = int(output["completion_mask"][row].sum())
            assert output["completion_ids"][row, :length].tolist() == expected
            assert bool(output["oger_offline"][row]) == (trace is not None)
        assert int(output["num_items_in_batch"]) == sum(map(len, ids))
        rows = (output["completion_ids"], output["completion_mask"], output["old_per_token_logps"])
        log_probs = independent_log_probs(trainer, prompts, *rows[:2])
        if trainer.outputs[0][1] is output:  # later generations were scored by a policy that has moved since
            kept = rows[1].bool()
            torch.testing.assert_close(rows[2][kept], log_probs[kept], atol=1e-4, rtol=0)
            torch.testing.assert_close(output["ref_per_token_logps"][kept], log_probs[kept], atol=1e-4, rtol=0)


def independent_log_probs(trainer, prompts, ids, mask):
    model = copy.deepcopy(BASE).eval()
    found = torch.zeros(ids.shape)
    for row, prompt in enumerate(prompts):
        own = ids[row][mask[row].bool()]
        logits = model(input_ids=torch.cat([torch.tensor(prompt), own])[None]).logits[0, len(prompt) - 1 : -1]
        found[row, : len(own)] = torch.log_softmax(logits, -1).gather(1, own[:, None])[:, 0].detach()
    return found


def test_captured_entropies_equal_those_of_full_logits(tmp_path):
    temperature = 0.7
    settings = config(tmp_path, max_steps=1, temperature=temperature, oger_hybrid=0)
    trainer = trained(Watched, settings, teachers=store(verifier=odd))
    (ids, _, prompts), (_, captured) = trainer.before[0], trainer.generated[0]
    model = copy.deepcopy(BASE).eval()
    for row, (prompt, own) in enumerate(zip(prompts, ids, strict=True)):
        logits = model(input_ids=torch.tensor([prompt + own])).logits[0, len(prompt) - 1 : -1]
        expected = token_entropies(logits, temperature=temperature).detach()
        torch.testing.assert_close(captured[row, : len(own)], expected, atol=1e-4, rtol=1e-4)


def test_a_pass_of_its_own_gives_the_same_entropies(tmp_path):
    """Where generation cannot be watched, as with vLLM, a forward pass takes its place."""
    settings = config(tmp_path, max_steps=1, temperature=0.7)
    trainer = trained(Watched, settings, teachers=store(verifier=odd))
    (ids, _, prompts), (groups, captured) = trainer.before[0], trainer.generated[0]
    trainer.model.load_state_dict(BASE.state_dict())
    width = max(map(len, ids))
    found = trainer._entropies_by_forward(prompts, ids, width)
    for row, own in enumerate(ids):
        torch.testing.assert_close(found[row, : len(own)], captured[row, : len(own)], atol=1e-4, rtol=1e-4)
    assert torch.equal(groups.entropy > 0, (groups.rewards > 0) & ~groups.offline)


def gradient(tmp_path, mode, *, recorded=None, **overrides):
    """Of the first update with plain SGD, and what went into it."""
    rows = [(f"row {i}", row) for i, row in enumerate(routes.teacher_rows(problems_of(), ("S5",)))]
    if recorded is not None:
        rows = [(where, row | {"log_probs": recorded(row)}) for where, row in rows]
    prompts = [(f"prompt {i}", row) for i, row in enumerate(routes.prompt_rows(problems_of()))]
    teachers = TeacherStore.from_rows(prompts, rows, verifier=odd)
    settings = config(
        tmp_path, max_steps=1, optim="sgd", learning_rate=1.0, max_grad_norm=0.0, oger_offline_loss=mode, **overrides
    )
    trainer = trained(Watched, settings, teachers=teachers)
    return parameters(BASE) - parameters(trainer.model), trainer


@functools.cache
def problems_of():
    return routes.split()[0][:16]


def policy_log_probs(row):
    ids = [*TOKENIZER(row["text"])["input_ids"], TOKENIZER.eos_token_id]
    prompt = TOKENIZER(row["prompt_id"])["input_ids"]
    with torch.no_grad():
        logits = copy.deepcopy(BASE).eval()(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()


def expected_gradient(trainer, weigh):
    """Sum of -A w grad log pi over all tokens, divided by their number: the token mean, written out."""
    (_, output), (_, _, prompts) = trainer.outputs[0], trainer.before[0]
    model, loss = copy.deepcopy(BASE), torch.zeros(())
    for row, prompt in enumerate(prompts):
        own = output["completion_ids"][row][output["completion_mask"][row].bool()]
        logits = model(input_ids=torch.cat([torch.tensor(prompt), own])[None]).logits[0, len(prompt) - 1 : -1]
        log_p = torch.log_softmax(logits, -1).gather(1, own[:, None])[:, 0]
        weight = weigh(log_p.detach()) if output["oger_offline"][row] else torch.ones_like(log_p)
        loss = loss - (output["advantages"][row] * weight * log_p).sum()
    loss = loss / output["num_items_in_batch"]
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


WEIGHTS = {
    "on_policy": torch.ones_like,
    "sft": torch.ones_like,
    "shaped": lambda log_p: 0.1 * log_p.exp() / (log_p.exp() + 0.1) ** 2,
}


@pytest.mark.parametrize("mode", list(WEIGHTS))
def test_the_first_updates_gradient_written_out(tmp_path, mode):
    found, trainer = gradient(tmp_path, mode)
    torch.testing.assert_close(found, expected_gradient(trainer, WEIGHTS[mode]), atol=1e-6, rtol=1e-3)
    if mode == "sft":
        (_, output) = trainer.outputs[0]
        assert output["advantages"][output["oger_offline"]].tolist() == [1.0, 1.0]


def test_behavior_with_the_policys_own_log_probs_is_on_policy(tmp_path):
    plain, _ = gradient(tmp_path, "on_policy")
    known, _ = gradient(tmp_path, "behavior", recorded=policy_log_probs)
    torch.testing.assert_close(known, plain, atol=1e-6, rtol=1e-3)
    doubled, trainer = gradient(
        tmp_path, "behavior", epsilon_high=5.0, recorded=lambda row: [value - 0.5 for value in policy_log_probs(row)]
    )
    torch.testing.assert_close(
        doubled, expected_gradient(trainer, lambda log_p: torch.full_like(log_p, 0.5).exp()), atol=1e-6, rtol=1e-3
    )


@pytest.mark.parametrize("loss", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"])
def test_every_loss_type_trains_with_teachers(tmp_path, loss):
    for mode in ("on_policy", "shaped", "sft"):
        trainer = trained(
            OGERTrainer,
            config(tmp_path, max_steps=1, loss_type=loss, epsilon_high=0.3, oger_offline_loss=mode),
            teachers=store(verifier=odd),
        )
        assert torch.isfinite(parameters(trainer.model)).all()
        assert not torch.equal(parameters(trainer.model), parameters(BASE))


@pytest.mark.parametrize(
    ("overrides", "at"),
    [
        ({}, 3),
        ({"num_iterations": 2}, 4),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 4, "per_device_train_batch_size": 4}, 6),
    ],
)
def test_a_resumed_run_is_the_same_run(tmp_path, overrides, at):
    steps = {"max_steps": 2 * at, "save_strategy": "steps", "save_steps": at} | overrides
    whole = trained(OGERTrainer, config(tmp_path, **steps), teachers=store(verifier=odd))
    resumed = OGERTrainer(
        copy.deepcopy(BASE), config(tmp_path, **steps), teachers=store(verifier=odd), processing_class=TOKENIZER
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    assert torch.equal(parameters(resumed.model), parameters(whole.model))
    theirs, ours = whole.state.log_history[-2], resumed.state.log_history[-2]
    assert theirs["step"] == 2 * at
    assert {k: v for k, v in theirs.items() if "oger" in k and "ms" not in k} == {
        k: v for k, v in ours.items() if "oger" in k and "ms" not in k
    }


def test_a_second_epoch_encodes_no_teacher_again(tmp_path):
    trainer = trained(OGERTrainer, config(tmp_path, max_steps=8), teachers=store(4, verifier=odd), data=dataset(4))
    assert trainer.teacher_encodes == 12
    history = trainer.state.log_history
    assert history[0]["oger/teacher_share"] == 0.25
    assert history[0]["oger/offline_solved"] == 1.0


def test_prompts_without_a_teacher_stay_online(tmp_path):
    trainer = trained(Watched, config(tmp_path), teachers=store(8, verifier=odd), data=dataset(16))
    shares = [row["oger/no_teacher_frac"] for row in trainer.state.log_history if "oger/no_teacher_frac" in row]
    assert len(shares) == 2
    for (inputs, output), (groups, _) in zip(trainer.outputs, trainer.generated, strict=True):
        known = {trace.prompt_id for trace in trainer._builder.teachers.store.traces()}
        for start in (0, 4):
            expected = 1 if inputs[start]["id"] in known else 0
            assert int(output["oger_offline"][start : start + 4].sum()) == expected
        assert torch.isfinite(groups.totals).all()
    assert torch.isfinite(parameters(trainer.model)).all()


def test_no_verdict_earns_no_bonus(tmp_path):
    def unsure(prompts, completions, **_):
        return [None if index % 3 == 0 and "=" not in text else 1.0 for index, text in enumerate(completions)]

    trainer = trained(Watched, config(tmp_path, max_steps=1), teachers=store(verifier=unsure))
    (groups, _) = trainer.generated[0]
    (_, output) = trainer.outputs[0]
    nothing = torch.isnan(groups.totals)
    assert nothing.any()
    assert output["advantages"][nothing].eq(0).all()
    assert torch.isfinite(parameters(trainer.model)).all()


def test_evaluation_never_mixes_and_reports_pass_at_k(tmp_path):
    settings = config(
        tmp_path, max_steps=1, eval_strategy="steps", eval_steps=1, num_generations_eval=4, per_device_eval_batch_size=8
    )
    trainer = trained(Watched, settings, teachers=store(verifier=odd), eval_dataset=dataset(4))
    assert len(trainer.generated) == 1
    (scores,) = [row for row in trainer.state.log_history if "eval_pass@1" in row]
    assert scores["eval_pass@1"] == pytest.approx(scores["eval_rewards/odd/mean"])
    assert scores["eval_pass@4"] >= scores["eval_pass@1"]
    assert scores["eval_distinct_correct@4"] >= scores["eval_pass@4"]
    assert "eval_pass@8" not in scores
