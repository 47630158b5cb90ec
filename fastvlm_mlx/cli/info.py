"""`fastvlm-mlx info`: what a model is made of."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fastvlm_mlx.cli.app import PROGRAM
from fastvlm_mlx.cli.common import JsonOption, complete_model, find, prepare, print_json
from fastvlm_mlx.hub import DEFAULT_REPO, FoundModel
from fastvlm_mlx.text import human_bytes, human_count, table

EXAMPLES = f"""\b
Examples:
  {PROGRAM} info
  {PROGRAM} info {DEFAULT_REPO}
  {PROGRAM} info ./my-model --json
"""


def command(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            show_default=False,
            autocompletion=complete_model,
            help="A folder, OWNER/NAME of a downloaded model, or 'demo'. Default: the one that "
            "generate would use.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show a model's parts, precision, resolution, tokens per picture and the memory it needs."""
    prepare()
    found = find(model)

    from fastvlm_mlx.generation import describe_model

    summary: dict[str, Any] = describe_model(found.path).to_dict()
    if as_json:
        print_json({"name": found.name, "path": str(found.path), **summary})
    else:
        typer.echo(summary_text(found, summary))


def summary_text(found: FoundModel, summary: dict[str, Any]) -> str:
    """A `ModelSummary.to_dict()` as two tables: the parts, and the facts about the whole."""
    counts, precision, sizes = summary["parameters"], summary["precision"], summary["bytes"]
    parts = [("part", "parameters", "size", "precision")]
    parts += [
        (
            part,
            human_count(counts[part]),
            human_bytes(sizes.get(part, 0)),
            str(precision.get(part, "")),
        )
        for part in counts
    ]
    if len(counts) > 1:
        parts.append(
            ("total", human_count(sum(counts.values())), human_bytes(sum(sizes.values())), "")
        )
    height, width = summary["resolution"]
    facts = [
        ("model", found.name),
        ("folder", str(found.path)),
        ("type", f"{summary['model_type']}, in the {summary['layout']} layout"),
        (
            "pictures",
            f"{width}x{height} pixels ({summary['picture_mode']}), "
            f"{summary['visual_tokens']} tokens each",
        ),
        ("vocabulary", f"{summary['vocabulary']} tokens"),
        ("context", f"{summary['context_length']} tokens"),
        ("quantisation", _quantisation(summary["quantization"])),
        (
            "memory needed",
            f"about {human_bytes(summary['memory_bytes'])} (weights, and 1024 tokens of context)",
        ),
    ]
    facts += [("corrected", repair) for repair in summary.get("repairs") or ()]
    return f"{table(facts)}\n\n{table(parts, right=(1, 2))}"


def _quantisation(settings: dict[str, Any] | None) -> str:
    if not settings:
        return "none"
    return ", ".join(
        f"{key} {value}" for key, value in settings.items() if not isinstance(value, dict)
    )
