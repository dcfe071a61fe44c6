"""Tokenizers of the kinds there are, small: bytes, SentencePiece with byte fallback, and words without a decoder."""

from __future__ import annotations

import functools

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "the sum of two and three is five.\n\nthe sum of five and one is six.\n\n",
    "Grüße aus Köln, 你好世界, 🙂🙃 naïve café — done.",
    "one two three four five six seven eight nine ten",
]
SPECIAL = ["<pad>", "<s>", "</s>", "<turn>"]
CHAT = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('system first') }}{% endif %}"
    "<turn>{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<turn>assistant: {% endif %}"
)


@functools.cache
def byte_level(size: int = 300) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every byte is a token, so characters are split; ``size`` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _wrapped(tokenizer)


@functools.cache
def sentencepiece_like(size: int = 400) -> PreTrainedTokenizerFast:
    """As Llama 2 has it: ``▁`` for spaces, ``<0xNN>`` for bytes, and a decoder that drops a text's first space."""
    pieces = SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS[::2], trainers.BpeTrainer(vocab_size=size - len(pieces), special_tokens=[]))
    own = [piece for piece, _ in sorted(trained.get_vocab().items(), key=lambda item: item[1])]
    vocabulary = {piece: index for index, piece in enumerate([*pieces, *own])}
    merges = [tuple(pair) for pair in _json(trained)["model"]["merges"] if all(piece in vocabulary for piece in pair)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _wrapped(tokenizer)


@functools.cache
def words() -> PreTrainedTokenizerFast:
    """A word a token and no decoder: texts are words joined by spaces."""
    known = [*SPECIAL, "<unk>", "\n\n", *dict.fromkeys(" ".join(CORPUS).split())]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(known)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("\n\n"), "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return _wrapped(tokenizer)


KINDS = {"bytes": byte_level, "sentencepiece": sentencepiece_like, "words": words}


def _wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    found = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token=None
    )
    found.chat_template = CHAT
    return found


def _json(tokenizer: Tokenizer) -> dict:
    import json

    return json.loads(tokenizer.to_str())
