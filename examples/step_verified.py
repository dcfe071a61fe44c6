"""A small model writes the steps of an answer; a large one redoes those that are not accepted. One of the rules is your own.

python examples/step_verified.py path/to/large path/to/small "first problem" "second problem"
"""

import sys

import torch

import telltale
from telltale.decode import StepVerified, StepVerifiedConfig


def shows_its_work(steps) -> list[float]:
    """A rule of your own, as a reward model would be: believe steps that contain a calculation."""
    return [float("=" in step.text or "answer" in step.text) for step in steps]


def main(large: str, small: str, *prompts: str) -> None:
    target, tokenizer = telltale.load(large)
    draft, _ = telltale.load(small)
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    rules = {
        "target alone": (StepVerifiedConfig(policy="target"), None),
        "log-probability": (StepVerifiedConfig(score="log-probability", signal_model="target", threshold=-2.0), None),
        "a rule of mine": (StepVerifiedConfig(policy="verifier", threshold=0.5), shows_its_work),
    }
    for name, (config, verifier) in rules.items():
        guard = StepVerified(target, draft, tokenizer, config, verifier=verifier)
        result = guard.generate(ids, max_new_tokens=256, temperature=0.7, generator=torch.Generator().manual_seed(0))
        stats = result.stats
        print(
            f"{name}: {stats.acceptance_rate:.0%} of steps accepted, {stats.target_share:.0%} of tokens by the target"
        )
        for step in result.steps[0]:
            score = "" if step.score is None else f" ({step.score:.2f})"
            print(f"  {step.source}{score}: {step.text.strip()}")


if __name__ == "__main__":
    main(*sys.argv[1:])
