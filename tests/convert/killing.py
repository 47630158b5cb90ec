"""Ordering conversions from the zygote, and looking at what they leave behind."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from fastvlm_mlx.weights.files import open_tensors

HERE = Path(__file__).parent
State = dict[str, str]  # file -> SHA-256


class Zygote:
    """The process of `zygote.py`, ready once it is made."""

    def __init__(self) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            # Threads of a BLAS do not survive a fork.
            "FASTVLM_NO_OPENBLAS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "zygote.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self._read()

    def order(self, source: Path, target: Path, **how: Any) -> dict[str, Any]:
        """One conversion: its exit status, its error, how many file operations it made."""
        self.start(source, target, **how)
        return self._read()

    def start(self, source: Path, target: Path, **how: Any) -> None:
        assert self._process.stdin is not None
        order = {"source": str(source), "target": str(target), **how}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the zygote has died")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


def state_of(folder: Path) -> State | None:
    """What a folder holds, None if it is not there. The card says when it was written: left out."""
    if not folder.exists():
        return None
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.iterdir())
        if file.name != "README.md"
    }


def whole(folder: Path) -> bool:
    """Whether every header opens and says what the file holds."""
    with open_tensors(folder) as tensors:
        return len(tensors) > 100


def beside(target: Path) -> list[str]:
    """What lies beside the target."""
    if not target.parent.exists():
        return []
    return sorted(entry.name for entry in target.parent.iterdir() if entry != target)
