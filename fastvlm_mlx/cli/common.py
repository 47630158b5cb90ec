"""What several commands share: the option for the model, the quiet start, and where notes go."""

from __future__ import annotations

import json
import os
from typing import Annotated, Any

import typer

from fastvlm_mlx.cli.app import note
from fastvlm_mlx.hub import DEFAULT_REPO, MODEL_VARIABLE, FoundModel, cached_models, find_model


def complete_model(incomplete: str) -> list[str]:
    """Names of the models on this machine, for shell completion."""
    names = ["demo", *(model.name for model in cached_models() if not model.missing)]
    return [name for name in names if name.startswith(incomplete)]


ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        autocompletion=complete_model,
        show_default=False,
        help="A folder, OWNER/NAME of a downloaded model, or 'demo' for the bundled one. "
        f"Default: {MODEL_VARIABLE}, else {DEFAULT_REPO} if downloaded, else the bundled one.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]


def prepare() -> None:
    """Call before the first import of MLX: the better BLAS, no network, no advertisements of
    libraries.
    """
    from fastvlm_mlx.device import prefer_openblas

    # What loads a model must never fetch one by surprise, nor ask the hub about one.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    prefer_openblas()


def find(name: str | None) -> FoundModel:
    """`find_model`, with its notice put before the person."""
    found = find_model(name)
    if found.notice:
        note(f"note: {found.notice}")
    return found


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2, default=str))
