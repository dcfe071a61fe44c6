"""The paper's equations: dropout rates, time schedule, exit weights, curricula, and the configuration's refusals."""

from __future__ import annotations

import pytest
import torch

from telltale.errors import ConfigError
from telltale.train.layerskip import (
    LayerSkipConfig,
    curriculum_mask,
    exit_loss_weights,
    exit_scale,
    layer_dropout_rates,
    time_profile,
)


def test_dropout_is_zero_at_the_first_layer_and_p_max_at_the_last():
    rates = layer_dropout_rates(12, LayerSkipConfig(p_max=0.3), 5)
    assert rates[0] == 0.0
    assert rates[-1] == pytest.approx(0.3, abs=1e-12)
    assert rates[4] == pytest.approx(0.3 * (2 ** (4 / 11) - 1), abs=1e-12)
    assert torch.all(rates[1:] > rates[:-1])


def test_exponential_schedule_runs_from_zero_to_one():
    config = LayerSkipConfig(time_schedule="exp", total_steps=101)
    assert time_profile(config, 0) == 0.0
    assert time_profile(config, 100) == 1.0
    assert time_profile(config, 50) == pytest.approx(2**0.5 - 1)
    assert time_profile(config, 5000) == 1.0


def test_one_layer_and_one_step_do_not_divide_by_zero():
    config = LayerSkipConfig(time_schedule="exp", total_steps=1)
    assert layer_dropout_rates(1, config, 0).tolist() == [0.0]
    assert exit_loss_weights(1, config, 0).tolist() == [1.0]
    assert torch.isfinite(layer_dropout_rates(4, config, 0)).all()


@pytest.mark.parametrize("e_scale", [0.0, 0.2, 1.0])
def test_exit_scale_is_equation_6(e_scale):
    scale = exit_scale(8, LayerSkipConfig(e_scale=e_scale))
    wanted = [e_scale * sum(range(index + 1)) for index in range(7)] + [7 + e_scale * sum(range(7))]
    torch.testing.assert_close(scale, torch.tensor(wanted, dtype=torch.float64))


def test_paper_weights_of_a_rotational_step():
    config = LayerSkipConfig(e_scale=0.2, rotation=8)
    weights = exit_loss_weights(32, config, 3)
    active = {index: round(weight, 4) for index, weight in enumerate(weights.tolist()) if weight > 0}
    assert active == {3: 0.0048, 11: 0.0524, 19: 0.1508, 27: 0.3, 31: 0.4921}


@pytest.mark.parametrize("curriculum", ["rotational", "gradual", "none"])
@pytest.mark.parametrize("e_scale", [0.0, 0.1, 1.0])
def test_weights_sum_to_one_at_every_step(curriculum, e_scale):
    config = LayerSkipConfig(curriculum=curriculum, e_scale=e_scale, rotation=5, total_steps=40)
    for step in range(60):
        weights = exit_loss_weights(12, config, step)
        assert weights.sum().item() == pytest.approx(1.0, abs=1e-12)
        if e_scale == 0.0:
            assert weights.tolist() == [0.0] * 11 + [1.0]


@pytest.mark.parametrize(("layers", "rotation"), [(32, 8), (10, 4), (7, 6), (5, 9)])
def test_rotation_turns_each_layer_on_exactly_once_per_period(layers, rotation):
    config = LayerSkipConfig(rotation=rotation, always_last=False)
    for start in (0, 3, 17):
        count = sum(curriculum_mask(layers, config, start + step).int() for step in range(rotation))
        assert count.tolist() == [1] * layers


def test_rotation_of_the_specification():
    mask = curriculum_mask(32, LayerSkipConfig(rotation=8), 3)
    assert mask.nonzero().view(-1).tolist() == [3, 11, 19, 27, 31]


def test_gradual_curriculum_starts_at_the_last_layer_and_is_whole_at_half_time():
    config = LayerSkipConfig(curriculum="gradual", total_steps=80, always_last=False)
    counts = [int(curriculum_mask(8, config, step).sum()) for step in range(80)]
    assert counts[0] == 1
    assert counts == sorted(counts)
    assert all(count == 8 for count in counts[40:])
    assert counts[34] < 8
    assert curriculum_mask(8, config, 0)[-1]
    assert [counts.index(k + 1) for k in range(8)] == [5 * k for k in range(8)]


def test_strict_rotation_without_any_loss_raises():
    config = LayerSkipConfig(rotation=8, always_last=False)
    with pytest.raises(ConfigError, match="always_last"):
        exit_loss_weights(8, config, 8)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"p_max": 1.0}, "p_max"),
        ({"p_max": -0.1}, "p_max"),
        ({"p_max": True}, "p_max"),
        ({"e_scale": 1.5}, "e_scale"),
        ({"rotation": 0}, "rotation"),
        ({"rotation": 2.5}, "rotation"),
        ({"curriculum": "spiral"}, "curriculum"),
        ({"time_schedule": "linear"}, "time_schedule"),
        ({"total_steps": 0}, "total_steps"),
        ({"exit_target": "logits"}, "exit_target"),
        ({"distillation_temperature": 0.0}, "distillation_temperature"),
        ({"p_max": float("nan")}, "p_max"),
    ],
)
def test_bad_settings_are_refused_by_name(fields, name):
    with pytest.raises(ConfigError, match=name):
        LayerSkipConfig(**fields)


def test_a_schedule_without_total_steps_is_refused():
    with pytest.raises(ConfigError, match="total_steps"):
        layer_dropout_rates(4, LayerSkipConfig(time_schedule="exp"), 0)


def test_yaml_and_mapping(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("p_max: 0.2\nrotation: 3\n")
    assert LayerSkipConfig.from_yaml(path) == LayerSkipConfig(p_max=0.2, rotation=3)
    with pytest.raises(ConfigError, match="Did you mean 'rotation'"):
        LayerSkipConfig.from_dict({"rotaton": 3})
