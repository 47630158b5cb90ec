"""Starting the command as a person would: a process of its own, by its installed name."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
RunCommand = Callable[..., "subprocess.CompletedProcess[str]"]


def program() -> list[str]:
    """The installed `fastvlm-mlx` beside this Python, else the module."""
    installed = Path(sys.executable).with_name("fastvlm-mlx")
    return [str(installed)] if installed.exists() else [sys.executable, "-m", "fastvlm_mlx"]


def environment(cache: Path, **extra: str) -> dict[str, str]:
    """The surroundings of a person who has no model: an empty cache, no variables of ours."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("FASTVLM_", "HF_", "COLUMNS"))}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return {**env, "HF_HOME": str(cache), "COLUMNS": "80", **extra}


def one_line_error(result: subprocess.CompletedProcess[str]) -> str:
    """The error's text, after checking that it is one line on standard error, and alone."""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert result.stdout == ""
    return lines[0]
