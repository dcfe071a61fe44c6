"""A small judge for tests: a word-level tokenizer with a chat template, a tiny backbone, a head of random numbers."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from telltale.align.judge.head import GateConfig, Head
from telltale.align.judge.judge import Judge
from telltale.align.judge.model import JudgeModel

WORDS = [*"abcdefghxyz.,?!", "add", "two", "and", "three", "four", "five", "the", "answer", "is", "yes", "no", "please"]
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<user>", "<assistant>", "<system>"]
TEMPLATE = (
    "{{ '<s>' }}{% for message in messages %}{{ '<' + message['role'] + '> ' + message['content'] + ' </s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
OBJECTIVES = ("helpful", "safe", "correct", "verbosity")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[4:]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_model(backbone=None, *, seed: int = 0, mask_nuisances: bool = True) -> JudgeModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = backbone or LlamaModel(
            LlamaConfig(
                vocab_size=64,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=256,
                pad_token_id=0,
            )
        )
        gate = GateConfig(hidden=16, layers=1, mask_nuisances=mask_nuisances)
        head = Head(OBJECTIVES, 32, gate=gate, nuisances=("verbosity",))
        head.set_regression(torch.randn(4, 32) * 32**-0.5)
        transform = torch.eye(4)
        transform[3] -= torch.tensor([0.3, 0.1, 0.2, 1.0])
        head.set_transform(transform)
    return JudgeModel.assembled(backbone, head, context_length=64)


def tiny_judge(*, mask_nuisances: bool = True, **options) -> Judge:
    return Judge(tiny_model(mask_nuisances=mask_nuisances), tiny_tokenizer(), **options)
