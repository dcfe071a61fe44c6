"""What cannot be right is refused when config or trainer is made, in a sentence that names it."""

import copy

import pytest
from small_runs import config, dataset, policy, store
from trl import GRPOConfig, GRPOTrainer

from telltale.align.oger import CallableEncoder, OGERTrainer
from telltale.align.oger.trl_hooks import ARGUMENTS, check_hooks
from telltale.errors import CheckpointError, ConfigError, DataError, NumericalError, UnsupportedModelError
from telltale.tasks import routes

TOKENIZER = routes.build_tokenizer()


def make(settings, **options):
    options = {"teachers": store(), "processing_class": TOKENIZER, "train_dataset": dataset()} | options
    return OGERTrainer(policy(), settings, **options)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"oger_hybrid": 4}, "oger_hybrid=4 leaves no rollout of num_generations=4"),
        ({"num_generations": 1}, "num_generations=1"),
        ({"oger_coef": -0.5}, "oger_coef=-0.5"),
        ({"oger_gamma": 0.0}, "gamma=0"),
        ({"oger_gamma": -1.0}, "gamma=-1"),
        ({"oger_std_floor": -1.0}, "oger_std_floor=-1"),
        ({"oger_preset": "best"}, "oger_preset='best'"),
        ({"oger_entropy": "first"}, "oger_entropy='first'"),
        ({"oger_similarity": "median"}, "oger_similarity='median'"),
        ({"oger_replaced": "append"}, "oger_replaced='append'"),
        ({"oger_pass_at": (0,)}, "oger_pass_at=0"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**32}, "seed=4294967296"),
        ({"temperature": 0.0}, "temperature=0"),
        ({"oger_offline_loss": "shaped", "num_iterations": 2}, "exact for one policy update per generation"),
        ({"oger_offline_loss": "shaped", "steps_per_generation": 4, "per_device_train_batch_size": 4}, "exact for one"),
        ({"oger_offline_loss": "shaped", "importance_sampling_level": "sequence"}, "one ratio per sequence"),
        ({"use_vllm": True}, "vllm_importance_sampling_correction=True"),
        (
            {"oger_std_floor": 0.1, "multi_objective_aggregation": "normalize_then_sum"},
            "multi_objective_aggregation='normalize_then_sum'",
        ),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "num_generations": 3}, None),
    ],
)
def test_configs(tmp_path, fields, message):
    if message is None:
        assert config(tmp_path, **fields).oger_hybrid == 1
        return
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, **fields)


def test_groups_that_straddle_processes(tmp_path, monkeypatch):
    """Two processes with half a group each: TRL allows it, a swap inside a group does not."""
    monkeypatch.setattr("trl.GRPOConfig.world_size", 2)
    with pytest.raises(ConfigError, match="= 2 rows a process split a group of num_generations=4"):
        config(tmp_path, per_device_train_batch_size=2)


def test_presets_and_what_is_left_of_trl(tmp_path):
    default, paper = config(tmp_path), config(tmp_path, oger_preset="paper")
    assert (default.oger_entropy, default.oger_teacher_advantage, default.scale_rewards) == ("mean", "clamp", "none")
    assert default.oger_keep_only_correct
    assert (paper.oger_entropy, paper.oger_teacher_advantage, paper.scale_rewards) == ("last", "raw", "group")
    assert not paper.oger_keep_only_correct
    assert paper.loss_type == "dapo"
    assert config(tmp_path, oger_preset="paper", oger_entropy="top20").oger_entropy == "top20"
    off, plain = config(tmp_path, oger_coef=0.0, oger_hybrid=0), GRPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    assert (off.scale_rewards, off.loss_type) == (plain.scale_rewards, plain.loss_type)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"teachers": None, "verifier": routes.verify}, ConfigError, "teachers=None"),
        ({"verifier": 3}, ConfigError, "verifier=3 cannot be called"),
        ({"tools": [print]}, UnsupportedModelError, "tools cannot go with teachers"),
        ({"rollout_func": print}, UnsupportedModelError, "rollout_func cannot go with teachers"),
        ({"environment_factory": print}, UnsupportedModelError, "environment_factory cannot go"),
        ({"encoder": "word2vec"}, ConfigError, "encoder='word2vec'"),
        ({"train_dataset": dataset().remove_columns("id")}, DataError, "no column 'id'"),
    ],
)
def test_trainers(tmp_path, options, kind, message):
    with pytest.raises(kind, match=message):
        make(config(tmp_path), **options)


def test_a_config_of_trl_is_no_oger_config(tmp_path):
    with pytest.raises(ConfigError, match="args is a GRPOConfig"):
        make(GRPOConfig(str(tmp_path), use_cpu=True, bf16=False))


def test_traces_that_are_all_too_long(tmp_path):
    with pytest.raises(DataError, match="S5: 16 too long; S10: 16 too long; D2: 16 too long"):
        make(config(tmp_path, max_completion_length=4))


def test_behavior_needs_recorded_log_probs(tmp_path):
    with pytest.raises(ConfigError, match="48 of 48 traces have none"):
        make(config(tmp_path, oger_offline_loss="behavior"))


def test_save_steps_inside_a_generation(tmp_path):
    with pytest.raises(ConfigError, match=r"save_steps=4 falls inside.*a multiple of 3, such as 3"):
        make(config(tmp_path, num_iterations=3, save_strategy="steps", save_steps=4))
    share = make(config(tmp_path, num_iterations=3, save_strategy="steps", save_steps=0.25, max_steps=8))
    with pytest.raises(ConfigError, match="save_steps=2 falls inside"):
        share.train()


@pytest.mark.long
def test_a_resumed_run_has_the_same_seed_and_encoder(tmp_path):
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    make(config(tmp_path, **settings)).train()
    checkpoint = tmp_path / "checkpoint-1"
    with pytest.raises(CheckpointError, match="made with encoder='hidden"):
        make(config(tmp_path, **settings), encoder="ngrams").train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / "oger_state.json").unlink()
    with pytest.raises(CheckpointError, match="expected a checkpoint of an OGERTrainer"):
        make(config(tmp_path, **settings)).train(resume_from_checkpoint=str(checkpoint))


def test_an_encoder_that_trains_is_found_out(tmp_path):
    model = policy()

    def first_rows(texts):
        ids = TOKENIZER(texts, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
        return model.get_input_embeddings()(ids).mean(1)

    encoder = CallableEncoder(first_rows, name="the live policy")
    encoder.module = model
    options = {"teachers": store(), "processing_class": TOKENIZER, "train_dataset": dataset(), "encoder": encoder}
    with pytest.raises(NumericalError, match="the weights of the encoder callable/the live policy changed"):
        OGERTrainer(model, config(tmp_path, max_steps=1), **options).train()


@pytest.mark.parametrize("name", list(ARGUMENTS))
def test_a_hook_that_trl_has_changed_is_named(name):
    class Gone(GRPOTrainer):
        pass

    def another(self, something_else):
        return something_else

    setattr(Gone, name, another)
    with pytest.raises(
        UnsupportedModelError, match=rf"has changed GRPOTrainer\.{name}: its arguments are \(something_else\)"
    ):
        check_hooks(Gone)
    check_hooks(GRPOTrainer)


def test_what_hooks_return_and_read_is_checked_too():
    class Fewer(GRPOTrainer):
        def _generate(self, prompts):
            prompt_ids = completion_ids = prompts
            return prompt_ids, completion_ids

    class Earlier(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            advantages = inputs["advantages"]
            return self._get_per_token_logps_and_entropies(model, advantages, inputs.get("old_per_token_logps"), 1)

    with pytest.raises(UnsupportedModelError, match=r"_generate: it returns \(prompt_ids, completion_ids\)"):
        check_hooks(Fewer)
    with pytest.raises(UnsupportedModelError, match="_compute_loss: it does not read the advantages"):
        check_hooks(Earlier)


def test_a_verifier_among_the_reward_functions_is_not_counted_twice(tmp_path):
    def other(completions, **_):
        return [0.5] * len(completions)

    verifier = copy.copy(routes.verify)
    trainer = make(config(tmp_path, reward_weights=[0.2, 1.0]), reward_funcs=[other, verifier])
    assert trainer.reward_func_names == ["other", "verify"]
    assert trainer._column == 1
