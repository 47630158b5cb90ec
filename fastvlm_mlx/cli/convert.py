"""`fastvlm-mlx convert`: any FastVLM checkpoint to a folder that runs in the MLX ecosystem."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from fastvlm_mlx.cli.app import PROGRAM
from fastvlm_mlx.cli.common import JsonOption, print_json
from fastvlm_mlx.text import human_bytes, human_count, human_seconds, table

if TYPE_CHECKING:
    from fastvlm_mlx.convert.pipeline import Original
    from fastvlm_mlx.convert.report import ConvertReport

EXAMPLES = f"""\b
Examples:
  {PROGRAM} convert apple/FastVLM-0.5B FastVLM-0.5B-mlx
  {PROGRAM} convert apple/FastVLM-7B FastVLM-7B-4bit --bits 4 --verify
  {PROGRAM} convert llava-fastvithd_0.5b_stage3.zip FastVLM-0.5B-mlx --dtype bfloat16
  {PROGRAM} convert FastVLM-1.5B out --recipe mixed_4_6 --keep lm_head,embed_tokens
  {PROGRAM} convert apple/FastVLM-1.5B small --bits 3 --dwq ./my-pictures
  {PROGRAM} convert ./my-lora-run tuned --base apple/FastVLM-1.5B
  {PROGRAM} convert apple/FastVLM-7B-int4 joined --encoder apple/FastVLM-0.5B
  {PROGRAM} convert FastVLM-7B-4bit FastVLM-7B-whole --dequantize
"""


_STAGES = {"unpack": "unpacking", "write": "writing"}


def command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", show_default=False, help="A folder, a .zip, or OWNER/NAME on the hub."
        ),
    ],
    target: Annotated[
        Path, typer.Argument(metavar="TARGET", show_default=False, help="The folder to write.")
    ],
    bits: Annotated[
        int | None,
        typer.Option("--bits", help="Quantise the language model: 2, 3, 4, 5, 6 or 8 bits."),
    ] = None,
    group_size: Annotated[
        int | None, typer.Option("--group-size", help="Weights a scale: 32, 64 (default), 128.")
    ] = None,
    mode: Annotated[
        str | None, typer.Option("--mode", help="affine (default), mxfp4, nvfp4 or mxfp8.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", help="Mixed bits: mixed_2_6, mixed_3_4, mixed_3_6 or mixed_4_6."),
    ] = None,
    keep: Annotated[
        str,
        typer.Option(
            "--keep",
            metavar="NAMES",
            show_default=False,
            help="Layers to leave whole, by a part of their names: lm_head,embed_tokens",
        ),
    ] = "",
    projector_bits: Annotated[
        int | None, typer.Option("--projector-bits", help="Quantise the projector too.")
    ] = None,
    dwq: Annotated[
        Path | None,
        typer.Option(
            "--dwq", metavar="FOLDER", help="Train the scales on the pictures in FOLDER (DWQ)."
        ),
    ] = None,
    dwq_passes: Annotated[int, typer.Option("--dwq-passes", help="How often to go over them.")] = 4,
    dwq_rate: Annotated[float, typer.Option("--dwq-rate", help="The learning rate.")] = 1e-5,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Make a quantised model whole again.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            help="float16, bfloat16 or float32 for what is not quantised. Default: the source's.",
        ),
    ] = None,
    encoder_dtype: Annotated[
        str | None,
        typer.Option(
            "--encoder-dtype",
            help="The encoder's own. Default: --dtype or the source's, but float32 for float16.",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", help="The model that an adapter or projector belongs to."),
    ] = None,
    encoder: Annotated[
        str | None, typer.Option("--encoder", help="A model or file to take the encoder from.")
    ] = None,
    shard_size: Annotated[
        str, typer.Option("--shard-size", help="Largest file of weights.")
    ] = "5GB",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace TARGET, in one step, once all is written.")
    ] = False,
    offline: Annotated[
        bool, typer.Option("--offline", help="Never download SOURCE; take it from the local cache.")
    ] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Run source and result on pictures; keep the result if they agree.",
        ),
    ] = False,
    pictures: Annotated[
        list[Path] | None,
        typer.Option("--picture", help="A picture to verify with. Repeat it for more."),
    ] = None,
    reference: Annotated[
        bool | None,
        typer.Option(
            "--reference/--no-reference",
            show_default=False,
            help="Verify against transformers too. Default: if torch and timm are installed.",
        ),
    ] = None,
    upload_repo: Annotated[
        str | None,
        typer.Option("--upload-repo", metavar="OWNER/NAME", help="Then send it to the hub."),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Make a new repository public; it is private else.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before uploading.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Convert a checkpoint to MLX safetensors for fastvlm-mlx, mlx-vlm and mlx-swift-lm.

    SOURCE is read in every layout that FastVLM is published in, and never written to. A repository
    that is not on this machine is downloaded first. TARGET appears whole at the end, or not at all.
    """
    from fastvlm_mlx.convert.options import ConvertOptions, parse_size
    from fastvlm_mlx.convert.upload import check_repo

    if upload_repo is not None:
        check_repo(upload_repo)
    options = ConvertOptions(
        bits=bits,
        group_size=group_size,
        mode=cast(Any, mode),  # checked there, with a message that lists the choices
        recipe=recipe,
        keep=tuple(item.strip() for item in keep.split(",") if item.strip()),
        projector_bits=projector_bits,
        dequantize=dequantize,
        dtype=cast(Any, dtype),
        encoder_dtype=cast(Any, encoder_dtype),
        dwq=dwq,
        dwq_passes=dwq_passes,
        dwq_rate=dwq_rate,
        base=base,
        encoder=encoder,
        shard_size=parse_size(shard_size),
        overwrite=overwrite,
        download=not offline,
    )
    _prepare(offline)
    from fastvlm_mlx.convert import convert

    wants = verify or bool(pictures)
    compare = _comparison(list(pictures or []), reference, as_json) if wants else None
    with _Bars() as bars:
        report = convert(
            source,
            target,
            options,
            progress=bars.show if sys.stderr.isatty() else None,
            verification=compare,
        )
    uploaded = _upload(report.target, upload_repo, public, yes) if upload_repo else None
    if as_json:
        values = report.to_dict()
        print_json({**values, "uploaded": uploaded} if uploaded else values)
        return
    typer.echo(report_text(report))
    if uploaded is not None:
        typer.echo(f"\nuploaded to {uploaded['url']}")


def _prepare(offline: bool) -> None:
    """As `cli.common.prepare`, except that the hub may be asked for what was named."""
    from fastvlm_mlx.device import prefer_openblas

    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    prefer_openblas()
    # Ending it from outside tidies up as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def _comparison(
    pictures: list[Path], reference: bool | None, quiet: bool
) -> Callable[[Original, Path], Any]:
    def compare(original: Original, folder: Path) -> Any:
        from fastvlm_mlx.convert.verify import DifferentError, verification_text, verify

        result = verify(
            original,
            folder,
            source_name="the source",
            pictures=pictures or None,
            reference=_wants_reference(original, reference),
        )
        if not quiet:
            typer.echo(verification_text(result) + "\n")
        if not result.passed:
            raise DifferentError(result)
        return result

    return compare


def _wants_reference(original: Original, asked: bool | None) -> bool:
    """Whether to compare with transformers too: as asked, else where that can be done."""
    if asked is not None:
        return asked
    if not isinstance(original, Path) or not (find_spec("torch") and find_spec("timm")):
        return False
    from fastvlm_mlx.config import read_config

    config = read_config(original)
    return config.quantization is None and config.text["model_type"] == "qwen2"


def _upload(folder: Path, repo: str, public: bool, yes: bool) -> dict[str, Any]:
    from fastvlm_mlx.convert.upload import plan_upload, upload

    plan = plan_upload(folder, repo, private=not public)

    def ask(question: str) -> bool:
        return typer.confirm(question, err=True)

    return upload(plan, confirm=None if yes else ask).to_dict()


class _Bars:
    """Progress on standard error: one bar a stage, in bytes."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._stage = ""

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def show(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self._close()
            from tqdm import tqdm  # type: ignore[import-untyped]

            name = _STAGES.get(stage, stage)
            self._bar = tqdm(desc=name, total=total, unit="B", unit_scale=True, leave=False)
            self._stage = stage
        self._bar.update(done - self._bar.n)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def report_text(report: ConvertReport) -> str:
    """A `ConvertReport` as people read it."""
    parts = [("part", "parameters", "size", "bits per weight")]
    parts += [
        (name, human_count(p.parameters), human_bytes(p.bytes), f"{p.bits_per_weight:.2f}")
        for name, p in report.parts.items()
    ]
    parameters = sum(part.parameters for part in report.parts.values())
    parts.append(
        (
            "total",
            human_count(parameters),
            human_bytes(report.bytes),
            f"{report.bits_per_weight:.2f}",
        )
    )
    lines = [table(parts, right=(1, 2, 3)), ""]
    lines += [f"repaired  {repair}" for repair in report.repairs]
    lines += [f"note      {text}" for text in report.notes]
    reasons: dict[str, list[str]] = {}
    for path, why in report.kept.items():
        reasons.setdefault(why, []).append(path)
    for why, paths in reasons.items():
        shown = paths[0] if len(paths) == 1 else f"{len(paths)} layers ({paths[0]}, ...)"
        lines.append(f"kept      {shown}: {why}")
    files = sum(name.endswith(".safetensors") for name in report.files)
    lines.append(
        f"written   {report.target} in {human_seconds(report.seconds)}, "
        f"{files} file{'s' * (files != 1)} of weights, from the {report.source_layout} layout"
    )
    return "\n".join(lines)
