"""Levels are earned: certificates pass, fail and abstain where they must; bundles replay and tell of any tampering."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from telltale.errors import CheckpointError, ConfigError, DataError
from telltale.world import certify, collect, evaluate, fit, make, verify
from telltale.world.certificate import THRESHOLDS, Certificate, Condition
from telltale.world.coherence import coherence
from telltale.world.collection import episodes
from telltale.world.failures import failures
from telltale.world.mrep import seal

ORDERS = make("digital/orders")
PENDULUM = make("physical/Pendulum-v1")
CHEAP = {"samples": 12, "iterations": 1, "horizon": 8}


def statuses(certificate):
    return {name: condition.status for name, condition in certificate.conditions.items()}


@pytest.fixture(scope="module")
def program():
    return fit("program", collect(ORDERS, steps=1000, seed=1), world=ORDERS)


@pytest.fixture(scope="module")
def earned(program):
    return certify(program, ORDERS, 2)


class TestLevels:
    def test_a_good_program_earns_level_two(self, earned):
        assert set(statuses(earned).values()) == {"pass"}
        assert earned.level == 2
        assert earned.passed

    def test_untested_and_inconclusive_never_pass(self):
        def condition(level, status):
            return Condition(level, status, "")

        for status in ("untested", "inconclusive", "fail"):
            found = Certificate(
                "w", "m", 2, {"a": condition(1, "pass"), "b": condition(2, "pass"), "c": condition(2, status)}
            )
            assert found.level == 1
            assert not found.passed
        assert Certificate("w", "m", 2, {"a": condition(1, "fail"), "b": condition(2, "pass")}).level == 0
        assert Certificate("w", "m", 2, {"a": condition(1, "pass")}).level == 1

    def test_fewer_than_thirty_starts_are_inconclusive(self, program):
        assert statuses(certify(program, ORDERS, 2, episodes=5))["coherence"] == "inconclusive"

    def test_no_laws_is_untested(self, program):
        assert statuses(certify(program, ORDERS, 2, episodes=2, laws=[]))["consistency"] == "untested"

    @pytest.mark.slow
    def test_a_program_that_ignores_payment_fails(self, program):
        class Generous:
            def step(self, belief, action):
                return program.step(belief, 6 if action == 5 else action)

        found = certify(Generous(), ORDERS, 2, episodes=30)
        assert statuses(found)["coherence"] == "fail"
        assert found.level < 2

    @pytest.mark.parametrize("level", [0, 3, "2"])
    def test_other_levels_are_refused(self, program, level):
        with pytest.raises(ConfigError, match="level"):
            certify(program, ORDERS, level)

    def test_held_out_means_held_out(self):
        data = collect(PENDULUM, steps=100, seed=0)
        with pytest.raises(DataError, match="fitted on"):
            certify(PENDULUM.oracle(), PENDULUM, 1, held_out=data, fitted_on=data)

    def test_the_table_has_a_meaning_for_every_number(self):
        assert all(threshold.meaning for threshold in THRESHOLDS.values())


class TestNumericWorlds:
    """One cheap planner on short runs: conditions that do not need a good one."""

    @pytest.fixture(scope="class")
    @classmethod
    def data(cls):
        return collect(PENDULUM, steps=600, seed=0)

    def test_the_oracle_is_sensitive_and_consistent(self):
        found = certify(PENDULUM.oracle(), PENDULUM, 2, episodes=1, **CHEAP)
        assert statuses(found)["sensitivity"] == "pass"
        assert statuses(found)["consistency"] == "pass"
        assert found.conditions["sensitivity"].figures["ratio"] == pytest.approx(1, abs=1e-3)
        assert found.conditions["coherence"].figures["reach"] == 50

    def test_a_deaf_model_predicts_well_and_fails_sensitivity(self, data):
        deaf = fit("ensemble", data, world=PENDULUM, hears_actions=False, epochs=25, hidden=32, members=2)
        found = certify(deaf, PENDULUM, 2, episodes=1, **CHEAP)
        assert found.conditions["likelihood"].figures["one_step_r_squared"] > 0.9
        assert found.conditions["sensitivity"].figures["divergence"] == 0.0
        assert statuses(found)["sensitivity"] == "fail"
        labels = [failure.label for failure in failures(found, deaf, PENDULUM)]
        assert labels == ["insensitivity"]

    def test_a_lawless_model_fails_consistency_though_enforcement_hides_it(self):
        class Lawless:
            def step(self, belief, action):
                return PENDULUM.oracle().step(belief, action).belief * 1.2

        found = certify(Lawless(), PENDULUM, 2, episodes=1, **CHEAP).conditions["consistency"]
        assert found.figures["enforced"] == 0.0
        assert found.figures["raw"] > 0.9
        assert found.status == "fail"
        assert "enforced only" in found.reason

    def test_a_world_without_oracle_or_laws_is_untested_there(self):
        world = make("Pendulum-v1", success_return=-200.0, reward=PENDULUM.reward, max_steps=30)
        found = certify(PENDULUM.oracle(), world, 2, episodes=1, **CHEAP)
        assert statuses(found)["coherence"] == "untested"
        assert statuses(found)["consistency"] == "untested"
        assert statuses(found)["sensitivity"] == "pass"  # the engine itself was replayed

    def test_a_model_that_breaks_down_on_perturbed_inputs_fails_robustness(self):
        class Brittle:
            def step(self, belief, action):
                return torch.where(belief.abs() > 9, torch.nan, belief)

        found = certify(Brittle(), PENDULUM, 1)
        assert statuses(found)["robustness"] == "fail"
        assert statuses(found)["likelihood"] == "fail"

    def test_the_error_by_horizon_grows_for_a_biased_model_and_is_nil_for_the_oracle(self):
        played = episodes(PENDULUM, steps=400, seed=3)

        class Biased:
            def step(self, belief, action):
                return PENDULUM.oracle().step(belief, action).belief + torch.tensor([0.0, 0.0, 0.05])

        exact, biased = (coherence(m, PENDULUM, played, length=30) for m in (PENDULUM.oracle(), Biased()))
        assert max(exact.errors) < 1e-4
        assert biased.errors[29] > 1.5 * biased.errors[2] > 1.5 * biased.errors[0]
        assert biased.reach(0.5, above_floor=False) <= exact.reach(0.5, above_floor=False) == 30


class TestEvaluation:
    def test_starts_are_paired_and_batches_do_not_matter(self):
        one, two = (evaluate(PENDULUM.oracle(), PENDULUM, episodes=3, batch=b, max_steps=15, **CHEAP) for b in (1, 3))
        assert one.seeds == two.seeds == [9000, 9001, 9002]
        assert one.returns == pytest.approx(two.returns, rel=1e-3)

    def test_the_record_holds_what_a_reader_needs(self):
        record = evaluate(PENDULUM.oracle(), PENDULUM, episodes=1, max_steps=5, **CHEAP).records[0]
        assert len(record.predicted) == len(record.broken) == len(record.episode) == 5
        torch.testing.assert_close(
            record.predicted[2], PENDULUM.belief(record.episode.observations[3]), atol=1e-5, rtol=1e-5
        )

    @pytest.mark.parametrize(
        "wrong", [{"episodes": 0}, {"batch": 0}, {"reward": "guessed"}, {"mode": "hope"}, {"horizon": -1}]
    )
    def test_arguments_out_of_range(self, wrong):
        with pytest.raises(ConfigError):
            evaluate(PENDULUM.oracle(), PENDULUM, **{"episodes": 1, **wrong})


class TestBundle:
    @pytest.fixture(scope="class")
    @classmethod
    def bundle(cls, tmp_path_factory, earned, program):
        return earned.save(tmp_path_factory.mktemp("bundles") / "orders", model=program)

    def test_what_is_in_it(self, bundle):
        names = {path.name for path in bundle.iterdir()}
        assert names == {
            "manifest.json", "traces", "stats.json", "failures.json", "coverage.json", "certificate.json", "card.md", "page.html",
        }  # fmt: skip
        assert "**Level 2, earned.**" in (bundle / "card.md").read_text()
        assert "Not tested" in (bundle / "page.html").read_text()
        coverage = json.loads((bundle / "coverage.json").read_text())
        assert coverage["digital"]["coherence"] == {"label": "S", "test": "certify:coherence"}
        assert coverage["social"]["coherence"]["label"] == "-"

    def test_an_untouched_bundle_verifies_and_every_episode_replays(self, bundle):
        found = verify(bundle)
        assert found.ok, found.findings
        assert found.replayed == found.episodes == 30

    @pytest.mark.parametrize(
        ("file", "old", "new"),
        [
            ("traces/episode-0007.jsonl", '"reward": 0.0', '"reward": 0.1'),
            ("stats.json", '"asr": 1.0', '"asr": 0.9'),
            ("manifest.json", "9003", "9005"),
            ("manifest.json", '"sqlite": "3', '"sqlite": "2'),
            ("certificate.json", '"level": 2', '"level": 3'),
            ("card.md", "Level 2", "Level 3"),
        ],
    )
    def test_any_change_is_found_and_its_file_named(self, bundle, tmp_path, file, old, new):
        copy = shutil.copytree(bundle, tmp_path / "copy")
        text = (copy / file).read_text()
        assert old in text
        (copy / file).write_text(text.replace(old, new, 1))
        found = verify(copy)
        assert not found.ok
        assert file in {finding.file for finding in found.findings}

    def test_a_forger_who_seals_again_is_found_by_the_replay(self, bundle, tmp_path):
        import hashlib

        copy = shutil.copytree(bundle, tmp_path / "copy")
        trace = copy / "traces" / "episode-0000.jsonl"
        head, *rows = trace.read_text().splitlines()
        row = json.loads(rows[0])
        row["next"][2] += 1
        trace.write_text("\n".join([head, json.dumps(row), *rows[1:]]) + "\n")
        manifest = json.loads((copy / "manifest.json").read_text())
        manifest["files"]["traces/episode-0000.jsonl"] = hashlib.sha256(trace.read_bytes()).hexdigest()
        manifest["seal"] = seal(manifest)
        (copy / "manifest.json").write_text(json.dumps(manifest))
        found = verify(copy)
        assert [finding.file for finding in found.findings] == ["traces/episode-0000.jsonl"]
        assert "engine" in found.findings[0].problem

    @staticmethod
    def sealed_again(bundle, tmp_path, file, edit):
        """A copy in which ``edit`` changed the JSON of ``file``, by a forger who sets every hash right."""
        import hashlib

        copy = shutil.copytree(bundle, tmp_path / "copy")
        document = json.loads((copy / file).read_text())
        edit(document)
        (copy / file).write_text(json.dumps(document))
        manifest = json.loads((copy / "manifest.json").read_text())
        if file != "manifest.json":
            manifest["files"][file] = hashlib.sha256((copy / file).read_bytes()).hexdigest()
        manifest["seal"] = seal(manifest)
        (copy / "manifest.json").write_text(json.dumps(manifest))
        return {finding.file for finding in verify(copy).findings}

    @pytest.mark.parametrize(
        ("file", "edit"),
        [
            ("certificate.json", lambda d: d.update(level=1)),
            ("certificate.json", lambda d: d.update(asr=0.5)),
            ("certificate.json", lambda d: d["conditions"]["coherence"].update(status="fail")),
            ("certificate.json", lambda d: d.update(conditions=5)),
            ("manifest.json", lambda d: d.update(level_claimed=1)),
            ("manifest.json", lambda d: d["world"].update(task_hash="0" * 64)),
            ("manifest.json", lambda d: d["world"]["settings"].update(nonsense=1)),
            ("manifest.json", lambda d: d["world"]["engines"].update(sqlite="3.0")),
            ("manifest.json", lambda d: d.update(seeds=d["seeds"][::-1])),
            ("coverage.json", lambda d: d["social"]["coherence"].update(label="S")),
            ("failures.json", lambda d: d["failures"].append({"seed": 1, "label": "drift"})),
            ("stats.json", lambda d: d.update(worst_decile=0.5)),
            ("stats.json", lambda d: d["returns"].reverse() or d.update(steps=[])),
        ],
    )
    def test_what_follows_from_something_else_is_computed_again(self, bundle, tmp_path, file, edit):
        assert file in self.sealed_again(bundle, tmp_path, file, edit)

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "[]\n",
            "{}\n",
            '{"seed": 9000, "success": true}\n{"t": 0}\n',
            '{"seed": 9000, "success": true}\n5\n',
            "\x00{",
        ],
    )
    def test_a_trace_that_is_none_is_a_finding_and_no_crash(self, bundle, tmp_path, text):
        copy = shutil.copytree(bundle, tmp_path / "copy")
        (copy / "traces" / "episode-0003.jsonl").write_text(text)
        assert "traces/episode-0003.jsonl" in {finding.file for finding in verify(copy).findings}

    @pytest.mark.parametrize(
        "file", ["stats.json", "certificate.json", "coverage.json", "failures.json", "manifest.json"]
    )
    @pytest.mark.parametrize("text", ["[]", "not json", "{}"])
    def test_a_document_that_is_none_is_a_finding_and_no_crash(self, bundle, tmp_path, file, text):
        copy = shutil.copytree(bundle, tmp_path / "copy")
        (copy / file).write_text(text)
        assert file in {finding.file for finding in verify(copy).findings}

    def test_a_replay_in_another_process_gives_the_same(self, bundle):
        import subprocess
        import sys

        script = f"from telltale.world import verify; f = verify({str(bundle)!r}); print(f.ok, f.replayed)"
        environment = {"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "77"}
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True
        )
        assert done.stdout.split() == ["True", "30"]

    def test_missing_and_added_files(self, bundle, tmp_path):
        copy = shutil.copytree(bundle, tmp_path / "copy")
        (copy / "card.md").unlink()
        (copy / "more.txt").write_text("x")
        assert {"card.md", "more.txt"} <= {finding.file for finding in verify(copy).findings}

    def test_no_bundle_is_an_error(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            verify(tmp_path)

    @pytest.mark.parametrize(
        "name",
        [
            "physical/Pendulum-v1",
            "physical/Acrobot-v1",
            "physical/Reacher-v5",
            "social/kuhn_poker",
            "scientific/enzyme",
            "digital/files",
        ],
    )
    def test_other_engines_replay_bit_for_bit_too(self, name, tmp_path):
        world = make(name)
        settings = {} if world.plain else CHEAP
        found = verify(evaluate(world.oracle(), world, episodes=2, max_steps=12, **settings).save(tmp_path / "bundle"))
        assert found.ok, found.findings
        assert found.replayed == 2

    def test_a_world_of_the_users_own_is_replayed_where_it_is_given(self, tmp_path):
        def drift(state, action):
            return 0.9 * state + action

        from gymnasium import spaces

        world = make(
            drift, initial=lambda rng: rng.normal(size=1), action_space=spaces.Box(-1, 1, (1,)), success=lambda e: True,
            reward=lambda b, a, c: -c[..., 0] ** 2, max_steps=6,
        )  # fmt: skip
        bundle = evaluate(world.oracle(), world, episodes=1, samples=12, iterations=1).save(tmp_path / "b")
        alone = verify(bundle)
        assert alone.ok
        assert "not replayed" in alone.replay
        assert verify(bundle, world=world).replayed == 1


def test_the_docs_print_the_table_of_thresholds():
    from pathlib import Path

    page = (Path(__file__).parents[2] / "docs" / "world" / "tutorial.md").read_text()
    for name, threshold in THRESHOLDS.items():
        assert f"| `{name}` | {threshold.value:g} | {threshold.meaning} |" in page
