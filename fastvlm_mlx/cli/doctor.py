"""`fastvlm-mlx doctor`: what this machine has, what it lacks, and what to do about it."""

from __future__ import annotations

import importlib
import platform
import shutil
import sys
from dataclasses import asdict
from importlib import metadata
from typing import Any

import typer

from fastvlm_mlx import __version__
from fastvlm_mlx.cli.app import PROGRAM
from fastvlm_mlx.cli.common import JsonOption, prepare, print_json
from fastvlm_mlx.errors import HubError
from fastvlm_mlx.hub import DEFAULT_REPO, cache_folder, cached_models, download_command, find_model
from fastvlm_mlx.text import human_bytes, table

EXAMPLES = f"""\b
Examples:
  {PROGRAM} doctor
  {PROGRAM} doctor --json > report.json
"""

# Distribution -> the module that must be importable.
_REQUIRED = {
    "mlx": "mlx.core",
    "mlx-lm": "mlx_lm",
    "transformers": "transformers",
    "tokenizers": "tokenizers",
    "safetensors": "safetensors",
    "huggingface_hub": "huggingface_hub",
    "numpy": "numpy",
    "pillow": "PIL",
}
_OPTIONAL = {
    "coremltools": "converting the encoder to Core ML: pip install 'fastvlm-mlx[coreml]'",
    "torch": "comparing with the reference model: pip install 'fastvlm-mlx[parity]'",
}
_LITTLE_DISK_BYTES = 5_000_000_000


def command(as_json: JsonOption = False) -> None:
    """Check this machine: device, memory, libraries, models, disk space. Fails only if answering is
    impossible.
    """
    prepare()
    report = examine()
    if as_json:
        print_json(report)
    else:
        typer.echo(report_text(report))
    if report["broken"]:
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """Everything that the report says, as plain data. `broken` and `advice` are lists of
    sentences.
    """
    broken: list[str] = []
    advice: list[str] = []
    report: dict[str, Any] = {
        "fastvlm_mlx": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": _versions(broken),
        "device": _device(broken, advice),
        "blas": _blas(advice),
        "models": _models(broken, advice),
        "disk": _disk(advice),
        "optional": {name: _version(name) for name in _OPTIONAL},
    }
    return {**report, "broken": broken, "advice": advice}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _versions(broken: list[str]) -> dict[str, str | None]:
    versions = {}
    for distribution, module in _REQUIRED.items():
        versions[distribution] = _version(distribution)
        try:
            importlib.import_module(module)
        except Exception as error:  # a damaged library can raise anything
            broken.append(
                f"{distribution} cannot be used ({type(error).__name__}: {error}); "
                f"to mend it: pip install --force-reinstall {distribution}"
            )
    return versions


def _device(broken: list[str], advice: list[str]) -> dict[str, Any] | None:
    from fastvlm_mlx.device import describe, installed_cuda_wheels, on_gpu

    try:
        import mlx.core as mx

        # A product whose result is known: the device computes, and computes right.
        if mx.sum(mx.ones((64, 64)) @ mx.ones((64, 64))).item() != 64**3:
            broken.append("MLX computes wrongly on this device")
        device = describe()
    except Exception as error:
        broken.append(f"MLX cannot compute ({type(error).__name__}: {error})")
        return None
    wheels = installed_cuda_wheels()
    if sys.platform == "linux" and not on_gpu():
        if wheels:
            # Both wheels hold mlx/lib/libmlx.so: the one that was installed last is the one that
            # runs.
            advice.append(
                f"{wheels[0]} is installed but MLX runs on the CPU: check the driver with "
                f"nvidia-smi, then run: pip install --force-reinstall --no-deps {wheels[0]}"
            )
        elif shutil.which("nvidia-smi"):
            advice.append("there is an NVIDIA GPU: pip install 'fastvlm-mlx[cuda]' uses it")
    if sys.platform == "darwin" and not on_gpu():
        advice.append(
            "Metal is not available: the GPU needs a native arm64 Python on macOS 14 or newer"
        )
    return device.to_dict()


def _blas(advice: list[str]) -> dict[str, Any]:
    from fastvlm_mlx.device import prefer_openblas

    blas = prefer_openblas()
    if blas.advice:
        advice.append(f"{blas.advice}: products on the CPU become tens of times faster")
    return asdict(blas)


def _models(broken: list[str], advice: list[str]) -> dict[str, Any]:
    default: dict[str, str] | None = None
    try:
        found = find_model()
        default = {"name": found.name, "path": str(found.path), "source": found.source}
        if found.source == "bundled":
            advice.append(
                "only the small bundled model is here; for the real one run: "
                + download_command(DEFAULT_REPO)
            )
    except HubError as error:
        broken.append(str(error))
    cached = cached_models()
    for model in cached:
        if model.missing:
            advice.append(
                f"{model.name} is incomplete; to finish it: {download_command(model.name)}"
            )
    return {
        "default": default,
        "cached": [{**asdict(model), "path": str(model.path)} for model in cached],
    }


def _disk(advice: list[str]) -> dict[str, Any]:
    folder = cache_folder()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < _LITTLE_DISK_BYTES:
        advice.append(f"little room for models in {folder}: HF_HOME moves them to another disk")
    return {"models_folder": str(folder), "free_bytes": free}


def report_text(report: dict[str, Any]) -> str:
    """The report as a person reads it."""
    device, models, disk = report["device"], report["models"], report["disk"]
    blas = report["blas"]
    rows: list[tuple[str, str]] = [("device", "none that works")]
    if device:
        rows = [("device", f"{device['kind']}: {device['name']}, {device['cores']} cores")]
        rows.append(("memory", human_bytes(device["memory_bytes"])))
    rows.append(
        ("CPU products", blas["detail"] + (f" ({blas['library']})" if blas["library"] else ""))
    )
    rows.append(("libraries", _listed(report["versions"])))
    rows.append(("optional", _listed(report["optional"])))
    default = models["default"]
    rows.append(("default model", f"{default['name']} ({default['path']})" if default else "none"))
    for model in models["cached"]:
        state = (
            f"incomplete: no {', '.join(model['missing'])}"
            if model["missing"]
            else human_bytes(model["bytes"])
        )
        rows.append(("downloaded", f"{model['name']} ({state})"))
    rows.append(("disk", f"{human_bytes(disk['free_bytes'])} free for {disk['models_folder']}"))
    lines = [
        f"{PROGRAM} {report['fastvlm_mlx']}, Python {report['python']}, {report['system']}",
        "",
        table(rows),
    ]
    for title, sentences in (
        ("What to improve", report["advice"]),
        ("What is broken", report["broken"]),
    ):
        if sentences:
            lines += ["", f"{title}:", *(f"  - {sentence}" for sentence in sentences)]
    hints = [
        f"{name} is for {use}"
        for name, use in _OPTIONAL.items()
        if report["optional"][name] is None
    ]
    if hints:
        lines += [
            "",
            "Not installed, and needed only for some things:",
            *(f"  - {hint}" for hint in hints),
        ]
    lines += [
        "",
        "Answering is impossible until that is mended." if report["broken"] else "Ready to answer.",
    ]
    return "\n".join(lines)


def _listed(versions: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items())
