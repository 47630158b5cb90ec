"""Fixtures of the command-line tests."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cli_process import RunCommand, environment, program


@pytest.fixture
def run(tmp_path: Path) -> RunCommand:
    """`run("generate", "--image", path, env={...})` -> the completed process, with text output."""

    def run_command(
        *arguments: str, env: dict[str, str] | None = None, stdin: str = "", cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*program(), *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=120,
            cwd=cwd or tmp_path,
            env=environment(tmp_path / "hf", **(env or {})),
        )

    return run_command
