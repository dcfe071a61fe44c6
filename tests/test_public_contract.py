"""The public contract: every documented name by its documented path, its signature, the commands and what an import costs.

The tables are written by hand, not read from the code: a name that goes, a default that changes or a parameter that loses
its place fails here. A signature may gain parameters that have defaults.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib
import inspect
import json
import subprocess
import sys
import types

import pytest

GENERATE = (
    "(self, input_ids, *, max_new_tokens, eos_token_id=None, temperature=0.0, top_k=None, top_p=None, generator=None, "
    "attention_mask=None, logits_processor=None, stop_strings=None, tokenizer=None, pad_token_id=None)"
)
ALPHAS = "(0.0001, 0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0)"

SIGNATURES = {
    "telltale.load": "(path, *, dtype=None, device=None, weights=None)",
    # decode
    "telltale.decode.Autoregressive": "(model, *, backend='auto', exactness='fast')",
    "telltale.decode.Autoregressive.generate": GENERATE,
    "telltale.decode.Autoregressive.stream": GENERATE,
    "telltale.decode.SelfSpeculative": "(model, exit_layer='auto', draft_length='auto', *, drafter='exit', "
    "exactness='fast', confidence=None, backend='auto')",
    "telltale.decode.SelfSpeculative.generate": GENERATE,
    "telltale.decode.SelfSpeculative.stream": GENERATE,
    "telltale.decode.StepVerified": "(target, draft, tokenizer, config=None, *, verifier=None, encoder=None, backend='auto')",
    "telltale.decode.StepVerified.generate": GENERATE,
    "telltale.decode.StepVerified.stream": GENERATE,
    "telltale.decode.StepVerifiedConfig": "(*, policy='specguard', score='ensemble', threshold=0.7, beta=0.3, candidates=None, "
    "signal_model='draft', fallback='k-sample', selector='medoid', encoder='hashed', row='self', residual=0.0, "
    "grounding_layers=3, log_probability_reduce='min', grounding_reduce='min', debias='none', normaliser=FACTORY, "
    "position_quantiles=(), delimiter='\\n\\n', max_step_tokens=256, repetition_limit=8, accept_rate=None, exit_layer=None, "
    "draft_length=4, record_signals=False)",
    "telltale.decode.DecodeResult": "(tokens, lengths, stop_reason, stats)",
    "telltale.decode.custom_generate": "(model, input_ids, logits_processor=None, stopping_criteria=None, "
    "generation_config=None, *, exit_layer='auto', draft_length='auto', drafter='exit', exactness='fast', backend='auto', "
    "token_streamer=None, streamer=None, **model_inputs)",
    "telltale.decode.step_verified.calibrate": "(guard, problems, labeler, *, alpha=0.05, method='crc', risk=None, "
    "confidence=0.9, loss='mean', unknown='skip', beta=None, normaliser=None, extremes='robust', debias=None, "
    "sampling=None, seed=0, split=(0.3, 0.5, 0.2), rounds=3, batch=32, store=None, on_problems=None)",
    "telltale.decode.step_verified.paper": "(**overrides)",
    "telltale.decode.step_verified.register_encoder": "(name)",
    "telltale.decode.step_verified.Calibration.load": "(path)",
    "telltale.decode.step_verified.Calibration.save": "(self, path)",
    "telltale.decode.step_verified.Calibration.guard": "(self, target, draft, tokenizer, **options)",
    # signals
    "telltale.signals.diversity.consistency_medoid": "(embeddings)",
    "telltale.signals.grounding.grounding_from_blocks": "(blocks, *, residual=0.0)",
    # train
    "telltale.train.train": "(model, corpus, config, *, run_dir, layerskip=None, tokenizer=None, resume=False, callbacks=())",
    "telltale.train.TrainConfig": "(*, steps=800, batch_size=16, sequence_length=128, learning_rate=0.002, weight_decay=0.1, "
    "betas=(0.9, 0.95), warmup_steps=50, schedule='cosine', grad_clip=1.0, gradient_accumulation=1, "
    "activation_checkpointing=False, precision='bfloat16', seed=0, data_seed=None, log_every=10, evaluate_every=100, "
    "evaluation_tokens=16384, checkpoint_every=100)",
    "telltale.train.TrainResult": "(step, finished, run_path, model_path, quality, seconds)",
    "telltale.train.layerskip.LayerSkipConfig": "(*, p_max=0.1, e_scale=1.0, curriculum='rotational', rotation=None, "
    "time_schedule='const', total_steps=None, always_last=True, exit_target='label', distillation_temperature=1.0, seed=0)",
    "telltale.train.layerskip.layer_dropout_rates": "(n_layers, config, step)",
    "telltale.train.layerskip.exit_loss_weights": "(n_layers, config, step)",
    "telltale.train.layerskip.apply": "(model, config)",
    # train.pipeline
    "telltale.train.pipeline.Layer": "(name, module, call)",
    "telltale.train.pipeline.LayerProfile": "(name, forward, backward, activation_bytes, parameter_bytes, "
    "saved_bytes=0.0, update=0.0)",
    "telltale.train.pipeline.LayeredModel": "(root, layers, inputs, loss)",
    "telltale.train.pipeline.Level": "(count, bandwidth)",
    "telltale.train.pipeline.PipelineTrainer": "(model, plan, *, optimizer, loss=None, schedule=None, discount=None, "
    "replica_rates=True, grad_clip=None, reduction='all_reduce', recompute=None, prefetch=2, seed=0, timeout=300.0, "
    "record=False, device=None)",
    "telltale.train.pipeline.PipelineTrainer.train": "(self, batches, *, stop)",
    "telltale.train.pipeline.PipelineTrainer.fit": "(self, batches, *, stop, directory=None, save_every=None, keep=2, "
    "resume=True, on_progress=None)",
    "telltale.train.pipeline.PipelineTrainer.save": "(self, directory, *, keep=2)",
    "telltale.train.pipeline.PipelineTrainer.resume": "(self, directory, *, switch_policy=False)",
    "telltale.train.pipeline.PipelineTrainer.export": "(self, path, *, tokenizer=None)",
    "telltale.train.pipeline.PipelineTrainer.evaluate": "(self, batches, count)",
    "telltale.train.pipeline.TorchPipelineTrainer": "(model, plan, *, optimizer, loss=None, schedule=None, grad_clip=None, "
    "zero_bubble=False, recompute=None, seed=0, timeout=300.0, device=None)",
    "telltale.train.pipeline.TorchPipelineTrainer.train": "(self, batches, *, stop)",
    "telltale.train.pipeline.Plan": "(stages, policy='stash', microbatches=1, bottleneck=0.0, cost_model='ring', "
    "recompute=False, chunks=1, fingerprint=None, reasons=(), placement=None)",
    "telltale.train.pipeline.Plan.describe": "(self)",
    "telltale.train.pipeline.Plan.even": "(n_layers, n_stages, **fields)",
    "telltale.train.pipeline.Plan.manual": "(stages, *, replicas=None, policy='stash', microbatches=1, **fields)",
    "telltale.train.pipeline.Plan.load": "(path)",
    "telltale.train.pipeline.Plan.save": "(self, path)",
    "telltale.train.pipeline.PlannedStage": "(layers, replicas, names=(), compute=0.0, synchronisation=0.0, cut_bytes=0.0, "
    "memory=None)",
    "telltale.train.pipeline.PlanInfeasible": None,
    "telltale.train.pipeline.RankFailure": None,
    "telltale.train.pipeline.Profile": "(layers, edges=None, step_seconds=None, batch_size=None, threads=None, device='cpu', "
    "fingerprint=None, optimizer_bytes_per_parameter_byte=2.0)",
    "telltale.train.pipeline.Profile.load": "(path)",
    "telltale.train.pipeline.Profile.save": "(self, path)",
    "telltale.train.pipeline.RateDiscount": "(annealing_updates)",
    "telltale.train.pipeline.Timeline": "(events, replicas, policy, microbatches=1, alignment=1, chunks=1, recompute=False, "
    "label='simulated', sizes=None)",
    "telltale.train.pipeline.Timeline.load": "(path)",
    "telltale.train.pipeline.Timeline.save": "(self, path)",
    "telltale.train.pipeline.Timeline.compare": "(self, other)",
    "telltale.train.pipeline.Timeline.chrome_trace": "(self)",
    "telltale.train.pipeline.Topology": "(levels, device_memory=None, latency=0.0, shared_link=False)",
    "telltale.train.pipeline.Topology.flat": "(workers, *, bandwidth, **fields)",
    "telltale.train.pipeline.Topology.load": "(path)",
    "telltale.train.pipeline.Topology.save": "(self, path)",
    "telltale.train.pipeline.calibrated": "(profile, timeline, plan, *, topology=None)",
    "telltale.train.pipeline.delay_aware_nadam": "(learning_rate, *, beta1=0.99, weight_decay=0.0, **options)",
    "telltale.train.pipeline.explain": "(plan, profile, topology, *, cost_model=None, directions=2)",
    "telltale.train.pipeline.plan": "(profile, topology, *, cost_model='ring', policy=None, memory=None, microbatches=None, "
    "recompute=None, use_all_workers=True, full_duplex=False, max_stages=None, synchronous=False, chunks=2)",
    "telltale.train.pipeline.profile": "(model, example, *, loss=None, repeats=10, warm_up=3, optimizer=None, threads=None, "
    "device=None)",
    "telltale.train.pipeline.reference.train": "(model, plan, batches, *, optimizer, stop, loss=None, schedule=None, "
    "discount=None, replica_rates=True, grad_clip=None, seed=0, on_update=None)",
    "telltale.train.pipeline.sequential": "(model, loss)",
    "telltale.train.pipeline.simulate": "(plan, profile, topology, *, minibatches=None, start=0, overhead=0.0, overlap=True, "
    "link_model='port')",
    "telltale.train.pipeline.split": "(model, *, loss=None, layerskip=None, minibatches_per_step=1, example=None)",
    "telltale.train.pipeline.untie": "(model)",
    # train.sharpness
    "telltale.train.sharpness.Comparison": "(rows, runs, seeds, level, intervals)",
    "telltale.train.sharpness.Edge": "(name, rate=1.0, momentum=0.0, gain=1.0, nesterov=False, decay=0.0, coupled=0.0)",
    "telltale.train.sharpness.Point": "(name, measures, gaps, settings=FACTORY, seed=None)",
    "telltale.train.sharpness.Probe": "(model, loss_fn, batches, *, mode='as is', seed=0)",
    "telltale.train.sharpness.Reading": "(step, lambda_max, lambda_min, error, rate, threshold, ratio, ratio_error, state, "
    "loss, slope, sd, sd_interval, no_curvature, cost_seconds, cost_share, interval, probe_loss=None)",
    "telltale.train.sharpness.Sharpness": "(sd, interval, level, codimension, breakdown, conditioning, spectrum, jacobian, "
    "aggregate, rate, threshold, exponents, controls, no_curvature, excluded)",
    "telltale.train.sharpness.Sharpness.load": "(path)",
    "telltale.train.sharpness.Sharpness.save": "(self, path)",
    "telltale.train.sharpness.SharpnessMonitor": "(model, loss_fn, probe, *, optimizer, budget=0.05, every='auto', "
    "sd_every=None, sd_runs=10, sd_steps=20, steps=6, jacobian='optimizer', mode='no dropout', seed=0, start=0, run_dir=None, "
    "on_reading=())",
    "telltale.train.sharpness.SharpnessMonitor.step": "(self, loss=None)",
    "telltale.train.sharpness.SharpnessMonitor.check": "(self, loss=None)",
    "telltale.train.sharpness.SharpnessMonitor.measure": "(self)",
    "telltale.train.sharpness.SharpnessMonitor.close": "(self)",
    "telltale.train.sharpness.compare": "(points, *, measures=None, gaps=None, given=(), level=0.95, resamples=1000, seed=0)",
    "telltale.train.sharpness.edge_of": "(optimizer, **hyper)",
    "telltale.train.sharpness.granulated": "(measure, gap, settings, *, blocks=None)",
    "telltale.train.sharpness.kendall_tau": "(x, y)",
    "telltale.train.sharpness.language_model_loss": "(model, batch)",
    "telltale.train.sharpness.measure": "(model, loss_fn, batches, *, optimizer=None, rate=None, runs=30, steps=25, "
    "jacobian='gd', aggregate='mixture', exact=None, parameters=None, mode='as is', trajectory=None, level=0.95, seed=0)",
    "telltale.train.sharpness.over_checkpoints": "(points, *, over='sup')",
    "telltale.train.sharpness.partial_tau": "(x, y, given)",
    "telltale.train.sharpness.persistence_dimension": "(distances, *, alpha=1.0, sizes=None, repeats=5, seed=0)",
    "telltale.train.sharpness.point_controls": "(spectrum, *, rate, parameters, train_loss, batch_size=None, "
    "null_tolerance=None)",
    "telltale.train.sharpness.sharpness_dimension": "(log_moduli, weights=None, *, aggregate='mixture', size=None)",
    "telltale.train.sharpness.spectrum": "(loss, parameters, *, runs=30, steps=25, exact=None, seed=0)",
    # align.judge
    "telltale.align.judge.Judge": "(model, tokenizer, *, batch_size=16, factors=None)",
    "telltale.align.judge.Judge.load": "(path, *, dtype=None, device=None, batch_size=16)",
    "telltale.align.judge.Judge.save": "(self, path, *, layout='telltale')",
    "telltale.align.judge.Judge.score": "(self, messages)",
    "telltale.align.judge.Judge.explain": "(self, messages)",
    "telltale.align.judge.Judge.explain_all": "(self, conversations)",
    "telltale.align.judge.Judge.explain_candidates": "(self, prompt, responses)",
    "telltale.align.judge.Judge.best_of": "(self, prompt, responses)",
    "telltale.align.judge.Judge.compare": "(self, first, second)",
    "telltale.align.judge.Judge.reweight": "(self, factors)",
    "telltale.align.judge.Judge.as_trl_reward": "(self)",
    "telltale.align.judge.audit": "(judge, responses=(), *, preferences=(), dropped_pairs=0, tokens=None, level=0.95, "
    "resamples=500, seed=0)",
    "telltale.align.judge.decorrelate": "(rewards, nuisance, *, method='spearman', groups=None, grid='exact')",
    "telltale.align.judge.evaluate": "(judge, suite, path, *, weights='current')",
    "telltale.align.judge.fit": "(ratings, labels, objectives, *, preferences, reference=None, nuisances=('verbosity',), "
    f"scope='within-prompt', method='spearman', how='sequential', alphas={ALPHAS}, gate=None, folds=5, seed=0, "
    "progress=None)",
    "telltale.align.judge.fit_ridge": f"(features, ratings, *, alphas={ALPHAS}, groups=None, folds=5, validation='grouped', "
    "intercept=False, weights=None, rows=None, seed=42)",
}
"""Documented path -> parameters; ``FACTORY`` stands for a field that is made anew, None for an exception with free arguments.

A config's fields stand behind ``*``: they are given by name, so their order is not promised. A class stands for its constructor.
"""

NAMES = {
    "telltale": "__version__ decode errors load models runs signals tasks train",
    "telltale.decode": "Autoregressive DecodeResult SelfSpeculative StepVerified StepVerifiedConfig custom_generate",
    "telltale.decode.step_verified": "Calibration Normaliser Scale Step StepEngine StepRecord StepVerified "
    "StepVerifiedConfig StepVerifiedResult StepVerifiedStatistics calibrate paper register_encoder",
    "telltale.train": "TrainConfig TrainResult train",
    "telltale.train.pipeline": "Layer LayerProfile LayeredModel Level PipelineTrainer Plan PlanInfeasible PlannedStage "
    "Profile RankFailure RateDiscount Timeline Topology TorchPipelineTrainer calibrated delay_aware_nadam explain gantt "
    "plan profile reference sequential simulate split untie",
    "telltale.train.sharpness": "Comparison Edge Point Probe Reading Sharpness SharpnessMonitor compare edge_of granulated "
    "kendall_tau language_model_loss measure over_checkpoints partial_tau persistence_dimension point_controls "
    "sharpness_dimension spectrum",
    "telltale.align.judge": "Judge audit decorrelate evaluate fit fit_ridge",
}
"""What each package offers by ``__all__``; more may come."""

ATTRIBUTES = {
    "telltale.decode.result.SelfSpeculativeStatistics|telltale.decode.results.SelfSpeculativeStatistics": "drafted accepted "
    "acceptance_rate tokens_per_verify",
    "telltale.align.judge.ridge.RidgeFit": "weights alpha",
    "telltale.train.pipeline.Plan": "n_layers workers replicas",
    "telltale.train.pipeline.Timeline": "seconds_per_minibatch bubble_fraction utilisation ranks",
    "telltale.train.sharpness.SharpnessMonitor": "state cost",
    "telltale.train.sharpness.Sharpness": "sd interval controls edge_ratio",
    "telltale.align.judge.Judge": "objectives",
}
"""Documented attributes of results that users read but do not make; ``a|b`` are places of one class."""

COMMANDS = (
    "bench, generate, judge, judge audit, judge evaluate, judge explain, judge features, judge fit, judge score, layerskip, "
    "layerskip diagnose, layerskip sweep, list, pipeline, pipeline probe, pipeline profile, pipeline simulate, plan, serve, "
    "sharpness, sharpness compare, sharpness measure, sharpness report, specguard, specguard calibrate, specguard costs, "
    "specguard report, tour, train"
)


def found(path: str):
    """The object at a dotted path: an attribute of the package first, else a module of that name."""
    names = path.split(".")
    thing = importlib.import_module(names[0])
    for count, name in enumerate(names[1:], 2):
        if not hasattr(thing, name):
            importlib.import_module(".".join(names[:count]))
        thing = getattr(thing, name)
    return thing


def documented(text: str) -> tuple[list[tuple[str, str | None]], dict[str, str | None], bool]:
    """Positional parameters in order, keyword-only ones, and whether any other keyword is taken; defaults as source."""
    arguments = ast.parse(f"def f{text}: pass").body[0].args
    defaults = [None] * (len(arguments.args) - len(arguments.defaults)) + [shown(node) for node in arguments.defaults]
    positional = [(argument.arg, default) for argument, default in zip(arguments.args, defaults, strict=True)]
    keywords = {
        argument.arg: None if node is None else shown(node)
        for argument, node in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    }
    return positional, keywords, arguments.kwarg is not None


def shown(node: ast.expr) -> str:
    return "FACTORY" if isinstance(node, ast.Name) else repr(ast.literal_eval(node))


def default(parameter: inspect.Parameter) -> str | None:
    if parameter.default is inspect.Parameter.empty:
        return None
    return "FACTORY" if repr(parameter.default) == "<factory>" else repr(parameter.default)


@pytest.mark.parametrize("path", SIGNATURES)
def test_a_documented_name_keeps_its_signature(path):
    thing = found(path)
    assert callable(thing)
    if SIGNATURES[path] is None:
        assert issubclass(thing, Exception)
        return
    positional, keywords, open_ended = documented(SIGNATURES[path])
    parameters = list(inspect.signature(thing).parameters.values())
    by_place = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    by_name = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    rest = any(p.kind is p.VAR_KEYWORD for p in parameters)

    assert [(p.name, default(p)) for p in by_place[: len(positional)]] == positional
    for name, value in keywords.items():
        assert name in by_name or rest, f"{path} takes {name} no longer"
        assert name not in by_name or default(by_name[name]) == value, name
    assert rest or not open_ended
    known = {name for name, _ in positional} | set(keywords)
    assert {name for name, p in by_name.items() if default(p) is None} <= known, "a new parameter has no default"
    assert not [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL)]


@pytest.mark.parametrize("package", NAMES)
def test_a_package_offers_what_it_promises(package):
    module = importlib.import_module(package)
    names = NAMES[package].split()
    assert sorted(set(names) - set(module.__all__)) == []
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        assert getattr(module, name) is not None, name
    documented_here = {
        path.removeprefix(f"{package}.").split(".")[0] for path in SIGNATURES if path.startswith(f"{package}.")
    }
    undescribed = {
        name
        for name in names
        if name not in documented_here and package not in ("telltale.decode.step_verified",)
        if not isinstance(getattr(module, name), (types.ModuleType, str))
    }
    assert undescribed == set(), "a public name has no signature in the table of this test"


@pytest.mark.parametrize("package", NAMES)
def test_a_file_of_the_same_name_does_not_hide_a_function(package):
    """Importing ``a/b.py`` makes ``a.b`` the module, unless ``a/__init__`` binds its own ``b`` afterwards."""
    for name in NAMES[package].split():
        if f"{package}.{name}" in SIGNATURES:
            with contextlib.suppress(ModuleNotFoundError):
                importlib.import_module(f"{package}.{name}")
            assert callable(getattr(importlib.import_module(package), name)), name


@pytest.mark.parametrize("places", ATTRIBUTES)
def test_documented_attributes_of_results(places):
    for place in places.split("|"):
        try:
            thing = found(place)
            break
        except (ModuleNotFoundError, AttributeError):
            continue
    else:
        pytest.fail(f"no {places}")
    fields = {field.name for field in dataclasses.fields(thing)} if dataclasses.is_dataclass(thing) else set()
    for name in ATTRIBUTES[places].split():
        assert name in fields or hasattr(thing, name), name


@pytest.mark.long
def test_every_command_has_help_and_refuses_what_it_does_not_know(capsys):
    from telltale.cli import run

    assert run(["--help"]) == 0
    for command in COMMANDS.split(", "):
        assert run([*command.split(), "--help"]) == 0, command
        assert f"Usage: telltale {command} " in capsys.readouterr().out
        assert run([*command.split(), "--no-such-option"]) == 2, command
        assert "no-such-option" in capsys.readouterr().err
    assert run(["no-such-command"]) == 2
    assert run(["judge", "no-such-command"]) == 2


def printed(code: str):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=240)
    return json.loads(done.stdout)


@pytest.mark.parametrize("module", ["telltale", "telltale.cli"])
def test_the_command_line_starts_without_torch(module):
    assert printed(f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))").count("torch") == 0


@pytest.mark.slow
def test_decoding_brings_no_scipy_of_its_own():
    """Transformers' models import ``scipy.optimize`` themselves; nothing may come on top."""
    code = """
import json, sys
import transformers.modeling_utils
from transformers import AutoModelForCausalLM, AutoTokenizer
before = set(sys.modules)
import telltale.decode
print(json.dumps(sorted(name for name in set(sys.modules) - before if name.split(".")[0] == "scipy")))
"""
    assert printed(code) == []
