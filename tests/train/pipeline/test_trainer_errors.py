"""Bad input to the trainer ends every rank with a named error in good time; none of them is left waiting."""

from __future__ import annotations

from functools import lru_cache

import pytest

from train.pipeline import error_runs
from train.pipeline.rank_runs import run_ranks, values


@lru_cache
def refusals() -> list[dict[str, str]]:
    return values(run_ranks(error_runs.refused, 2))


@pytest.mark.parametrize(
    ("name", "words"),
    {
        "world": "PlanError: the plan 1-1-1 needs 3 processes and 2 were started; expected 3.",
        "fingerprint": "PlanError: the plan was made for another model (fingerprint 0123456789abcdef, this one ",
        "layers": "PlanError: the plan has 4 layers and the model 3; expected as many.",
        "different cuts": "PlanError: ranks were given different models or plans",
        "different policies": "PlanError: ranks were given different",
        "different models": "PlanError: ranks were given different",
        "different clipping": "PlanError: ranks were given different grad_clip: [None, 1.0]",
        "few microbatches": "PlanError: microbatches=2 is too few for 2bw on 1-3; expected at least 3",
        "interleaved": "PlanError: policy='interleaved' has no schedule of ours",
        "no loss": "PlanError: the model is Sequential; expected a LayeredModel",
        "a module": "PlanError: the model is Linear; expected a LayeredModel",
        "prefetch": "ConfigError: prefetch",
        "prefetch type": "ConfigError: prefetch",
        "timeout": "ConfigError: timeout",
        "clip": "ConfigError: grad_clip",
        "reduction": "PlanError: reduction='mean' is unknown",
    }.items(),
)
def test_refused_on_every_rank(name: str, words: str) -> None:
    for told in refusals():
        assert told[name].startswith(words)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "words"),
    {
        "nan": "NumericalError: the loss of minibatch 5 is nan (weight version 5, policy stash); expected a finite number",
        "not scalar": "DataError: the loss has shape (4,); expected a scalar tensor, the mean over the minibatch.",
        "narrowing": "DataError: minibatch 3 sends [4, 7] float32 to the next stage; expected [4, 8] float32",
        "list": "DataError: a layer handed on a list; expected a tensor or a tuple of tensors.",
        "crowd": "DataError: minibatch 0 sends 17 tensors across a cut; expected at most 15.",
        "short": "DataError: minibatch 3 is past the end of the 3 given.",
        "no pair": "DataError: a minibatch is Tensor; expected a pair (inputs, targets).",
        "batches type": "DataError: batches is int; expected a function of the minibatch number, or a sequence.",
        "stop type": "ConfigError: stop",
        "no optimizer": "PlanError: the optimizer factory returned NoneType; expected a torch.optim.Optimizer.",
        "factory": "ValueError: lr may not be a Tuesday",
        "inside a round": "PlanError: start=6 is inside a round; expected a multiple of 4 minibatches.",
        "backwards": "PlanError: stop=2 is before start=4; expected at least start.",
        "evaluate nothing": "ConfigError: count",
    }.items(),
)
def test_a_failing_run_ends_every_rank_with_the_reason(name: str, words: str) -> None:
    """The rank that meets the error raises it; the others raise it too, or a RankFailure that quotes it."""
    outcomes = run_ranks(error_runs.until_it_fails, 2, name, limit=60.0)
    errors = [outcome.error or "nothing" for outcome in outcomes]
    assert any(error.startswith(words) for error in errors), errors
    for rank, error in enumerate(errors):
        assert error.startswith(words) or (error.startswith("RankFailure") and words in error), f"rank {rank}: {error}"
    assert max(outcome.seconds for outcome in outcomes) < error_runs.TIMEOUT
