"""What is built holds everything: each folder with code is a package, and is named in
pyproject.toml.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_package_is_listed() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^packages = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)
    assert block is not None
    listed = set(re.findall(r'"([\w.]+)"', block[1]))
    expected = set()
    for top, name in (("fastvlm_mlx", "fastvlm_mlx"), ("convert", "fastvlm_mlx.convert")):
        for file in (ROOT / top).rglob("*.py"):
            inner = file.parent.relative_to(ROOT / top).parts
            assert (file.parent / "__init__.py").exists(), f"{file.parent} has no __init__.py"
            expected.add(".".join([name, *inner]))
    assert expected == listed


def test_constraints_are_names_and_versions_only() -> None:
    requirement = re.compile(r'[\w.-]+==[\w.]+(; python_version (<|>=) "3\.\d+")?')
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        assert line.startswith("#") or requirement.fullmatch(line), line
