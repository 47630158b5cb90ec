"""`fastvlm-mlx download`: the only command that fetches a model."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from fastvlm_mlx.cli.app import PROGRAM, note
from fastvlm_mlx.hub import DEFAULT_REPO, download

EXAMPLES = f"""\b
Examples:
  {PROGRAM} download {DEFAULT_REPO}
  {PROGRAM} download mlx-community/FastVLM-0.5B-bf16
  HF_HOME=/Volumes/big {PROGRAM} download apple/FastVLM-7B
"""


def command(
    repo: Annotated[
        str,
        typer.Argument(
            metavar="OWNER/NAME", show_default=False, help="The model's repository on the hub."
        ),
    ],
    revision: Annotated[
        str | None,
        typer.Option(
            "--revision", show_default=False, help="Branch, tag or commit; default: main."
        ),
    ] = None,
) -> None:
    """Fetch a model from the hub into the local cache, and print its folder.

    A download that was cut off goes on where it stopped. Afterwards the model is found by its name
    without a network.
    """
    # The hub's own warnings about each attempt; what comes of it is said once, at the end.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    try:
        found = download(repo, revision)
    except KeyboardInterrupt:
        note("stopped; what has arrived is kept: the same command goes on from there")
        raise
    note(
        f'note: ready; try: {PROGRAM} generate --model {found.name} --image PICTURE "What is this?"'
    )
    typer.echo(found.path)
