"""A row whose numbers are none ends alone: the others' outputs are those that they have without it, to the bit."""

from __future__ import annotations

import copy

import pytest
import torch

from decode.step_verified.test_shared_prompts import GUARDS, STEPS
from decode.step_verified.tiny_guards import model
from telltale.decode.drafting import FixedPlan
from telltale.decode.engine import FAILED
from telltale.decode.step_verified import StepVerified, StepVerifiedConfig
from telltale.errors import NumericalError
from telltale.tasks import chains

POISON = 31
"""A token whose embedding is not a number, so that a prompt with it has no distribution from there on."""
KINDS = GUARDS | {"copies of the text": (False, {"policy": "speculative", "draft_length": 3})}


def poisoned(seed: int):
    found = copy.deepcopy(model(seed))
    head = copy.deepcopy(found.get_input_embeddings().weight)
    found.lm_head.weight = torch.nn.Parameter(head.detach().clone())
    found.config.tie_word_embeddings = False
    with torch.no_grad():
        found.get_input_embeddings().weight[POISON] = torch.nan
        # It is never drawn.
        found.lm_head.weight[POISON] = 0.0
    return found


@pytest.mark.long
@pytest.mark.parametrize("temperature", [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_others_go_on_as_if_it_had_never_been(kind, temperature):
    drafted, changes = KINDS[kind]
    plan = FixedPlan(0, 3, "ngram") if kind == "copies of the text" else None
    config = StepVerifiedConfig(**STEPS | changes)
    found = StepVerified(poisoned(0), poisoned(1) if drafted else None, chains.tokenizer(), config, plan=plan)
    prompts = [[5, 6, 7, 8, 9, 5, 6], [4, 11, 4, 11, 4], [9, 8, 9, 8]]

    def forbid(ids, scores):
        scores = scores.clone()
        scores[:, POISON] = -torch.inf
        return scores

    def outputs(bad: bool):
        engine, rows = found.engine(prefix_cache=1 << 20), []
        for place, prompt in enumerate([*prompts, [3, POISON, 3]] if bad else prompts):
            request = found.request(
                [prompt],
                max_new_tokens=20,
                temperature=temperature,
                eos_token_id=[],
                generator=torch.Generator().manual_seed(place),
                logits_processor=forbid if temperature else None,
            )
            rows += found.rows(request)
            engine.admit(rows[-1])
        ends = {}
        while engine.rows:
            for one in engine.advance():
                if one.reason is not None:
                    ends[one.number] = one
        assert all(state.branches_in_use == 0 for state in engine.states)
        assert all(not row.length for state in engine.states for row in state.rows)
        return [row.tokens for row in rows[:3]], ends

    alone, _ = outputs(False)
    together, ends = outputs(True)
    assert together == alone
    assert ends[3].reason == FAILED
    assert isinstance(ends[3].failure, NumericalError)
    assert "prompt 3" in str(ends[3].failure)
    assert [ends[place].failure for place in range(3)] == [None] * 3
    with pytest.raises(NumericalError):
        found.generate([[3, POISON, 3]], max_new_tokens=4, temperature=temperature)
