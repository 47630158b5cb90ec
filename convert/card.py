"""The model card: what the folder is, where it came from, and what was done."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from fastvlm_mlx import __version__
from fastvlm_mlx.text import human_bytes, human_count

from .options import ConvertOptions
from .report import ConvertReport
from .source import Source
from .verify import Verification, verification_text

_VERSIONS = ("mlx", "mlx-lm")


def write_card(
    folder: Path,
    source: Source,
    report: ConvertReport,
    options: ConvertOptions,
    resolution: tuple[int, int],
) -> None:
    """Write README.md from a report that is complete."""
    lines = [
        *_front_matter(source, report),
        f"# {report.target.name}",
        "",
        f"FastVLM in the layout of the MLX ecosystem, converted by fastvlm-mlx {__version__} from "
        f"{_source_name(source)}.",
        "",
        "```sh",
        f'fastvlm-mlx generate --model {report.target.name} --image cat.jpg "What is this?"',
        "```",
        "",
        "The same folder is read by mlx-vlm and by mlx-swift-lm.",
        "",
        "## What is in it",
        "",
        "| part | parameters | size | bits per weight |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, part in report.parts.items():
        lines.append(
            f"| {name} | {human_count(part.parameters)} | {human_bytes(part.bytes)} "
            f"| {part.bits_per_weight:.2f} |"
        )
    height, width = resolution
    lines += [
        "",
        f"Pictures: {width}x{height} pixels. Quantisation: {_quantisation(report.quantization)}.",
    ]
    if report.kept:
        lines += ["", "Kept whole though the rest is quantised:", ""]
        lines += [f"- `{path}`: {why}" for path, why in report.kept.items()]
    lines += ["", "## What was done", ""]
    given = " ".join(options.describe()) or "none (same numbers, other names)"
    lines += [f"- Options: {given}", f"- Source layout: {report.source_layout}"]
    lines += [f"- Repaired: {repair}" for repair in report.repairs]
    lines += [f"- Note: {note}" for note in report.notes]
    lines += [f"- Versions: {_versions()}"]
    if report.source_sha256:
        lines += ["", "| file of the source | SHA-256 |", "| --- | --- |"]
        lines += [f"| {name} | `{digest}` |" for name, digest in report.source_sha256.items()]
    lines += ["", *_parity(report.verification)]
    lines += ["## Terms", "", _terms(folder, source), ""]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _parity(verification: Any) -> list[str]:
    """The figures of the comparison with the source, as whatever was done returned them."""
    if verification is None:
        return []
    text = str(verification)
    if isinstance(verification, Verification):
        text = verification_text(verification)
    return ["## Compared with the source", "", "```", text, "```", ""]


def _front_matter(source: Source, report: ConvertReport) -> list[str]:
    lines = ["---", "library_name: mlx", "pipeline_tag: image-text-to-text"]
    lines += ["tags:", "- mlx", "- fastvlm", "- vision-language-model"]
    if source.located.repo is not None:
        lines += ["base_model:", f"- {source.located.repo.partition('@')[0]}"]
        if report.quantization is not None:
            lines += ["base_model_relation: quantized"]
    return [*lines, *_license_lines(source), "---", ""]


def _license_lines(source: Source) -> list[str]:
    """The lines of the source's own card that state its licence."""
    readme = source.find("README.md")
    if readme is None:
        return []
    text = readme.read_text(encoding="utf-8", errors="replace")[:20_000]
    match = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    head = match[1].splitlines() if match else []
    return [line for line in head if re.match(r"license(_name|_link)?: \S", line)]


def _terms(folder: Path, source: Source) -> str:
    files = [f.name for f in sorted(folder.iterdir()) if re.match(r"(?i)licen[cs]e", f.name)]
    if files:
        listed = ", ".join(f"[{name}]({name})" for name in files)
        return f"Those of the source: {listed}."
    if source.located.repo is not None:
        return f"Those of the source, {source.located.repo} on the hub. Read them before use."
    return "Those of the source, which came without a licence file. Find them out before use."


def _source_name(source: Source) -> str:
    """The source without the place on the converter's machine."""
    if source.located.repo is not None:
        return f"`{source.located.repo}`"
    path = source.located.archive or Path(source.located.name)
    return f"`{path.resolve().name}`"


def _quantisation(settings: dict[str, Any] | None) -> str:
    if settings is None:
        return "none"
    special = sum(isinstance(value, dict) and not name.startswith("mm_projector.layers.")
                  for name, value in settings.items())  # fmt: skip
    text = f"{settings['mode']}, {settings['bits']} bits, groups of {settings['group_size']}"
    return text + (f" ({special} layers otherwise)" if special else "")


def _versions() -> str:
    names: Sequence[str] = _VERSIONS
    found = [f"{name} {metadata.version(name)}" for name in names]
    return ", ".join([f"fastvlm-mlx {__version__}", *found, f"Python {platform.python_version()}"])
