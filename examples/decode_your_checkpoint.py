"""Decode a local checkpoint with early-exit and n-gram drafts, and compare the speed with plain decoding.

python examples/decode_your_checkpoint.py path/to/checkpoint "def main("
"""

import sys

import telltale
from telltale.decode import Autoregressive, SelfSpeculative


def main(path: str, prompt: str) -> None:
    model, tokenizer = telltale.load(path)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    plain = Autoregressive(model).generate(ids, max_new_tokens=128)
    for drafter in ("exit", "ngram", "both"):
        method = SelfSpeculative(model, drafter=drafter)
        method.generate(ids, max_new_tokens=128)  # the planner learns the machine on the first call
        result = method.generate(ids, max_new_tokens=128)
        print(
            f"{drafter:6s} {result.stats.tokens_per_second:8.0f} tokens/s, {result.stats.acceptance_rate:5.0%} accepted, "
            f"same tokens: {result.tokens.equal(plain.tokens)}"
        )
    print(f"plain  {plain.stats.tokens_per_second:8.0f} tokens/s (backend {plain.stats.backend})")
    print(tokenizer.decode(plain.tokens[0]))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
