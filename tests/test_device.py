"""The device's description, the default precision, and OpenBLAS in the place of MLX's own BLAS.

Whether OpenBLAS is in place is told by counting which library the dynamic linker binds, never by a
clock.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastvlm_mlx import device

ROOT = Path(__file__).parent.parent
PRODUCT = "import mlx.core as mx; mx.eval(mx.ones((300, 300)) @ mx.ones((300, 300)))\n"
PREFER = "from fastvlm_mlx.device import prefer_openblas; print(prefer_openblas())\n"


def has_openblas() -> bool:
    try:
        ctypes.CDLL("libopenblas.so.0")
    except OSError:
        return False
    return True


def on_linux_cpu() -> bool:
    return sys.platform == "linux" and not device.installed_cuda_wheels()


needs_linux_cpu = pytest.mark.skipif(not on_linux_cpu(), reason="concerns Linux without a GPU")
needs_openblas = pytest.mark.skipif(
    not (on_linux_cpu() and has_openblas()), reason="OpenBLAS is not installed"
)


def python(script: str, **env: str) -> str:
    surroundings = {k: v for k, v in os.environ.items() if not k.startswith("FASTVLM_")}
    surroundings |= {"PYTHONPATH": str(ROOT), **env}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=surroundings,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def libraries_bound_for_products(script: str, folder: Path) -> set[str]:
    """The libraries that libmlx's `cblas_sgemm` is bound to, as the dynamic linker reports them."""
    python(script, LD_DEBUG="bindings", LD_DEBUG_OUTPUT=str(folder / "ld"))
    pattern = re.compile(r"binding file \S*/libmlx\.so \[0\] to (\S+) \[0\].*`cblas_sgemm'")
    return {
        Path(found).name.split(".so")[0]
        for log in folder.glob("ld.*")
        for found in pattern.findall(log.read_text(errors="replace"))
    }


@needs_openblas
def test_products_go_to_openblas(tmp_path: Path) -> None:
    (library,) = libraries_bound_for_products(PREFER + PRODUCT, tmp_path)
    assert library.startswith("libopenblas")


@needs_openblas
def test_the_lazy_names_of_the_package_come_after_openblas(tmp_path: Path) -> None:
    script = "import fastvlm_mlx; fastvlm_mlx.find_model\n" + PRODUCT
    (library,) = libraries_bound_for_products(script, tmp_path)
    assert library.startswith("libopenblas")


@needs_linux_cpu
def test_the_variable_switches_it_off(tmp_path: Path) -> None:
    script = "import os; os.environ['FASTVLM_NO_OPENBLAS'] = '1'\n" + PREFER + PRODUCT
    (library,) = libraries_bound_for_products(script, tmp_path)
    assert library.startswith("libblas")


@needs_linux_cpu
def test_too_late_changes_nothing_and_says_so() -> None:
    said = python("import mlx.core\n" + PREFER)
    assert "openblas=False" in said
    assert "mlx.core was imported first" in said


@needs_linux_cpu
def test_without_openblas_there_is_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_candidates", lambda: iter(["libnothing-of-the-kind.so"]))
    monkeypatch.delitem(sys.modules, "mlx.core", raising=False)
    monkeypatch.delenv(device.NO_OPENBLAS, raising=False)
    blas = device._load_openblas()
    assert not blas.openblas
    assert blas.advice == device.INSTALL_OPENBLAS


def test_elsewhere_nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(device, "_candidates", lambda: pytest.fail("looked for OpenBLAS"))
    blas = device._load_openblas()
    assert not blas.openblas
    assert blas.advice is None


def test_it_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = device.prefer_openblas()
    monkeypatch.setattr(device, "_load_openblas", lambda: pytest.fail("tried again"))
    assert device.prefer_openblas() is first


def test_description_of_this_machine() -> None:
    here = device.describe()
    assert here.kind in ("Metal", "CUDA", "CPU")
    assert here.name
    assert here.cores >= 1
    assert here.memory_bytes > 100_000_000
    assert here.to_dict()["kind"] == here.kind


@pytest.mark.parametrize("gpu", [True, False])
def test_default_precision(monkeypatch: pytest.MonkeyPatch, gpu: bool) -> None:
    import mlx.core as mx

    monkeypatch.setattr(device, "on_gpu", lambda: gpu)
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        assert device.default_dtype(dtype) == (dtype if gpu else mx.float32)
