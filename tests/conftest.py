"""What many tests need. OpenBLAS comes first: the module imports of the tests would be too late for
it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from fastvlm_mlx.device import prefer_openblas

prefer_openblas()

# Nothing here may reach a network. Tests of downloading set up a hub of their own on this machine.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

ROOT = Path(__file__).parent.parent


def _let_torchvision_load() -> None:
    """Beside PyTorch's CPU wheel, an index's torchvision cannot load its compiled operators.

    Nothing here uses them, but its import stops at each that is missing, and with it timm's.
    Declaring them lets it in.
    """
    if not (find_spec("torch") and find_spec("torchvision")):
        return
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        torch.library.define("torchvision::nms", signature)
        torch.library.define("torchvision::qnms", signature)


_let_torchvision_load()


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The folder of the bundled model."""
    folder = ROOT / "fastvlm_mlx" / "assets" / "demo"
    if not (folder / "config.json").is_file():
        pytest.skip("the bundled demo model is not in this checkout")
    return folder


@pytest.fixture
def examples() -> Path:
    """The folder of the example pictures."""
    return ROOT / "examples"


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of the hub in the place of the person's own, here and in processes started."""
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    monkeypatch.delenv("FASTVLM_MODEL", raising=False)
    from huggingface_hub import constants, file_download

    for module in (constants, file_download):
        if hasattr(module, "HF_HUB_CACHE"):
            monkeypatch.setattr(module, "HF_HUB_CACHE", str(cache))
    yield cache
