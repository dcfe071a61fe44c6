"""A small judge on disk, for the commands that take one."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def judge_folder(tmp_path_factory):
    from align.judge.tiny_judges import tiny_judge

    folder = tmp_path_factory.mktemp("judges") / "tiny"
    tiny_judge().save(folder)
    return folder
