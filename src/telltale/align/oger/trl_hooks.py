"""The private methods of ``trl.GRPOTrainer`` that OGER overrides, checked when a trainer is made.

They worked in TRL 1.16. A later version may change them without notice, so each one's arguments, and what is relied on inside, is
compared before anything is trained.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from telltale.errors import UnsupportedModelError

ARGUMENTS: dict[str, tuple[str, ...]] = {
    "_generate": ("prompts",),
    "_generate_single_turn": ("prompt_ids", "images", "multimodal_fields", "num_generations"),
    "_generate_and_score_completions": ("inputs",),
    "_calculate_rewards": ("inputs", "prompts", "completions", "completion_ids_list"),
    "_get_per_token_logps_and_entropies": ("model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"),
    "_compute_loss": ("model", "inputs"),
    "_save_checkpoint": ("model", "trial"),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_log_completion_extra": ("column", "values"),
    "_log_metric": ("name", "value"),
}
GENERATED = (
    "prompt_ids",
    "completion_ids",
    "tool_mask",
    "completions",
    "logprobs",
    "extra_fields",
    "images",
    "tool_images",
)


def check_hooks(trainer: type[Any]) -> None:
    """Raise :class:`~telltale.errors.UnsupportedModelError` with the name of the first hook that is not as it was."""
    for name, arguments in ARGUMENTS.items():
        method = getattr(trainer, name, None)
        if method is None:
            raise _changed(name, "it is gone")
        found = tuple(inspect.signature(method).parameters)[1:]
        if found[: len(arguments)] != arguments:
            raise _changed(name, f"its arguments are ({', '.join(found)}), expected ({', '.join(arguments)}, ...)")
    returned = _returned_names(trainer._generate)
    if returned != GENERATED:
        raise _changed("_generate", f"it returns ({', '.join(returned)}), expected ({', '.join(GENERATED)})")
    loss = _source(trainer._compute_loss)
    forward, reads = loss.find("_get_per_token_logps_and_entropies("), loss.find('inputs["advantages"]')
    old = loss.find('inputs.get("old_per_token_logps")')
    if not 0 <= forward < min(reads, old):
        raise _changed(
            "_compute_loss", "it does not read the advantages and old log-probabilities after its forward pass"
        )


def _returned_names(method: Callable[..., Any]) -> tuple[str, ...]:
    returns = [node for node in ast.walk(ast.parse(_source(method))) if isinstance(node, ast.Return)]
    last = returns[-1].value if returns else None
    if not isinstance(last, ast.Tuple):
        return ()
    return tuple(item.id if isinstance(item, ast.Name) else "?" for item in last.elts)


def _source(method: Callable[..., Any]) -> str:
    return textwrap.dedent(inspect.getsource(method))


def _changed(name: str, how: str) -> UnsupportedModelError:
    import trl

    return UnsupportedModelError(
        f"trl {trl.__version__} has changed GRPOTrainer.{name}: {how}. OGER overrides it; install a version that was tried, "
        f"such as trl==1.16.0."
    )
