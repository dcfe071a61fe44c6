import json

import numpy as np
import pytest
import torch
import transformers

from telltale.edge.importance import available, look
from telltale.errors import CheckpointError, ConfigError, DataError, NumericalError, UnsupportedModelError
from telltale.models.vision import load_vision, only_patches, open_vision, partial_forward

COMMON = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 50}
FAMILIES = ["vit", "deit", "dinov2", "registers", "clip", "siglip", "beit", "beit_shared"]
PREFIX = {"vit": 1, "deit": 2, "dinov2": 1, "registers": 5, "clip": 1, "siglip": 0, "beit": 1, "beit_shared": 1}


def build(name):
    torch.manual_seed(0)
    both = {"vision_config": COMMON, "text_config": TEXT, "num_labels": 5}
    makers = {
        "vit": lambda: (transformers.ViTForImageClassification, transformers.ViTConfig(**COMMON, num_labels=5)),
        "deit": lambda: (transformers.DeiTForImageClassification, transformers.DeiTConfig(**COMMON, num_labels=5)),
        "dinov2": lambda: (
            transformers.Dinov2ForImageClassification,
            transformers.Dinov2Config(**COMMON, num_labels=5),
        ),
        "registers": lambda: (
            transformers.Dinov2WithRegistersForImageClassification,
            transformers.Dinov2WithRegistersConfig(**COMMON, num_labels=5, num_register_tokens=4),
        ),
        "clip": lambda: (transformers.CLIPForImageClassification, transformers.CLIPConfig(**both)),
        "siglip": lambda: (transformers.SiglipForImageClassification, transformers.SiglipConfig(**both)),
        "beit": lambda: (
            transformers.BeitForImageClassification,
            transformers.BeitConfig(**COMMON, num_labels=5, use_relative_position_bias=True),
        ),
        "beit_shared": lambda: (
            transformers.BeitForImageClassification,
            transformers.BeitConfig(**COMMON, num_labels=5, use_shared_relative_position_bias=True),
        ),
    }
    kind, config = makers[name]()
    model = kind(config).eval()
    for key, parameter in model.named_parameters():
        if any(word in key for word in ("position", "cls", "classifier")):
            torch.nn.init.normal_(parameter)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param, open_vision(build(request.param))


@pytest.fixture
def pixels():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def sets(count, images=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(16, generator=generator)[:count] for _ in range(images)])


@torch.no_grad()
def test_the_full_set_is_bit_equal_and_order_does_not_matter(family, pixels):
    name, vision = family
    assert vision.prefix == PREFIX[name]
    plain = vision.model(pixel_values=pixels).logits
    assert torch.equal(vision.logits(pixels, torch.arange(16).expand(3, -1)), plain)
    torch.testing.assert_close(vision.logits(pixels, sets(16)), plain, atol=1e-5, rtol=0)
    assert torch.equal(vision.model(pixel_values=pixels).logits, plain)  # no hook is left behind


@torch.no_grad()
def test_unsent_pixels_cannot_matter(family, pixels):
    _, vision = family
    chosen = sets(5)
    mask = torch.ones(3, 16, dtype=torch.bool).scatter_(1, chosen, False)
    mask = mask.view(3, 4, 4).repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None].expand_as(pixels)
    answer = vision.logits(pixels, chosen)
    assert torch.isfinite(answer).all()
    assert torch.equal(vision.logits(pixels.masked_fill(mask, torch.nan), chosen), answer)


@torch.no_grad()
def test_positions_matter(family, pixels):
    """The same pixels at other places give another answer: a re-indexing would be found."""
    _, vision = family
    moved = pixels.clone()
    moved[:, :, :8, :8], moved[:, :, 24:, 24:] = pixels[:, :, 24:, 24:], pixels[:, :, :8, :8]
    there = vision.logits(pixels, torch.tensor([[0, 5]] * 3))
    here = vision.logits(moved, torch.tensor([[15, 5]] * 3))
    assert (there - here).abs().max() > 1e-3


@torch.no_grad()
def test_alone_and_in_a_batch(family, pixels):
    _, vision = family
    chosen = sets(6)
    together = vision.logits(pixels, chosen)
    for row in range(3):
        torch.testing.assert_close(
            vision.logits(pixels[row : row + 1], chosen[row : row + 1])[0], together[row], atol=1e-5, rtol=0
        )


@torch.no_grad()
def test_importances_are_the_models_own_attention(family, pixels):
    _, vision = family
    if not vision.prefix:
        assert available(vision) == ["rollout", "gradient", "map_head"]
        with pytest.raises(UnsupportedModelError, match="cls_last"):
            look(vision, pixels)
        return
    vision.model.set_attn_implementation("eager")
    attentions = vision.model(pixel_values=pixels, output_attentions=True).attentions
    vision.model.set_attn_implementation("sdpa")
    for kind, layer in (("cls_last", -1), ("cls_first", 0)):
        expected = attentions[layer].mean(1)[:, 0, vision.prefix :]
        found = look(vision, pixels, importance=kind).importance
        torch.testing.assert_close(found, expected / expected.sum(1, keepdim=True), atol=1e-6, rtol=0)
    product = torch.eye(attentions[0].shape[-1])
    for attention in attentions:
        product = (attention.mean(1) + torch.eye(attention.shape[-1])) / 2 @ product
    expected = product[:, 0, vision.prefix :]
    found = look(vision, pixels, importance="rollout").importance
    torch.testing.assert_close(found, expected / expected.sum(1, keepdim=True), atol=1e-6, rtol=0)


def test_gradient_and_head_and_callables(family, pixels):
    _, vision = family
    evidence = look(vision, pixels, importance="gradient")
    torch.testing.assert_close(evidence.importance.sum(1), torch.ones(3))
    assert all(parameter.grad is None for parameter in vision.model.parameters())
    if "map_head" in available(vision):
        assert look(vision, pixels, importance="map_head").importance.shape == (3, 16)
    own = look(vision, pixels, importance=lambda model, images: torch.arange(16.0).expand(len(images), -1))
    assert own.importance[0].argmax() == 15


def test_embedding_spaces(family, pixels):
    _, vision = family
    kind = available(vision)[0]
    for space, width in (("last", 32), ("patch", 32), ("pixel", 192), ("block:0", 32), ("key:2", 32)):
        assert look(vision, pixels, importance=kind, space=space).embeddings.shape == (3, 16, width)
    tiles = look(vision, pixels, importance=kind, space="pixel").embeddings
    assert torch.equal(tiles[0, 5].view(3, 8, 8), pixels[0, :, 8:16, 8:16])
    for bad in ("first", "block:3", "key:x"):
        with pytest.raises(ConfigError, match="space"):
            look(vision, pixels, importance=kind, space=bad)


def test_what_cannot_be_opened_or_asked_is_told(pixels):
    with pytest.raises(UnsupportedModelError, match="resnet"):
        open_vision(transformers.ResNetModel(transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])))
    with pytest.raises(UnsupportedModelError, match="Linear"):
        open_vision(torch.nn.Linear(2, 2))
    vision = open_vision(build("vit"))
    for indices, words in (
        (torch.tensor([[0, 0]] * 3), "twice"),
        (torch.tensor([[16]] * 3), "0 to 15"),
        (torch.tensor([[0.5]] * 3), "integers"),
        (torch.tensor([[1]]), "sets of indices"),
    ):
        with pytest.raises(ConfigError, match=words):
            partial_forward(vision, pixels, indices)
    with pytest.raises(ConfigError, match="unknown"):
        look(vision, pixels, importance="attention")
    with pytest.raises(NumericalError, match="not finite"):
        look(vision, pixels * torch.nan)
    with pytest.raises(DataError, match="Resize"):
        vision.pixels(np.zeros((1, 16, 16, 3), dtype=np.uint8))


def test_hooks_go_also_when_the_forward_fails(pixels):
    vision = open_vision(build("vit"))
    with pytest.raises(RuntimeError, match="stop"), only_patches(vision, sets(3)):
        raise RuntimeError("stop")
    assert torch.equal(vision.logits(pixels), vision.model(pixel_values=pixels).logits)


def test_checkpoints_are_read_with_their_normalisation(tmp_path):
    model = build("vit")
    model.save_pretrained(tmp_path / "vit")
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json cannot be read"):
        load_vision(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text(
        '{"image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 2.0, 4.0]}'
    )
    vision = load_vision(tmp_path / "vit")
    image = np.full((1, 32, 32, 3), 255, dtype=np.uint8)
    torch.testing.assert_close(vision.pixels(image)[0, :, 0, 0], torch.tensor([0.9, 0.4, 0.175]))
    expected = model(pixel_values=vision.pixels(image)).logits
    torch.testing.assert_close(vision.logits(vision.pixels(image)), expected, atol=1e-5, rtol=0)
    with pytest.raises(CheckpointError, match=r"config.json cannot be read"):
        load_vision(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "resnet"}')
    with pytest.raises(UnsupportedModelError, match="resnet"):
        load_vision(tmp_path / "other")


def test_a_distilled_deit_has_labels(tmp_path):
    torch.manual_seed(0)
    config = transformers.DeiTConfig(**COMMON, num_labels=5)
    transformers.DeiTForImageClassificationWithTeacher(config).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    vision = load_vision(tmp_path)
    assert len(vision.labels) == 5
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(vision.logits(pixels, torch.arange(16)[None]), vision.model(pixel_values=pixels).logits)


def test_a_checkpoint_that_was_not_trained_to_classify_is_refused(tmp_path):
    transformers.ViTModel(transformers.ViTConfig(**COMMON)).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="lacks weights of an image classifier"):
        load_vision(tmp_path)
    build("vit").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="device='nowhere'"):
        load_vision(tmp_path, device="nowhere")


@pytest.mark.parametrize(
    "said",
    [
        {"image_mean": None},
        {"image_mean": [0.5, 0.5]},
        {"image_std": [1, 1, 0]},
        {"image_std": ["a", "b", "c"]},
        {"do_rescale": False},
        {"rescale_factor": 1 / 127.5},
    ],
)
def test_a_normalisation_that_cannot_be_followed_is_told(tmp_path, said):
    build("vit").save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match="preprocessor_config"):
        load_vision(tmp_path)


def test_a_damaged_checkpoint_is_told(tmp_path):
    build("vit").save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_vision(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vit", "hidden_size": "wide"}')
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_vision(tmp_path)


def test_a_callable_that_runs_the_model_leaves_the_embeddings_alone(pixels):
    opened = open_vision(build("vit"))

    def occlusion(vision, values):
        parts = torch.arange(16).expand(len(values), -1)
        return torch.stack([vision.logits(values, parts[:, parts[0] != i]).std(dim=-1) for i in range(16)], dim=1)

    for space in ("last", "block:0", "key:1"):
        seen = look(opened, pixels, importance=occlusion, space=space)
        assert torch.equal(seen.embeddings, look(opened, pixels, importance="rollout", space=space).embeddings)
    with pytest.raises(ConfigError, match="gave ndarray"):
        look(opened, pixels, importance=lambda vision, values: np.ones((len(values), 16)))
