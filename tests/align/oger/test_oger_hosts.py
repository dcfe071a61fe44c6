"""Where TRL is used in other ways: PEFT, conversations, several processes, log-probabilities from a sampler of its own."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_runs import config, dataset, policy, problems, store

from telltale.align.oger import OGERTrainer, TeacherStore
from telltale.tasks import routes

pytestmark = pytest.mark.long
TOKENIZER = routes.build_tokenizer()


def test_an_adapter_trains_and_the_encoder_reads_the_model_without_it(tmp_path):
    peft = pytest.importorskip("peft")
    base = policy()
    settings = config(tmp_path, max_steps=2, beta=0.1)
    trainer = OGERTrainer(
        copy.deepcopy(base),
        settings,
        teachers=store(),
        processing_class=TOKENIZER,
        train_dataset=dataset(),
        peft_config=peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    )
    plain = OGERTrainer(base, config(tmp_path), teachers=store(), processing_class=TOKENIZER, train_dataset=dataset())
    assert trainer._builder.encoder.identity == plain._builder.encoder.identity
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert moved
    assert all("lora" in name for name in moved)


def conversations():
    """The task as a chat: its own template, its own end of turn."""
    tokenizer = routes.build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }} {% if m['role'] == 'assistant' %}<turn> {% endif %}{% endfor %}"
    )
    rows = [
        {"id": row["id"], "messages": [{"role": "user", "content": row["prompt"]}], "answer": row["answer"]}
        for row in routes.prompt_rows(problems())
    ]
    teachers = TeacherStore.from_rows(
        [("", row) for row in rows], [("", row) for row in routes.teacher_rows(problems())], verifier=routes.verify
    )
    model = policy()
    model.resize_token_embeddings(len(tokenizer))
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<turn>")]
    return tokenizer, teachers, model


def test_conversations_are_mixed_as_the_template_has_it(tmp_path):
    tokenizer, teachers, model = conversations()
    seen = []

    def other(completions, completion_ids, oger_offline, **_):
        seen.extend(zip(completions, completion_ids, oger_offline, strict=True))
        return [0.0] * len(completions)

    trainer = OGERTrainer(
        model, config(tmp_path, max_steps=1), teachers=teachers, processing_class=tokenizer, reward_funcs=[other]
    )
    trainer.train()
    (message,), ids, _ = next(row for row in seen if row[2])
    assert message["role"] == "assistant"
    assert routes.check(routes.read_prompt(_prompt_of(message, teachers)), message["content"])
    assert ids[-1] == tokenizer.convert_tokens_to_ids("<turn>")
    assert len([row for row in seen if row[2]]) == 2


def _prompt_of(message, teachers):
    return next(trace.prompt_id for trace in teachers.traces() if trace.text == message["content"])


def test_log_probabilities_of_another_sampler_stay_in_step(tmp_path):
    """A sampler such as vLLM hands over log-probabilities; a swapped row gets the teacher's, or none, at its own length."""
    found = []

    class Sampler(OGERTrainer):
        def _generate_single_turn(self, *arguments, **options):
            ids, _ = super()._generate_single_turn(*arguments, **options)
            return ids, [[-1.0] * len(own) for own in ids]

        def _generate_and_score_completions(self, inputs):
            found.append(super()._generate_and_score_completions(inputs))
            return found[-1]

    settings = config(tmp_path, max_steps=1, num_generations=4, off_policy_mask_threshold=1.0)
    trainer = Sampler(policy(), settings, teachers=store(), processing_class=TOKENIZER, train_dataset=dataset())
    trainer.train()
    (output,) = found
    offline, mask = output["oger_offline"], output["completion_mask"].bool()
    sampled = output["sampling_per_token_logps"]
    assert sampled.shape == mask.shape
    assert torch.isnan(sampled[offline][mask[offline]]).all()
    assert sampled[~offline][mask[~offline]].eq(-1.0).all()
    assert all(torch.isfinite(value).all() for value in trainer.model.parameters())


WORKER = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import torch
from small_runs import config, dataset, parameters, policy, store
from telltale.align.oger import OGERTrainer
from telltale.tasks import routes

settings = config(sys.argv[1], max_steps=2, per_device_train_batch_size=int(sys.argv[3]))
trainer = OGERTrainer(
    policy(), settings, teachers=store(), processing_class=routes.build_tokenizer(), train_dataset=dataset()
)
drawn = []
build = trainer._build_groups

def watched(*arguments):
    groups = build(*arguments)
    rows = [(row["id"], trace.teacher) for row, trace in zip(trainer._rows, groups.traces) if trace is not None]
    drawn.append(rows)
    return groups

trainer._build_groups = watched
trainer.train()
rank = trainer.accelerator.process_index
document = {
    "drawn": drawn,
    "sum": parameters(trainer.model).double().sum().item(),
    "metrics": [row for row in trainer.state.log_history if "oger/teacher_share" in row],
}
Path(sys.argv[1], f"rank-{trainer.accelerator.num_processes}-{rank}.json").write_text(json.dumps(document))
# Gloo's threads must be gone before the interpreter is.
trainer.accelerator.wait_for_everyone()
trainer.accelerator.end_training()
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_draw_the_same_teachers_as_one(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    here = str(Path(__file__).parent)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = [*launcher, str(script), str(tmp_path), here, "4"]
    one = [sys.executable, str(script), str(tmp_path), here, "8"]
    for command in (two, one):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
    first, second, alone = (json.loads((tmp_path / f"rank-{name}.json").read_text()) for name in ("2-0", "2-1", "1-0"))
    assert first["sum"] == second["sum"]
    for step in range(2):
        assert sorted(first["drawn"][step] + second["drawn"][step]) == sorted(alone["drawn"][step])
    for together, single in zip(first["metrics"], alone["metrics"], strict=True):
        assert together["oger/teacher_share"] == single["oger/teacher_share"] == 0.25
        assert together["oger/teacher_adv"] == pytest.approx(single["oger/teacher_adv"])
        for name in ("S5", "S10", "D2"):
            assert together[f"oger/teacher/{name}"] == single[f"oger/teacher/{name}"]
