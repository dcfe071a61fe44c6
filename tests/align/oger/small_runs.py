"""Small policies, stores and configs of the routes task for the tests of this folder."""

from typing import Any

import torch
from datasets import Dataset

from telltale.align.oger.config import OGERConfig
from telltale.align.oger.teachers import TeacherStore
from telltale.tasks import routes

RECIPE = routes.BaseRecipe(width=32, heads=2)


def policy(recipe: routes.BaseRecipe = RECIPE) -> Any:
    return routes.build_policy(recipe)


def problems(count: int = 16) -> list[routes.Problem]:
    return routes.split()[0][:count]


def store(count: int = 16, teachers: tuple[str, ...] = ("S5", "S10", "D2"), **options: Any) -> TeacherStore:
    chosen = problems(count)
    return TeacherStore.from_rows(
        [(f"prompt {i}", row) for i, row in enumerate(routes.prompt_rows(chosen))],
        [(f"teacher {i}", row) for i, row in enumerate(routes.teacher_rows(chosen, teachers))],
        verifier=options.pop("verifier", routes.verify),
        **options,
    )


def dataset(count: int = 16) -> Dataset:
    return Dataset.from_list(routes.prompt_rows(problems(count)))


def arguments(folder: Any, **overrides: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": routes.LONGEST,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "seed": 3,
    } | overrides


def config(folder: Any, **overrides: Any) -> OGERConfig:
    return OGERConfig(**arguments(folder, **overrides))


def parameters(model: Any) -> torch.Tensor:
    return torch.cat([value.detach().flatten() for value in model.parameters()])
