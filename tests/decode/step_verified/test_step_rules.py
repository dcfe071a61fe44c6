"""Steps that must not pass, outputs that must end, and arguments that are refused."""

from __future__ import annotations

import math

import pytest
import torch

from decode.step_verified import pairs
from telltale.decode import StepVerified, StepVerifiedConfig
from telltale.decode.step_config import Normaliser, Scale, paper
from telltale.decode.stopping import StepText, StopConditions
from telltale.errors import ConfigError, DataError, TelltaleError


class Scripted:
    """A model of the tests' tokenizer that says the same words again and again, whatever came before: one layer of zeros."""

    @staticmethod
    def saying(*tokens: int, seed: int = 3, size: int = 128):
        """A causal LM whose greedy continuation of token t is the token after t in ``tokens``, cyclically."""
        model = pairs.target(hidden_size=size, tie_word_embeddings=False, num_hidden_layers=2, intermediate_size=8)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
            model.model.norm.weight.fill_(1.0)
            embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
            embedding[:, :97] = torch.eye(97)
            after = dict(zip(tokens, [*tokens[1:], tokens[0]], strict=True))
            for token in range(97):
                head[after.get(token, tokens[0]), token] = 1.0
        return model


def decoded(target, draft, *, new=24, config=None, **arguments):
    config = StepVerifiedConfig(**({"beta": 1.0, "threshold": -math.inf, "fallback": "plain"} | (config or {})))
    guard = StepVerified(target, draft, pairs.tokenizer(), config)
    return guard.generate([[1]], max_new_tokens=new, **({"eos_token_id": pairs.EOS} | arguments))


def test_a_draft_that_does_not_end_its_step_is_rejected_and_the_targets_is_kept_and_flagged():
    endless = Scripted.saying(1, 2, 3)
    result = decoded(endless, endless, new=20, config={"max_step_tokens": 6, "repetition_limit": None})
    assert [step.source for step in result.steps[0]] == ["target"] * 3 + ["draft"]
    assert all(step.truncated and step.rejected.reason == "overlong" for step in result.steps[0][:3])
    assert result.stop_reason == ["length"]


def test_a_draft_of_nothing_but_white_space_is_redone_by_the_target():
    class Blank:
        def get_vocab(self):
            return {"a": 1}

        def decode(self, tokens, **_):
            return "".join({7: "\n\n"}.get(token, f"w{token} ") for token in tokens)

    draft, target = Scripted.saying(7, 7), Scripted.saying(4, 5, 7)
    guard = StepVerified(target, draft, Blank(), StepVerifiedConfig(beta=1.0, threshold=-1.0, fallback="plain"))
    result = guard.generate([[1]], max_new_tokens=3, eos_token_id=[])
    assert result.tokens.tolist() == [[4, 5, 7]]
    [step] = result.steps[0]
    assert (step.source, step.rejected.reason, step.rejected.score) == ("target", "blank", None)


def test_a_repeated_draft_is_the_targets_and_endless_repetition_ends_the_output():
    repeating = Scripted.saying(2, 7)
    result = decoded(repeating, repeating, new=90, config={"repetition_limit": 4})
    assert result.stop_reason == ["repetition"]
    assert [step.source for step in result.steps[0]] == ["draft", "target", "target", "target"]
    assert [step.rejected.reason for step in result.steps[0][1:]] == ["repeated"] * 3
    assert result.tokens.tolist() == [[2, 7] * 4]
    assert decoded(repeating, repeating, new=40, config={"repetition_limit": None}).stop_reason == ["length"]


def test_a_target_that_knows_better_breaks_the_repetition():
    result = decoded(Scripted.saying(2, 7, 3, pairs.EOS), Scripted.saying(2, 7), new=90)
    assert result.stop_reason == ["eos"]
    assert result.tokens[0].tolist() == [2, 7, 3, pairs.EOS]


def test_an_end_of_sequence_ends_the_step_and_the_output():
    result = decoded(Scripted.saying(2), Scripted.saying(2, 7, 4, pairs.EOS, 5))
    assert result.stop_reason == ["eos"]
    assert result.tokens.tolist() == [[2, 7, 4, pairs.EOS]]
    assert [step.end for step in result.steps[0]] == ["delimiter", "eos"]


def test_a_stop_string_ends_the_output_with_the_token_that_completes_it():
    model = Scripted.saying(2, 7, 4, 5, 6, 15)
    for policy in ("specguard", "target", "speculative"):
        result = decoded(model, model, config={"policy": policy}, stop_strings="w4 w5")
        assert result.stop_reason == ["stop_string"]
        assert result.tokens.tolist() == [[2, 7, 4, 5]]
        across = decoded(model, model, config={"policy": policy}, stop_strings=["\n\n w4"])
        assert across.tokens.tolist() == [[2, 7, 4]]


def test_the_limit_of_tokens_cuts_a_step_without_blame():
    model = Scripted.saying(2, 3, 4, 7)
    result = decoded(model, model, new=6)
    assert result.tokens.tolist() == [[2, 3, 4, 7, 2, 3]]
    assert [(step.source, step.end) for step in result.steps[0]] == [("draft", "delimiter"), ("draft", "length")]


def test_steps_end_with_the_token_that_completes_the_delimiter_never_inside_one():
    class Bytes:
        """As byte-level tokenizers do: characters may be split, a token may hold the delimiter and more."""

        pieces = (b"a", b"\n", b".\n\n", b"\n\nb", b"\xc3", b"\xa9", b"\n\n")

        def decode(self, tokens, **_):
            return b"".join(self.pieces[token] for token in tokens).decode(errors="replace")

    text = StepText(Bytes(), "\n\n")
    ends = StopConditions(50, frozenset({9}), steps=text, longest_step=10)
    assert ends.reason([], [0]) is None
    assert ends.reason([], [0, 1]) is None
    assert ends.reason([], [0, 1, 1]) == "delimiter"
    assert ends.reason([], [0, 2]) == "delimiter"
    assert ends.reason([], [0, 3]) == "delimiter"
    assert ends.reason([1], [1]) is None
    assert ends.reason([], [4, 5]) is None
    accented = StopConditions(50, steps=StepText(Bytes(), "é"), longest_step=10)
    assert accented.reason([], [4]) is None
    assert accented.reason([], [0, 4, 5]) == "delimiter"
    assert text.blank([1, 6])
    assert not text.blank([2])


BAD_FIELDS = [
    ({"candidates": 0}, "candidates"),
    ({"candidates": 1.5}, "candidates"),
    ({"beta": -0.1}, "beta"),
    ({"beta": 1.1}, "beta"),
    ({"beta": float("nan")}, "beta"),
    ({"threshold": float("nan")}, "threshold"),
    ({"threshold": "high"}, "threshold"),
    ({"policy": "hope"}, "policy"),
    ({"score": "vibes"}, "score"),
    ({"signal_model": "teacher"}, "signal_model"),
    ({"fallback": "retry"}, "fallback"),
    ({"selector": "best"}, "selector"),
    ({"row": "next"}, "row"),
    ({"residual": 2}, "residual"),
    ({"sparsify": 1.0}, "sparsify"),
    ({"grounding_layers": 0}, "grounding_layers"),
    ({"exclude_sinks": -1}, "exclude_sinks"),
    ({"grounding_reduce": "max"}, "grounding_reduce"),
    ({"debias": "position-ecdf"}, "position_quantiles"),
    ({"delimiter": ""}, "delimiter"),
    ({"max_step_tokens": 0}, "max_step_tokens"),
    ({"repetition_limit": 1}, "repetition_limit"),
    ({"policy": "random"}, "accept_rate"),
    ({"policy": "random", "accept_rate": 1.2}, "accept_rate"),
    ({"draft_length": 0}, "draft_length"),
    ({"exit_layer": 0}, "exit_layer"),
    ({"normaliser": Normaliser(kind="group"), "candidates": 1}, "candidates"),
    ({"normaliser": Normaliser(kind="group"), "signal_model": "target"}, "group"),
]


@pytest.mark.parametrize(("fields", "named"), BAD_FIELDS)
def test_a_bad_field_is_refused_by_name(fields, named):
    with pytest.raises(ValueError, match=named) as error:
        StepVerifiedConfig(**fields)
    assert isinstance(error.value, TelltaleError)


def test_the_papers_configuration_is_the_default():
    assert paper(candidates=None) == StepVerifiedConfig()
    assert (paper().candidates, paper().beta, paper().threshold) == (16, 0.3, 0.7)


def test_what_does_not_fit_the_models_is_refused():
    target, draft, tokenizer = pairs.target(), pairs.draft(), pairs.tokenizer()
    with pytest.raises(ConfigError, match="needs a draft"):
        StepVerified(target, None, tokenizer)
    with pytest.raises(ConfigError, match="exit_layer=4 is out of range"):
        StepVerified(target, None, tokenizer, StepVerifiedConfig(exit_layer=4))
    with pytest.raises(ConfigError, match="together with a draft"):
        StepVerified(target, draft, tokenizer, StepVerifiedConfig(exit_layer=2))
    with pytest.raises(DataError, match="tokenizer"):
        StepVerified(target, draft, None)
    with pytest.raises(ConfigError, match="encoder='e5'"):
        StepVerified(target, draft, tokenizer, StepVerifiedConfig(encoder="e5"))
    with pytest.raises(DataError, match="the draft has 50 logits"):
        StepVerified(target, pairs.draft(vocab_size=50), tokenizer)
    guard = StepVerified(target, draft, tokenizer)
    with pytest.raises(ConfigError, match="token"):
        guard.generate([[]], max_new_tokens=4)
    with pytest.raises(ConfigError, match="positions"):
        guard.generate([[1] * 100], max_new_tokens=100)
    with pytest.raises(ConfigError, match=r"draft model.*positions"):
        StepVerified(target, pairs.draft(max_position_embeddings=16), tokenizer).generate([[1] * 10], max_new_tokens=10)
    with pytest.raises(ConfigError, match="temperature"):
        guard.generate([[1]], max_new_tokens=4, temperature=-1)
    with pytest.raises(ConfigError, match="callable that scores"):
        StepVerified(target, draft, tokenizer, StepVerifiedConfig(policy="verifier")).generate([[1]], max_new_tokens=4)


def test_padding_of_the_larger_vocabulary_is_cut_off():
    """Heads of one family are padded to different widths; a token that the draft does not know is never chosen."""
    target = pairs.target(vocab_size=128, tie_word_embeddings=False)
    with torch.no_grad():
        target.lm_head.weight[97:] *= 50
    for policy in ("specguard", "target", "speculative"):
        config = StepVerifiedConfig(policy=policy, threshold=math.inf, repetition_limit=None)
        guard = StepVerified(target, pairs.draft(), pairs.tokenizer(), config)
        result = guard.generate(
            pairs.prompts(3), max_new_tokens=12, eos_token_id=[], temperature=1.0, generator=pairs.seeded()
        )
        assert int(result.tokens.max()) < 97


def test_several_candidates_at_temperature_zero_warn_and_change_nothing():
    target, draft = pairs.target(), pairs.draft()
    one = StepVerified(target, draft, pairs.tokenizer(), StepVerifiedConfig(candidates=1))
    many = StepVerified(target, draft, pairs.tokenizer(), StepVerifiedConfig(candidates=5))
    wanted = one.generate(pairs.prompts(2), max_new_tokens=12)
    with pytest.warns(UserWarning, match="candidates=5 at temperature 0"):
        found = many.generate(pairs.prompts(2), max_new_tokens=12)
    assert pairs.rows_of(found) == pairs.rows_of(wanted)


def test_fewer_layers_than_the_rollout_wants_are_said():
    with pytest.warns(UserWarning, match="the draft has 2 layers"):
        StepVerified(pairs.target(), pairs.draft(num_hidden_layers=2), pairs.tokenizer())


def test_scales_map_to_the_unit_interval_and_refuse_nonsense():
    normaliser = Normaliser(log_probability=Scale(-4.0, 0.0, (-3.0, -2.0, -1.0)), grounding=Scale(0.2, 0.6, (0.3,)))
    assert normaliser.normalised("log_probability", -1.0) == 0.75
    assert normaliser.normalised("log_probability", -9.0) == 0.0
    assert normaliser.normalised("grounding", 0.9) == 1.0
    ecdf = Normaliser("ecdf", normaliser.log_probability, normaliser.grounding)
    assert ecdf.normalised("log_probability", -2.0) == pytest.approx(2 / 3)
    running = Normaliser("running")
    assert running.normalised("grounding", 0.4, among=[0.4]) == 0.5
    assert running.normalised("grounding", 0.4, among=[0.2, 0.6, 0.4]) == pytest.approx(0.5)
    assert Normaliser.from_dict(normaliser.to_dict()) == normaliser
    for low, high in ((1.0, 1.0), (2.0, 1.0), (float("nan"), 1.0), (0.0, math.inf)):
        with pytest.raises(ConfigError, match=r"degenerate|out of range"):
            Scale(low, high)
    with pytest.raises(ConfigError, match="sorted"):
        Scale(0.0, 1.0, (0.5, 0.2))
    with pytest.raises(ConfigError, match="quantiles"):
        Normaliser("ecdf")
    with pytest.raises(ConfigError, match="normaliser"):
        Normaliser("zscore")
    with pytest.raises(ConfigError, match="cannot be read"):
        Normaliser.from_dict({"kind": "minmax"})
