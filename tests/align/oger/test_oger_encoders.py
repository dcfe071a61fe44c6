"""Encoders: frozen, independent of batch and padding, and asked once per teacher text (property 12)."""

import pytest
import torch
from small_runs import policy, problems

from telltale.align.oger import CallableEncoder, HashedNGramEncoder, HiddenStateEncoder
from telltale.align.oger.embeddings import TeacherEmbeddings
from telltale.align.oger.encoders import encode_checked, open_encoder, weights_checksum
from telltale.errors import CheckpointError, ConfigError, DataError
from telltale.tasks import routes

TOKENIZER = routes.build_tokenizer()
PROMPTS = [problem.prompt for problem in problems(5)] + ["7 * 8 + 12 ="]
TEXTS = [routes.solution(problem, route) for problem, route in zip(problems(5), routes.ROUTES, strict=True)] + [
    "56 = 68"
]


@pytest.mark.parametrize("with_prompt", [True, False])
def test_hidden_states_do_not_depend_on_the_batch(with_prompt):
    model = policy()
    together = HiddenStateEncoder(model, TOKENIZER, with_prompt=with_prompt).encode(PROMPTS, TEXTS)
    alone = HiddenStateEncoder(model, TOKENIZER, with_prompt=with_prompt, batch_size=1).encode(PROMPTS, TEXTS)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert not together.requires_grad
    assert together.shape == (6, 32)


def test_hidden_states_are_those_of_the_model_without_pads_and_prompt():
    model = policy().eval()
    encoder = HiddenStateEncoder(model, TOKENIZER, layer=1)
    prompt, own = TOKENIZER(PROMPTS[0])["input_ids"], TOKENIZER(TEXTS[0])["input_ids"]
    states = model(input_ids=torch.tensor([prompt + own]), output_hidden_states=True).hidden_states[1]
    expected = states[0, len(prompt) :].mean(0)
    torch.testing.assert_close(encoder.encode(PROMPTS[:1], TEXTS[:1])[0], expected.detach(), atol=1e-5, rtol=0)


def test_the_hidden_state_encoder_is_a_frozen_copy():
    model = policy()
    encoder = HiddenStateEncoder(model, TOKENIZER)
    before, vectors = encoder.checksum(), encoder.encode(PROMPTS, TEXTS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert encoder.checksum() == before
    assert torch.equal(encoder.encode(PROMPTS, TEXTS), vectors)
    assert not any(parameter.requires_grad for parameter in encoder.body.parameters())
    assert not encoder.body.training
    assert HiddenStateEncoder(model, TOKENIZER).identity != encoder.identity


def test_an_adapter_is_not_part_of_the_encoder():
    peft = pytest.importorskip("peft")
    model = policy()
    plain = HiddenStateEncoder(model, TOKENIZER)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(1.0)
    encoder = HiddenStateEncoder(adapted, TOKENIZER)
    assert torch.equal(encoder.encode(PROMPTS, TEXTS), plain.encode(PROMPTS, TEXTS))


def test_ngrams_tell_texts_apart_and_ignore_the_rest_of_the_batch():
    encoder = HashedNGramEncoder()
    vectors = encoder.encode(PROMPTS, TEXTS)
    assert torch.equal(vectors[2], encoder.encode(PROMPTS[2:3], TEXTS[2:3])[0])
    same = encoder.encode(["", ""], ["35 + 21", "35 + 21"])
    assert torch.equal(same[0], same[1])
    assert torch.nn.functional.cosine_similarity(vectors[0], vectors[5], dim=0) < 0.9


def test_each_pair_is_encoded_once_and_bad_vectors_are_named():
    calls = []

    def lengths(texts):
        calls.append(texts)
        return [[float(len(text)), 1.0 if text != "bad" else float("nan")] for text in texts]

    encoder = CallableEncoder(lengths, name="lengths")
    found = encode_checked(encoder, ["p"] * 4, ["a", "bb", "a", "a"], ["row"] * 4)
    assert calls == [["a", "bb"]]
    assert found[:, 0].tolist() == [1, 2, 1, 1]
    with pytest.raises(DataError, match="gave row 1 a vector of length nan"):
        encode_checked(encoder, ["p", "p"], ["a", "bad"], ["row 0", "row 1"])
    zero = CallableEncoder(lambda texts: torch.zeros(len(texts), 2), name="zero")
    with pytest.raises(DataError, match=r"gave row 0 a vector of length 0\.0"):
        encode_checked(zero, ["p"], ["text"], ["row 0"])
    assert encode_checked(zero, ["p"], [""], ["row 0"]).eq(0).all()
    with pytest.raises(DataError, match=r"returned shape \(1,\) for 1 texts"):
        encode_checked(CallableEncoder(lambda texts: [1.0], name="flat"), ["p"], ["a"], ["row 0"])


def test_embeddings_are_kept_in_memory_and_on_disk(tmp_path):
    encoder = HashedNGramEncoder()
    first = TeacherEmbeddings(encoder, cache=tmp_path / "folder" / "embeddings.sqlite")
    vectors = first.of(PROMPTS, TEXTS, TEXTS)
    assert first.encoded == 6
    assert torch.equal(first.of(PROMPTS, TEXTS, TEXTS), vectors)
    assert first.encoded == 6
    second = TeacherEmbeddings(encoder, cache=tmp_path / "folder" / "embeddings.sqlite")
    assert torch.equal(second.of(PROMPTS, TEXTS, TEXTS), vectors)
    assert second.encoded == 0
    other = TeacherEmbeddings(HashedNGramEncoder(longest=2), cache=tmp_path / "folder" / "embeddings.sqlite")
    other.of(PROMPTS, TEXTS, TEXTS)
    assert other.encoded == 6
    (tmp_path / "text").write_text("not a database, but a text that is long enough to be taken for a file header" * 20)
    with pytest.raises(CheckpointError, match="cannot be used to keep embeddings"):
        TeacherEmbeddings(encoder, cache=tmp_path / "text")


def test_encoders_by_name():
    assert open_encoder("ngrams").identity == "ngrams/3/1024"
    assert isinstance(open_encoder("hidden", model=policy(), tokenizer=TOKENIZER), HiddenStateEncoder)
    own = HashedNGramEncoder()
    assert open_encoder(own) is own
    for bad in ("hidden", "no such folder", 7):
        with pytest.raises(ConfigError, match="encoder="):
            open_encoder(bad)
    with pytest.raises(ConfigError, match="layer=9"):
        HiddenStateEncoder(policy(), TOKENIZER, layer=9)


def test_a_module_as_encoder_is_watched():
    module = torch.nn.Embedding(3, 2)
    encoder = CallableEncoder(module.forward, name="a module")
    before = encoder.checksum()
    assert before == weights_checksum(module)
    with torch.no_grad():
        module.weight.add_(1)
    assert encoder.checksum() != before


@pytest.mark.long
def test_a_sentence_encoder_reads_long_texts_in_chunks(tmp_path):
    """A small BERT of random weights, saved as sentence-transformers has it; it reads 12 tokens at once."""
    library = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.models")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    from telltale.align.oger import SentenceEncoder

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefgh"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=12, **names).save_pretrained(tmp_path / "bert")
    torch.manual_seed(0)
    shape = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertModel(shape).save_pretrained(tmp_path / "bert")
    word = modules.Transformer(str(tmp_path / "bert"), max_seq_length=12)
    library.SentenceTransformer(modules=[word, modules.Pooling(16)], device="cpu").save(str(tmp_path / "sentence"))
    encoder = SentenceEncoder(tmp_path / "sentence")
    short, long = "a b c", " ".join(["a b c d e f g h"] * 3)
    with pytest.warns(UserWarning, match="1 of 2 traces are longer than the 12 tokens"):
        vectors = encoder.encode(["", ""], [short, long])
    chunks = encoder._chunks(long)
    assert "".join(chunks) == long
    assert len(chunks) == 3
    units = torch.stack([encoder.encode([""], [chunk])[0] for chunk in chunks])
    counts = torch.tensor([float(len(chunk.split())) for chunk in chunks])
    torch.testing.assert_close(vectors[1], (units * counts[:, None]).sum(0) / counts.sum())
    changed = encoder.encode([""], [long[:-1] + "a"])
    assert not torch.allclose(changed[0], vectors[1])
    assert encoder.checksum() == SentenceEncoder(tmp_path / "sentence").checksum()
    assert open_encoder(tmp_path / "sentence").identity == encoder.identity
