"""Programs on which a guard, or the server in front of it, once did something else than it said; each ends with exit status 0."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from decode.step_verified.tiny_guards import model
from models.tiny_models import tiny_model
from telltale.decode.step_config import FALLBACKS
from telltale.decode.step_verified import StepVerified, StepVerifiedConfig
from telltale.tasks import chains

FOLDER = Path(__file__).parent.parent / "cases"
IN_PROCESS = ("01", "02", "03", "04", "07", "08", "09", "10")
INFINITE = float("inf")
NOTHING_PASSES = {
    "specguard": {"threshold": INFINITE},
    "specguard, the target scores": {"threshold": INFINITE, "signal_model": "target"},
    "verifier": {"policy": "verifier", "threshold": INFINITE},
    "random": {"policy": "random", "accept_rate": 0.0},
    "agreement": {"threshold": INFINITE, "score": "agreement"},
}


def case(number: str) -> Path:
    [path] = FOLDER.glob(f"specguard_{number}_*.py")
    return path


@pytest.mark.long
@pytest.mark.parametrize("number", IN_PROCESS)
def test_a_case_in_this_process(number, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(sys, "argv", [str(case(number))])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(case(number)), run_name="__main__")
    assert not ended.value.code


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of open files")
def test_half_open_headers_in_a_process_of_its_own():
    done = subprocess.run([sys.executable, str(case("05"))], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


@pytest.mark.long
@pytest.mark.parametrize("fallback", FALLBACKS)
@pytest.mark.parametrize("drafts", ["a model", "first layers"])
def test_at_a_threshold_of_infinity_the_target_is_alone_under_every_fallback(fallback, drafts):
    """Another instance of cases 02 and 03: every policy, both ways to draft, a batch; the very tokens of the target alone."""
    base = {"delimiter": "a", "max_step_tokens": 8, "fallback": fallback, "selector": "medoid"}
    own = {} if drafts == "a model" else {"exit_layer": 1}
    draft = model(1) if drafts == "a model" else None
    prompts = [[5, 9, 11, 4], [7, 3], [12] * 20]

    def decoded(**changes):
        config = StepVerifiedConfig(**base | own | changes)
        guard = StepVerified(model(0), draft, chains.tokenizer(), config, verifier=lambda steps: [1.0 for _ in steps])
        chance = torch.Generator().manual_seed(4)
        return guard.generate(prompts, max_new_tokens=30, temperature=0.8, top_p=0.9, eos_token_id=[], generator=chance)

    alone = decoded(policy="target")
    for name, changes in NOTHING_PASSES.items():
        found = decoded(**changes)
        assert found.tokens.equal(alone.tokens), name
        stats = found.stats
        assert (stats.drafted_tokens, stats.target_discarded_tokens, stats.speculated) == (0, 0, 0), name
        assert sum(stats.layer_executions) <= 1.05 * sum(alone.stats.layer_executions), name
        if drafts == "a model":
            assert not sum(stats.draft_layer_executions), name


@pytest.mark.parametrize("fallback", FALLBACKS)
def test_signals_recorded_at_a_threshold_of_infinity_do_not_end_a_target_that_repeats_itself(fallback):
    """Steps are drafted then, for their signals alone, and the limit for repeated drafted steps once cut the target's output."""
    constant = tiny_model("llama", seed=0, vocab_size=32, max_position_embeddings=256)
    with torch.no_grad():
        for weights in constant.parameters():
            if weights.ndim == 2:
                weights.zero_()
        constant.model.embed_tokens.weight.fill_(1.0)
    config = StepVerifiedConfig(
        threshold=INFINITE, fallback=fallback, record_signals=True, max_step_tokens=2, repetition_limit=3
    )
    found = StepVerified(constant, model(1), chains.tokenizer(), config).generate(
        [[5, 9, 11]], max_new_tokens=16, eos_token_id=[]
    )
    assert found.tokens.tolist() == [found.tokens[0, :1].tolist() * 16]
