"""`convert`: from any source to a folder that fastvlm-mlx, mlx-vlm and mlx-swift-lm run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from fastvlm_mlx.config import ModelConfig, picture_config
from fastvlm_mlx.loading import believe_tensors, believe_tokenizer, load_tokenizer
from fastvlm_mlx.processing.processor import picture_processor
from fastvlm_mlx.weights.files import LazyTensor

from .card import write_card
from .joined import load_source
from .naming import disk_name
from .options import ConvertOptions
from .plan import Plan, make_plan
from .report import ConvertReport, Progress
from .sidecars import is_fastvithd, source_config, tokenizer_folder, write_sidecars
from .source import Source, open_source, sha256
from .target import Target
from .writer import check_written, write_shards

# Room for the small files, over that of the weights.
_SIDECAR_BYTES = 64 << 20
# What MLX may keep of freed buffers; its own default is a share of the whole memory.
_CACHE_BYTES = 128 << 20

# What a source is compared as: its folder, or a function that loads it where it is no such folder.
Original = Path | Callable[[], tuple[Any, Any]]
# Called with the source and the new folder, before that is put in place.
Verification = Callable[[Original, Path], Any]


def convert(
    source: str | Path,
    target: str | Path,
    options: ConvertOptions | None = None,
    *,
    progress: Progress | None = None,
    verification: Verification | None = None,
) -> ConvertReport:
    """Convert `source` (a folder, a zip, a hub repository) into the new folder `target`.

    The target appears whole, in one step, at the end; whatever goes wrong before leaves everything
    as it was. Memory stays at a few blocks of tensors, however large the model.

    `verification(source, new folder)` is called once everything is written (such as
    `convert.verify.verify`) and may raise to stop it; what it returns is in the report and in the
    model card. The source is a folder, or a function that loads it.

    Raises:
        UsageError: options that contradict each other; a target that is the source.
        HubError: no such source. CheckpointError, ConfigError: it cannot be read or is damaged.
        TargetError: the target is there already, in use, or out of room.
    """
    options = options or ConvertOptions()
    if options.dwq is not None:
        from .calibrate import find_pictures

        find_pictures(options.dwq)  # before an hour of work, not after it
    started = time.perf_counter()
    before = mx.set_cache_limit(_CACHE_BYTES)
    try:
        place = Target(target, overwrite=options.overwrite)
        for read in (source, options.base, options.encoder):
            if read is not None and (path := Path(read).expanduser()).exists():
                place.refuse_source(path)  # before so much as a lock is put beside the target
        with place, ExitStack() as stack:
            opened = open_source(source, options, place, stack, progress)
            report = _convert(opened, place, options, progress, verification)
        report.seconds = time.perf_counter() - started
        return report
    finally:
        mx.set_cache_limit(before)


def _convert(
    source: Source,
    place: Target,
    options: ConvertOptions,
    progress: Progress | None,
    verification: Verification | None,
) -> ConvertReport:
    repairs: list[str] = []
    tokenizer = load_tokenizer(tokenizer_folder(source), source.config)
    config = _believe(source, tokenizer, repairs)
    plan = make_plan(source, config, options)
    place.require_space(plan.nbytes + _SIDECAR_BYTES)
    report = ConvertReport(
        target=place.path,
        source=source.located.name,
        source_layout=source.layout,
        repairs=repairs,
        notes=[*source.notes, *plan.notes, *_limits(config)],
        kept=plan.kept,
        parts=plan.parts,
        quantization=plan.quantization,
    )
    hashing = _Background(lambda: _hash(source)) if options.hash_source else None
    with place.writing():
        _write_weights(place.partial, plan, options, progress)
        write_sidecars(place.partial, source, config, plan, tokenizer, repairs)
    check_written(place.partial, plan.jobs)
    if options.dwq is not None:
        from .calibrate import calibrate  # half of mlx-lm comes with it

        report.notes.append(calibrate(source, config, place.partial, plan.dtype, options))
        check_written(place.partial, plan.jobs)
    if verification is not None:
        original: Original = source.folders[0]
        if not source.is_whole:
            original = partial(load_source, source, config)
        report.verification = verification(original, place.partial)
    if hashing is not None:
        report.source_sha256 = hashing.result()
    settings = next((s for f in source.folders if (s := picture_config(f))), {})
    resolution = picture_processor(config, settings).output_size
    with place.writing():
        write_card(place.partial, source, report, options, resolution)
        report.files = {f.name: f.stat().st_size for f in sorted(place.partial.iterdir())}
    place.commit()
    return report


def _believe(source: Source, tokenizer: Any, repairs: list[str]) -> ModelConfig:
    """The configuration, corrected by the tensors and the tokenizer as loading would."""
    config = source_config(source)
    named: dict[str, LazyTensor] = {
        disk_name(name, config.vision): origin.tensor for name, origin in source.tensors.items()
    }
    if config.raw.get("vision_config") is None:
        repairs.append("vision_config: missing; filled in")
    config, found = believe_tensors(config, named)
    repairs += found
    before = config.image_token_id
    # Only the truth about the id is wanted; the tokenizer itself is written as it came.
    if "<image>" in tokenizer.get_vocab():
        believe_tokenizer(config, tokenizer, repairs)
    elif before != -200:
        repairs.append(f"image token: config says {before}, but the tokenizer has no <image>")
    return config


def _limits(config: ModelConfig) -> list[str]:
    """Which of the other readers cannot run the result, and why."""
    notes = []
    if not is_fastvithd(config.vision):
        notes.append(
            "mlx-vlm and mlx-swift-lm build no other encoder than FastViTHD: fastvlm-mlx only"
        )
    elif config.text["model_type"] != "qwen2":
        notes.append("mlx-vlm and mlx-swift-lm know FastVLM on Qwen2 alone: fastvlm-mlx only")
    elif config.aspect != "pad":
        notes.append(
            f"mlx-vlm and mlx-swift-lm always pad pictures; this model wants {config.aspect}"
        )
    return notes


def _write_weights(
    folder: Path, plan: Plan, options: ConvertOptions, progress: Progress | None
) -> None:
    total, done = plan.nbytes, 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress("write", done, total)

    write_shards(folder, plan.jobs, options.shard_size, advance)


class _Background:
    """One function in a thread of its own; its outcome or its error comes out of `result`.

    The thread is a daemon that only reads: a conversion that fails does not wait for it.
    """

    def __init__(self, work: Callable[[], dict[str, str]]) -> None:
        self._outcome: dict[str, str] = {}
        self._error: BaseException | None = None
        self._work = work
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._outcome = self._work()
        except BaseException as error:  # handed to whoever asks for the result
            self._error = error

    def result(self) -> dict[str, str]:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._outcome


def _hash(source: Source) -> dict[str, str]:
    return {path.name: sha256(path) for path in dict.fromkeys(source.files)}


__all__ = ["Original", "Verification", "convert"]
