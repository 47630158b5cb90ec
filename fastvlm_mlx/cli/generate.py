"""`fastvlm-mlx generate`: a question and pictures in, an answer out."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fastvlm_mlx.cli.app import PROGRAM, note
from fastvlm_mlx.cli.common import JsonOption, ModelOption, find, prepare, print_json
from fastvlm_mlx.errors import PictureError, UsageError
from fastvlm_mlx.text import human_bytes, human_seconds, table

if TYPE_CHECKING:
    from PIL.Image import Image

DEFAULT_PROMPT = "Describe this picture."
STDIN = "-"

EXAMPLES = f"""\b
Examples:
  {PROGRAM} generate --image cat.jpg "What is this?"
  {PROGRAM} generate --image a.png --image b.png "Is <image> larger than <image>?"
  curl -s https://example.org/cat.jpg | {PROGRAM} generate --image - "What colour is it?"
  {PROGRAM} generate --model apple/FastVLM-0.5B --image page.png --json "Read the text."
  {PROGRAM} generate --image cat.jpg --temp 0.7 --top-p 0.9 --seed 1 "Tell a story."
"""


def command(
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="QUESTION",
            show_default=False,
            help="The question; '-' reads it from standard input. Each <image> in it stands for "
            "one picture, in order; without any, the pictures come first. Default with a picture: "
            f"'{DEFAULT_PROMPT}'",
        ),
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(
            "--image",
            "-i",
            metavar="PICTURE",
            show_default=False,
            help="A file, a URL, or '-' for standard input. May be repeated.",
        ),
    ] = None,
    model: ModelOption = None,
    system: Annotated[
        str | None,
        typer.Option(
            "--system",
            metavar="TEXT",
            show_default=False,
            help="System prompt, in place of the model's own.",
        ),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="Longest answer, in tokens.")
    ] = 256,
    temp: Annotated[
        float,
        typer.Option(
            "--temp", min=0.0, help="Sampling temperature; 0 takes the likeliest token each time."
        ),
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            "--top-p",
            min=0.0,
            max=1.0,
            help="Sample from the likeliest tokens of this total; 0 is off.",
        ),
    ] = 0.0,
    top_k: Annotated[
        int, typer.Option("--top-k", min=0, help="Sample from this many tokens; 0 is off.")
    ] = 0,
    min_p: Annotated[
        float,
        typer.Option(
            "--min-p",
            min=0.0,
            max=1.0,
            help="Drop tokens below this share of the likeliest; 0 is off.",
        ),
    ] = 0.0,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            "--repetition-penalty", show_default=False, help="Above 1 discourages repetition."
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed", min=0, max=2**64 - 1, show_default=False, help="Makes sampling repeatable."
        ),
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "float16", "bfloat16"],
        typer.Option(
            "--dtype", help="Precision; auto is the model's own on a GPU and float32 on a CPU."
        ),
    ] = "auto",
    stats: Annotated[
        bool, typer.Option("--stats", help="Print times and counts to standard error.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Answer a question about pictures, printing the answer as it is written."""
    sources = list(image or [])
    _check_sampling(temp=temp, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty)
    if temp == 0 and (top_p or top_k or min_p):
        note("note: --top-p, --top-k and --min-p have no effect without --temp above 0")
    question = _question(prompt, sources)
    _check_present(sources)

    prepare()
    found = find(model)
    # Pictures before the model: a bad one is told at once and not after a minute of loading.
    pictures, opening_s = _open_pictures(sources)

    from fastvlm_mlx import load, stream_generate

    began = time.perf_counter()
    vlm, processor = load(found.path, dtype=dtype)
    load_s = time.perf_counter() - began

    responses = stream_generate(
        vlm,
        processor,
        question,
        pictures or None,
        system=system,
        max_tokens=max_tokens,
        temperature=temp,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    answer, last = _write(responses, quiet=as_json)
    figures: dict[str, Any] = (
        dict(last.stats.to_dict()) if last is not None and last.stats is not None else {}
    )
    _add_times(figures, load_s=load_s, opening_s=opening_s)
    if as_json:
        print_json(
            {
                "answer": answer,
                "finish_reason": last.finish_reason if last is not None else None,
                "model": found.name,
                "pictures": ["standard input" if source == STDIN else source for source in sources],
                "stats": figures,
            }
        )
    if stats:
        note(stats_table(figures))


def _question(prompt: str | None, sources: list[str]) -> str:
    if [prompt, *sources].count(STDIN) > 1:
        raise UsageError(
            "standard input ('-') can be read only once: for one picture, or for the question"
        )
    if prompt == STDIN:
        prompt = sys.stdin.read().strip()
    if prompt is None:
        if not sources:
            raise UsageError(
                f"nothing to answer: give a question, a picture or both ({PROGRAM} generate --help)"
            )
        return DEFAULT_PROMPT
    if not prompt.strip():
        raise UsageError("the question is empty")
    return prompt


def _check_sampling(**numbers: float | None) -> None:
    """What the options' own ranges let through: NaN and infinity, and a penalty of nothing."""
    for name, number in numbers.items():
        if number is not None and not math.isfinite(number):
            raise UsageError(f"--{name.replace('_', '-')} must be a finite number")
    penalty = numbers["repetition_penalty"]
    if penalty is not None and penalty <= 0:
        raise UsageError("--repetition-penalty must be above 0 (1 changes nothing)")


def _check_present(sources: list[str]) -> None:
    for source in sources:
        elsewhere = source == STDIN or "://" in source or source.startswith("data:")
        if not elsewhere and not Path(source).expanduser().exists():
            raise PictureError(f"there is no picture {source}")


def _open_pictures(sources: list[str]) -> tuple[list[Image], float]:
    """Opens every picture. Returns them with the seconds it took."""
    if not sources:
        return [], 0.0
    from fastvlm_mlx.processing.pictures import open_picture

    began = time.perf_counter()
    return [open_picture(source) for source in sources], time.perf_counter() - began


def _write(responses: Any, *, quiet: bool) -> tuple[str, Any]:
    """Prints the answer piece by piece. Returns all of it, and the last response.

    Whatever ends the answer, Ctrl-C included, what was printed stays and its line is closed.
    """
    pieces: list[str] = []
    last = None
    try:
        for last in responses:
            pieces.append(last.text)
            if not quiet and last.text:
                sys.stdout.write(last.text)
                sys.stdout.flush()
    finally:
        if not quiet and pieces:
            sys.stdout.write("\n")
            sys.stdout.flush()
    return "".join(pieces), last


def _add_times(figures: dict[str, Any], *, load_s: float, opening_s: float) -> None:
    """Adds what happened out of the generator's sight: loading, and opening the pictures."""
    figures["load_s"] = load_s
    for name in ("preprocess_s", "ttft_s"):
        if figures.get(name) is not None:
            figures[name] += opening_s


def stats_table(figures: dict[str, Any]) -> str:
    """The figures of `Stats.to_dict()` as lines for people. Absent ones are left out."""
    times = ("load", "preprocess", "encode", "project", "prefill")
    rows = [
        (name, human_seconds(figures[f"{name}_s"]))
        for name in times
        if figures.get(f"{name}_s") is not None
    ]
    if figures.get("ttft_s") is not None:
        rows.append(("time to first token", f"{human_seconds(figures['ttft_s'])} (without load)"))
    if figures.get("decode_tokens_per_s") is not None:
        rows.append(("decode", f"{figures['decode_tokens_per_s']:.1f} tokens/s"))
    if figures.get("prompt_tokens") is not None:
        rows.append(
            (
                "prompt",
                f"{figures['prompt_tokens']} tokens, {figures['visual_tokens']} of them visual",
            )
        )
    if figures.get("generated_tokens") is not None:
        rows.append(("answer", f"{figures['generated_tokens']} tokens"))
    if figures.get("peak_memory_bytes") is not None:
        rows.append(("peak memory", human_bytes(figures["peak_memory_bytes"])))
    return table(rows)
