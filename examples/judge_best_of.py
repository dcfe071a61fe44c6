"""Choose the best of several answers to one prompt, and show what sets the first two apart.

python examples/judge_best_of.py path/to/judge "2 + 2?" "4" "It is 4." "5"
"""

import sys

from rich.console import Console

from telltale.align.judge import Judge


def main(path: str, prompt: str, *responses: str) -> None:
    choice = Judge.load(path).best_of(prompt, responses)
    ranked = sorted(range(len(responses)), key=lambda index: -choice.scores[index])
    for index in ranked:
        print(f"{choice.scores[index]:+.4f}  {responses[index]}")
    console = Console()
    console.print(choice.explanations[ranked[0]])
    if len(ranked) > 1:
        console.print(choice.explanations[ranked[0]].minus(choice.explanations[ranked[1]]))


if __name__ == "__main__":
    main(*sys.argv[1:])
