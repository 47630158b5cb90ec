"""What a conversion is asked to do, checked before anything is read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastvlm_mlx.errors import UsageError

DTypeName = Literal["float16", "bfloat16", "float32"]
Mode = Literal["affine", "mxfp4", "nvfp4", "mxfp8"]

DTYPES = ("float16", "bfloat16", "float32")
BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
# mode -> (group size, bits) where none is given; all but affine allow no other.
MODES: dict[str, tuple[int, int]] = {
    "affine": (64, 4),
    "mxfp4": (32, 4),
    "nvfp4": (16, 4),
    "mxfp8": (32, 8),
}
# mlx-lm's names for recipes that give more bits to the layers that need them.
RECIPES = ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")

DEFAULT_SHARD_SIZE = 5_000_000_000


@dataclass(frozen=True)
class ConvertOptions:
    """How to convert. Without any: the same numbers, in the layout of the MLX ecosystem.

    `bits`, `group_size`, `mode` and `recipe` quantise the language model; `keep` names layers that
    stay whole (a part of a layer's path, such as `lm_head`). `projector_bits` quantises the
    projector too. The encoder is never quantised. `dtype` is for everything that is not quantised;
    `encoder_dtype` for the encoder alone, which is otherwise never float16 (docs/converting.md).
    `dwq` is a folder of pictures to train the scales on (mlx-lm's DWQ), so many times over, with
    that learning rate. `base` and `encoder` are further sources: what an adapter or a projector is
    merged onto, and where the encoder comes from.
    """

    bits: int | None = None
    group_size: int | None = None
    mode: Mode | None = None
    recipe: str | None = None
    keep: tuple[str, ...] = ()
    projector_bits: int | None = None
    dequantize: bool = False
    dtype: DTypeName | None = None
    encoder_dtype: DTypeName | None = None
    dwq: str | Path | None = None
    dwq_passes: int = 4
    dwq_rate: float = 1e-5
    base: str | Path | None = None
    encoder: str | Path | None = None
    shard_size: int = DEFAULT_SHARD_SIZE  # bytes
    overwrite: bool = False
    download: bool = True  # a hub repository that is not on this machine may be fetched
    hash_source: bool = True

    def __post_init__(self) -> None:
        for what, value, allowed in (
            ("--bits", self.bits, BITS),
            ("--projector-bits", self.projector_bits, BITS),
            ("--mode", self.mode, tuple(MODES)),
            ("--recipe", self.recipe, RECIPES),
            ("--dtype", self.dtype, DTYPES),
            ("--encoder-dtype", self.encoder_dtype, DTYPES),
        ):
            if value is not None and value not in allowed:
                choices = ", ".join(map(str, allowed))
                raise UsageError(f"{what} {value} is not known; choose from {choices}")
        if self.recipe is not None and (self.bits or (self.mode or "affine") != "affine"):
            raise UsageError("--recipe chooses the bits itself: leave out --bits and --mode")
        if self.dequantize and (self.quantises or self.projector_bits):
            raise UsageError("--dequantize and quantising contradict each other; choose one")
        if not self.quantises and (self.keep or self.group_size):
            raise UsageError(
                "--keep and --group-size are for quantising: give --bits or --mode too"
            )
        if self.mode in (None, "affine"):
            if self.group_size is not None and self.group_size not in GROUP_SIZES:
                choices = ", ".join(map(str, GROUP_SIZES))
                raise UsageError(
                    f"--group-size {self.group_size} is not known; choose from {choices}"
                )
        else:
            group_size, bits = MODES[self.mode]
            if self.group_size not in (None, group_size) or self.bits not in (None, bits):
                raise UsageError(
                    f"--mode {self.mode} is {bits} bits in groups of {group_size}, nothing else"
                )
        if self.dwq is not None and (not self.quantises or self.mode not in (None, "affine")):
            raise UsageError("--dwq trains affine scales: give --bits or --recipe with it")
        if self.dwq is not None and self.bits == 8:
            raise UsageError("--dwq is for fewer than 8 bits, which need no training")
        if self.dwq_passes < 1 or not 0 < self.dwq_rate < 1:
            raise UsageError("--dwq-passes must be at least 1, --dwq-rate between 0 and 1")
        if self.shard_size < 1_000_000:
            raise UsageError("--shard-size is below 1 MB; give a size such as 5GB")

    @property
    def quantises(self) -> bool:
        """Whether the language model is to be quantised."""
        return bool(self.bits or self.mode or self.recipe)

    @property
    def settings(self) -> dict[str, int | str]:
        """`group_size`, `bits` and `mode` of an ordinary layer."""
        mode = self.mode or "affine"
        group_size, bits = MODES[mode]
        if self.recipe:
            bits = int(self.recipe.split("_")[1])
        return {
            "group_size": self.group_size or group_size,
            "bits": self.bits or bits,
            "mode": mode,
        }

    def describe(self) -> list[str]:
        """The options that were given, as the command line spells them."""
        words = []
        for name, value in (
            ("bits", self.bits),
            ("group-size", self.group_size),
            ("mode", self.mode),
            ("recipe", self.recipe),
            ("keep", ",".join(self.keep)),
            ("projector-bits", self.projector_bits),
            ("dwq", Path(self.dwq).name if self.dwq else None),
            ("dtype", self.dtype),
            ("encoder-dtype", self.encoder_dtype),
        ):
            if value:
                words.append(f"--{name} {value}")
        return words + ["--dequantize"] * self.dequantize


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """ "5GB" -> 5_000_000_000, "512MiB" -> 536_870_912, "1000000" -> 1_000_000 bytes.

    Raises UsageError.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is not a size; give one such as 5GB or 500MB")
    step = 1024 if match[3] else 1000
    return int(float(match[1]) * step ** " kmgt".index(match[2].lower() or " "))
