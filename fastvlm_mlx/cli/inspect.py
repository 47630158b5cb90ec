"""`fastvlm-mlx inspect`: what a checkpoint holds and what is wrong with it, from its headers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastvlm_mlx.cli.app import PROGRAM
from fastvlm_mlx.cli.common import JsonOption, prepare, print_json
from fastvlm_mlx.text import human_bytes, human_count, table

if TYPE_CHECKING:
    from fastvlm_mlx.convert.inspection import Inspection

EXAMPLES = f"""\b
Examples:
  {PROGRAM} inspect ./FastVLM-0.5B
  {PROGRAM} inspect apple/FastVLM-0.5B
  {PROGRAM} inspect model-00001-of-00002.safetensors --tensors
  {PROGRAM} inspect mm_projector.bin --json
"""

_SHOWN = 20  # lines of one kind before "and N more"


def command(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            show_default=False,
            help="A folder, a file of weights, a zip, or OWNER/NAME of a downloaded model.",
        ),
    ],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show layout, parts, types and faults of a checkpoint without reading its weights.

    Exits with 1 where the checkpoint has a fault that loading or converting would refuse.
    """
    prepare()
    from fastvlm_mlx.convert.inspection import inspect

    report = inspect(_locate(path))
    if as_json:
        print_json(report.to_dict(tensors=tensors))
    else:
        typer.echo(inspection_text(report, tensors=tensors))
    if report.broken:
        raise typer.Exit(1)


def _locate(path: str) -> Path:
    """A path as it stands; a name that is no path is looked for in the hub's local cache."""
    given = Path(path).expanduser()
    if given.exists() or path.startswith((".", "/", "~")) or path.count("/") != 1:
        return given
    from fastvlm_mlx.hub import find_model

    return find_model(path).path


def inspection_text(report: Inspection, *, tensors: bool = False) -> str:
    """An `Inspection` as people read it: facts, parts, and lists of what is odd."""
    facts = [("path", report.path), ("content", report.content)]
    if report.layout:
        kind = f", {report.model_type}" if report.model_type else ""
        facts.append(("layout", f"{report.layout}{kind}"))
    if report.encoder:
        facts.append(("encoder", report.encoder))
    if report.picture_size:
        facts.append(
            ("pictures", f"{report.picture_size} pixels, {report.visual_tokens} tokens each")
        )
    if report.quantization:
        packed = [f"{n} layers {how}" for how, n in report.quantization["layers"].items()]
        facts.append(("quantisation", "; ".join(packed) or "stated, but nothing is packed"))
    blocks = [table(facts)]
    if report.files:
        rows = [
            (f.name, human_bytes(f.bytes), f"{f.tensors} tensors" if not f.fault else "unreadable")
            for f in report.files
        ]
        blocks.append(table([("file", "size", ""), *_short(rows)], right=(1,)))
    if report.parts:
        blocks.append(_parts_text(report))
    for title, lines in (
        ("repaired when loaded", report.repairs),
        ("surprises", [str(s) for s in report.surprises]),
        ("faults", [str(s) for s in report.faults]),
    ):
        if lines:
            blocks.append("\n".join([f"{title}:", *(f"  {line}" for line in _shortened(lines))]))
    if tensors:
        listed = [("tensor", "type", "shape", "file")]
        for name, tensor in report.tensors.items():
            shape = "x".join(map(str, tensor["shape"])) or "scalar"
            listed.append((name, tensor["dtype"], shape, tensor["file"]))
        blocks.append(table(listed))
    verdict = "broken: it cannot be loaded as it is" if report.broken else "no fault found"
    return "\n\n".join([*blocks, verdict])


def _parts_text(report: Inspection) -> str:
    rows = [("part", "tensors", "parameters", "size", "bits a weight", "types")]
    for part in report.parts:
        types = ", ".join(f"{kind} {human_bytes(n)}" for kind, n in part.dtypes.items())
        bits = f"{part.bits_per_weight:.2f}" if part.parameters else ""
        rows.append(
            (
                part.name,
                str(part.tensors),
                human_count(part.parameters),
                human_bytes(part.bytes),
                bits,
                types,
            )
        )
    return table(rows, right=(1, 2, 3, 4))


def _short(rows: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    if len(rows) <= _SHOWN:
        return rows
    return [*rows[:_SHOWN], (f"and {len(rows) - _SHOWN} more", "", "")]


def _shortened(lines: list[str]) -> list[str]:
    more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return [*lines[:_SHOWN], *more]
