"""The figures of a generation on a group made by hand, and pass@k against every possible draw."""

import math
from itertools import combinations

import pytest
import torch
from small_runs import config, problems

from telltale.align.oger import CallableEncoder, TeacherStore
from telltale.align.oger.hybrid import GroupBuilder
from telltale.align.oger.pass_at_k import distinct_correct_at_k, pass_at_k
from telltale.align.oger.tokens import TokenisedTeachers
from telltale.tasks import routes

TOKENIZER = routes.build_tokenizer()


@pytest.mark.parametrize("k", [1, 2, 3, 5, 6])
def test_pass_at_k_is_the_mean_over_all_draws(k):
    """Six samples: two correct by one route, one by another, three wrong."""
    samples = ["S5", "S5", "D2", None, None, None]
    draws = [[route for route in draw if route] for draw in combinations(samples, k)]
    assert pass_at_k(6, 3, k) == pytest.approx(sum(map(bool, draws)) / len(draws))
    expected = sum(len(set(draw)) for draw in draws) / len(draws)
    assert distinct_correct_at_k(6, [2, 1], k) == pytest.approx(expected)


def test_the_metrics_of_a_generation(tmp_path):
    """Two prompts, one of them without a teacher. The teacher points along (1, 0); the rollouts' angles are chosen."""
    taught, untaught = problems(2)
    trace = routes.solution(taught, "S5")
    angles = {"1 = 1": 0.0, "2 = 2": math.pi / 3, "3": math.pi / 2, "4 = 4": math.pi / 2, trace: 0.0}
    encoder = CallableEncoder(
        lambda texts: [[math.cos(angles[text]), math.sin(angles[text])] for text in texts], name="angles"
    )
    store = TeacherStore.from_rows(
        [("", row) for row in routes.prompt_rows([taught, untaught])],
        [("", {"prompt_id": taught.prompt, "teacher": "S5", "text": trace})],
        verifier=routes.verify,
    )
    tokens = TokenisedTeachers(store, TOKENIZER, end_ids=[TOKENIZER.eos_token_id], longest=routes.LONGEST)
    builder = GroupBuilder(config(tmp_path, oger_keep_only_correct=False), tokens, encoder)
    texts = ["1 = 1", "2 = 2", "3", "4 = 4"] * 2
    rewards = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0])
    groups = builder.build(
        [taught.prompt] * 4 + [untaught.prompt] * 4,
        [taught.prompt] * 4 + [untaught.prompt] * 4,
        texts,
        rewards,
        entropy=lambda wanted: torch.where(wanted, math.log(2.0), 0.0),
        generation=0,
    )
    apart = torch.tensor([0.0, 0.5, 1.0, 1.0])
    assert groups.offline.tolist() == [True, *[False] * 7]
    torch.testing.assert_close(groups.totals, torch.tensor([1.0, 1.25, 0.0, 1.5, 0.0, 0.0, 0.0, 1.0]))
    means = {name: total / count if count else math.nan for name, (total, count) in groups.metrics.items()}
    assert means.pop("encode_ms") > 0
    assert means == pytest.approx(
        {
            "divergence": apart.sum().item() / 8,
            "divergence_std": apart.std().item() / 2,
            "entropy_w": 0.5,
            "bonus": 0.75 / 7,
            "online_solved": 4 / 8,
            "offline_solved": 1.0,
            "replaced_correct_frac": 1.0,
            "no_teacher_frac": 0.5,
            "teacher_share": 1 / 8,
            "teacher/S5": 1.0,
        }
    )
