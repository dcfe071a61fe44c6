"""Audits in a running server: who finds what, what ``/metrics`` and ``/v1/models`` say, and what an alarm changes."""

from __future__ import annotations

import urllib.request
from dataclasses import replace

import pytest

from serve.small_servers import STEPS, running, served, wait_for
from telltale.cli.serve import ServeOptions
from telltale.decode.calibration.calibration import Calibration, fingerprints_of
from telltale.decode.calibration.monitor import GuardMonitor
from telltale.decode.calibration.prompts import PromptForm
from telltale.decode.calibration.risk import Tried
from telltale.errors import ConfigError
from telltale.serve.open_model import open_monitor


def guarded(**changes):
    """A served guard with a calibration of its own that covers prompts of up to 20 tokens."""
    found = served("step-verified", replace(STEPS, **changes))
    calibration = Calibration(
        config=found.decoder.config,
        method="crc",
        risk="steps",
        alpha=0.05,
        loss="mean",
        unknown="skip",
        confidence=None,
        n=100,
        fingerprints=fingerprints_of(found.decoder),
        prompts=PromptForm("plain", lengths=(1, 20)),
        labeler="AgreementLabeler",
        sampling={"temperature": 1.0, "top_p": None, "top_k": None},
        tried=(Tried(-1.0, 0.0, 0.01, True, 0.1), Tried(-6.0, 0.02, 0.03, True, 0.5)),
    )
    return replace(found, calibration=calibration)


def ask(server, count=1, prompt="one two", **options):
    return [
        server.client()
        .completions.create(model="small", prompt=prompt, max_tokens=40, temperature=1.0, seed=seed, **options)
        .telltale["calibrated"]
        for seed in range(count)
    ]


def sample(server, name):
    text = urllib.request.urlopen(f"{server.url}/metrics").read().decode()
    [line] = [line for line in text.splitlines() if line.startswith(name)]
    return float(line.split()[-1])


def audits(server):
    import json

    return json.load(urllib.request.urlopen(f"{server.url}/v1/models"))["data"][0]["telltale"]["audits"]


@pytest.mark.long
def test_a_checker_finds_wrong_steps_and_the_promise_is_withdrawn():
    seen = []

    def checker(step):
        seen.append(step)
        return False

    monitor = GuardMonitor(share=1.0, kind="wrong", limit=0.05)
    with running(guarded(), monitor=monitor, checker=checker) as server:
        assert ask(server) == [True]
        # Another threshold, a longer prompt, another temperature: not what was promised, so not audited.
        drawn = sum(monitor.counts.values())
        ask(server, extra_body={"telltale": {"threshold": -9.0}})
        ask(server, prompt="one two three four five six seven eight nine ten " * 3)
        assert sum(monitor.counts.values()) == drawn
        answers = ask(server)
        for _ in range(30):
            if monitor.kept:
                ask(server, 10)
        wait_for(lambda: not monitor.kept)
        assert ask(server) == [False]
        assert audits(server)["promise"] == "withdrawn"
        assert audits(server)["finds"] == "wrong"
        assert sample(server, "telltale_guard_promise") == 0
        assert sample(server, 'telltale_guard_wrong_rate{bound="lower"}') > 0
        assert sample(server, "telltale_guard_evidence") >= 20
        assert sample(server, "telltale_guard_limit") == 0.05
        assert answers[0] is True
    assert all(step.before_text or step.number == 0 for step in seen)
    assert all(step.text and step.prompt_text for step in seen)


@pytest.mark.long
def test_the_target_disagrees_and_no_metric_of_outputs_counts_its_audits():
    monitor = GuardMonitor(share=1.0, kind="disagreement", limit=None)
    with running(guarded(), monitor=monitor) as server:
        ask(server, 12)
        wait_for(lambda: server.held().rows == 0 and sum(monitor.counts.values()) >= 12)
        assert monitor.counts["disagreement"] + monitor.counts["right"] > 0
        assert audits(server)["finds"] == "disagreement"
        assert sample(server, 'telltale_guard_disagreement_rate{bound="upper"}') <= 1
        total = sum(
            server.service.metrics.value("telltale_outputs_total", reason=reason)
            for reason in ("length", "eos", "stop_string", "repetition", "dropped")
        )
        assert total == 12
        text = urllib.request.urlopen(f"{server.url}/metrics").read().decode()
        assert "guard_wrong" not in text
        assert "guard_evidence" not in text


@pytest.mark.long
def test_a_greedy_draft_that_is_the_target_is_never_disagreed_with():
    """With the target in both roles, greedily, every accepted step is the one it would write."""
    from telltale.decode.step_verified import StepVerified
    from telltale.serve.open_model import ServedModel

    pair = served("step-verified")
    target = pair.decoder.target
    config = replace(STEPS, threshold=float("-inf"), candidates=1, delimiter=" ")
    alike = ServedModel("small", StepVerified(target, target, pair.decoder.tokenizer, config), "step-verified")
    monitor = GuardMonitor(share=1.0, kind="disagreement", limit=0.05)
    with running(alike, monitor=monitor) as server:
        for prompt in ("one two", "seven", "the sum", "five is", "three and"):
            server.client().completions.create(model="small", prompt=prompt, max_tokens=60, temperature=0)
        wait_for(lambda: sum(monitor.counts.values()) >= 5)
    assert monitor.counts["disagreement"] == 0
    assert monitor.counts["right"] >= 2


@pytest.mark.long
def test_the_threshold_is_raised_until_nothing_is_accepted():
    monitor = GuardMonitor(share=1.0, kind="wrong", limit=0.05, thresholds=(-1.0,), on_drift="raise")
    with running(guarded(), monitor=monitor, checker=lambda step: False) as server:
        for _ in range(200):
            ask(server)
            if monitor.threshold is not None:
                break
        assert monitor.threshold == -1.0
        assert sample(server, "telltale_guard_threshold") == -1.0
        while monitor.threshold == -1.0:
            monitor.record(True, threshold=-1.0)
        assert monitor.threshold == float("inf")
        answer = server.client().completions.create(model="small", prompt="one", max_tokens=20, seed=1)
        assert answer.choices[0].telltale["accepted_tokens"] == answer.choices[0].telltale["rejected_tokens"] == 0
        assert answer.telltale["calibrated"] is False


@pytest.mark.long
def test_a_checker_that_fails_is_an_audit_that_is_left_out():
    def checker(step):
        raise ValueError(step.text)

    monitor = GuardMonitor(share=1.0, kind="wrong", limit=0.05)
    with running(guarded(), monitor=monitor, checker=checker) as server:
        ask(server, 10)
        wait_for(lambda: monitor.counts["skipped"] > 0)
        assert monitor.kept
        assert sample(server, "telltale_guard_watched") == 0
        assert audits(server)["watching"] is False
        assert monitor.counts["wrong"] == 0


def test_options_of_audits_that_do_not_go_together_are_refused():
    found = guarded()
    monitor, checker = open_monitor(found, share=0.5)
    assert (monitor.kind, monitor.limit, checker) == ("disagreement", 0.05, None)
    monitor, checker = open_monitor(found, share=0.5, by="gsm8k")
    assert (monitor.kind, monitor.limit) == ("wrong", None)
    assert checker is not None
    with pytest.raises(ConfigError, match="give --audit-limit"):
        open_monitor(found, share=0.5, by="gsm8k", on_drift="raise")
    assert open_monitor(found, share=0.5, by="gsm8k", limit=0.2, on_drift="raise")[0].describe()["limit"] == 0.2
    with pytest.raises(ConfigError, match="drafts none"):
        open_monitor(served("autoregressive"), share=0.5)
    with pytest.raises(ConfigError, match="by='nobody'"):
        open_monitor(found, share=0.5, by="nobody")
    for unused in ({"audit_by": "gsm8k"}, {"audit_limit": 0.1}, {"on_drift": "raise"}):
        with pytest.raises(ConfigError, match="do nothing without --audit-share"):
            ServeOptions(**unused).audits(found)
    assert ServeOptions().audits(found) == (None, None)
    assert ServeOptions(audit_share=0.25).audits(found)[0].share == 0.25
