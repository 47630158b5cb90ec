"""What this machine computes on, and how to make the most of it.

On Linux without a GPU, MLX's wheel brings the reference BLAS: correct, portable and unoptimised.
The dynamic linker, however, binds a symbol to the first library *in global scope* that defines it.
A library that was loaded with `RTLD_GLOBAL` before `libmlx.so` therefore comes first, and
`cblas_sgemm` of OpenBLAS takes the place of the slow one, without a change to MLX. That is all
`prefer_openblas` does; it must run before `mlx.core` is imported.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mlx.core as mx

NO_OPENBLAS = "FASTVLM_NO_OPENBLAS"
INSTALL_OPENBLAS = (
    "install OpenBLAS (Debian, Ubuntu: apt install libopenblas0; Fedora: dnf install openblas)"
)

# The 32-bit-integer builds that MLX was compiled against. `libopenblas64` takes 64-bit integers and
# must not be used.
_OPENBLAS_NAMES = ("libopenblas.so.0", "libopenblasp.so.0", "libopenblas.so")
_CUDA_WHEELS = ("mlx-cuda-12", "mlx-cuda-13", "mlx-cuda")


@dataclass(frozen=True)
class Blas:
    """The state of the matrix products on the CPU. `advice` is None where nothing could be
    better.
    """

    openblas: bool
    detail: str
    library: str | None = None
    advice: str | None = None


@dataclass(frozen=True)
class Device:
    """Where MLX computes. `kind` is "Metal", "CUDA" or "CPU"; `memory_bytes` is what that device
    can use in all.
    """

    kind: str
    name: str
    cores: int
    memory_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


_blas: Blas | None = None


def prefer_openblas() -> Blas:
    """Puts OpenBLAS in the place of MLX's own BLAS, on Linux without a GPU. Does it once, and never
    fails.

    Call it before `mlx.core` is imported; afterwards it changes nothing and says so.
    `FASTVLM_NO_OPENBLAS=1` switches it off.
    """
    global _blas
    if _blas is None:
        _blas = _load_openblas()
    return _blas


def _load_openblas() -> Blas:
    if sys.platform != "linux":
        return Blas(False, "the system's own, which is optimised")
    if installed_cuda_wheels():
        return Blas(False, "MLX's own; products run on the GPU")
    if os.environ.get(NO_OPENBLAS, "0") not in ("", "0"):
        return Blas(
            False, f"MLX's own (unoptimised), as {NO_OPENBLAS} asks", advice=f"unset {NO_OPENBLAS}"
        )
    if "mlx.core" in sys.modules:
        if preloaded := _mapped_openblas():  # LD_PRELOAD, or the caller's own doing
            return Blas(True, "OpenBLAS, loaded before this package", preloaded)
        return Blas(
            False,
            "MLX's own (unoptimised): mlx.core was imported first",
            advice="call fastvlm_mlx.device.prefer_openblas() before importing mlx.core",
        )
    for candidate in _candidates():
        try:
            library = ctypes.CDLL(candidate, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        if hasattr(library, "cblas_sgemm"):
            return Blas(True, "OpenBLAS", _mapped_openblas() or candidate)
    return Blas(False, "MLX's own (unoptimised): OpenBLAS was not found", advice=INSTALL_OPENBLAS)


def _candidates() -> Iterator[str]:
    """Names and paths worth trying, the likeliest first."""
    yield from _OPENBLAS_NAMES
    for prefix in (sys.prefix, os.environ.get("CONDA_PREFIX")):
        if prefix:
            yield from (str(Path(prefix, "lib", name)) for name in _OPENBLAS_NAMES)
    yield from (
        str(path) for path in sorted(Path("/usr/lib").glob("*/openblas*/libopenblas*.so.0"))
    )
    # Last, because it may start ldconfig or a compiler to find out.
    if name := ctypes.util.find_library("openblas"):
        yield name


def _mapped_openblas() -> str | None:
    """The path of the OpenBLAS in this process, or None. numpy's private copy (libscipy_openblas)
    does not count.
    """
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[5] for line in lines if "libopenblas" in line}
    return min((p for p in paths if Path(p).name.startswith("libopenblas")), default=None)


def installed_cuda_wheels() -> list[str]:
    """The CUDA backends of MLX that are installed, such as ["mlx-cuda-12"]."""
    found = []
    for wheel in _CUDA_WHEELS:
        try:
            metadata.version(wheel)
        except metadata.PackageNotFoundError:
            continue
        found.append(wheel)
    return found


def on_gpu() -> bool:
    """Whether MLX's default device is a GPU (Metal or CUDA)."""
    import mlx.core as mx

    return bool(mx.default_device().type == mx.DeviceType.gpu)


def default_dtype(checkpoint_dtype: mx.Dtype) -> mx.Dtype:
    """The precision to compute in: the checkpoint's on a GPU, float32 on a CPU.

    MLX's CPU backend hands float32 products to BLAS but computes half precision in plain loops,
    tens of times slower.
    """
    import mlx.core as mx

    return checkpoint_dtype if on_gpu() else mx.float32


def describe() -> Device:
    """The device MLX computes on by default, with the memory it can use."""
    import mlx.core as mx

    if not on_gpu():
        return Device("CPU", _cpu_name(), _cpu_count(), _physical_memory())
    info: dict[str, Any] = dict(mx.device_info())
    kind = "Metal" if mx.metal.is_available() else "CUDA"
    memory = next(
        (int(info[key]) for key in ("memory_size", "total_memory") if key in info),
        _physical_memory(),
    )
    return Device(kind, str(info.get("device_name", "unknown")), _cpu_count(), memory)


def _cpu_count() -> int:
    if hasattr(
        os, "sched_getaffinity"
    ):  # Linux: what this process may use, not what the machine has
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        for line in (
            Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        ):
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _physical_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError, AttributeError):
        return 0
