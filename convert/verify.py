"""Does the converted model still see and say the same? Source and target, stage by stage.

    picture -> pixels -> features -> projected tokens -> logits after the prompt -> greedy tokens

The source runs first, leaves its numbers, and is let go before the target is loaded: the two are
never in memory together. How far apart they may be follows from what the target is stored in, and
is stated in decibels of PSNR: 20 * log10(largest value of the source / root mean square error).
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastvlm_mlx.errors import FastVLMError, UsageError
from fastvlm_mlx.text import table

from .inspection import Inspection, inspect

Array = np.ndarray[Any, Any]
Loader = Callable[[], tuple[Any, Any]]  # -> (FastVLM, Processor)

PROMPT = "Describe the picture."
TOKENS = 16
PICTURES = 3
STAGES = ("pixels", "features", "projected", "logits")

# Least PSNR in dB by what the target stores a part in: some 10 dB below the least that was measured
# with random weights (docs/inspecting.md), the harshest case known here: rounding shows most where
# nothing was trained to bear it. "same" is a copy; what remains is the order of sums.
LIMITS_DB: dict[str, float] = {
    "same": 110.0,
    "F32": 90.0,
    "F16": 55.0,
    "BF16": 37.0,
    "8-bit": 32.0,
    "6-bit": 22.0,
    "5-bit": 17.0,
    "mxfp8": 16.0,
    "4-bit": 8.0,
    "mxfp4": 8.0,
    "nvfp4": 8.0,
    "3-bit": 3.0,
    "2-bit": 0.0,
}
# Two frameworks add in different orders; float32 sums of a thousand terms differ by this much.
_ANOTHER_FRAMEWORK_DB = 70.0
_PART_OF = {"features": "vision_tower", "projected": "mm_projector", "logits": "language_model"}


@dataclass
class Trace:
    """What one model makes of one picture."""

    pixels: Array  # (H, W, 3)
    features: Array  # (h, w, feature_dim)
    projected: Array  # (h * w, hidden)
    logits: Array  # (vocabulary,) after the prompt
    prompt: list[int]  # the picture's places as -200, whatever the model calls them
    tokens: list[int]  # the greedy continuation


@dataclass(frozen=True)
class Difference:
    """One stage of one picture. `psnr_db` is None where the two are the same to the bit."""

    picture: str
    stage: str
    max_abs: float
    mean_abs: float
    cosine: float
    psnr_db: float | None
    limit_db: float | None  # None: must be the same to the bit

    @property
    def within(self) -> bool:
        if self.psnr_db is None:
            return True
        return self.limit_db is not None and self.psnr_db >= self.limit_db


@dataclass(frozen=True)
class Agreement:
    """Greedy tokens up to the first that differs. `needed`: a copy must agree in all of them."""

    picture: str
    equal: int
    of: int
    needed: bool

    @property
    def within(self) -> bool:
        return self.equal == self.of or not self.needed


@dataclass
class Comparison:
    """The target against one reference: the source, or transformers with the source's weights."""

    against: str
    differences: list[Difference] = field(default_factory=list)
    agreement: list[Agreement] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        kept = all(d.within for d in self.differences) and all(a.within for a in self.agreement)
        return kept and not self.faults


@dataclass
class Verification:
    """The outcome of `verify`. `stored` is what decided the limits, by part."""

    source: str
    target: str
    stored: dict[str, str]
    comparisons: list[Comparison] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(comparison.passed for comparison in self.comparisons)

    def to_dict(self) -> dict[str, Any]:
        """For `--json` and the model card."""
        plain = asdict(self)
        for shown, comparison in zip(plain["comparisons"], self.comparisons, strict=True):
            shown["passed"] = comparison.passed
            for row, difference in zip(shown["differences"], comparison.differences, strict=True):
                row["within"] = difference.within
        return {**plain, "passed": self.passed}


def verify(
    source: str | Path | Loader,
    target: str | Path,
    *,
    source_name: str | None = None,
    pictures: Sequence[Any] | None = None,
    prompt: str = PROMPT,
    tokens: int = TOKENS,
    reference: bool = False,
    limits_db: dict[str, float] | None = None,
) -> Verification:
    """Run source and target on a few pictures and compare what they make of them.

    Args:
        source: a folder that `fastvlm_mlx.load` reads; or a function that loads the model where
            the source is no such folder (an archive, an adapter and its base).
        pictures: anything `open_picture` takes; the examples of this repository by default, or
            drawn ones where they are not installed.
        tokens: how many greedy tokens to compare.
        reference: compare with transformers and torch too, on the source's weights. The source
            has to be a folder; about twice its size in memory is needed, in float32.
        limits_db: replaces `LIMITS_DB`.

    Raises:
        UsageError: `reference` without torch, transformers and timm, or without a source folder.
        FastVLMError: as `load`.
    """
    if tokens < 1:
        raise UsageError(f"{tokens} greedy tokens to compare; at least 1 is needed")
    folder = None if callable(source) else Path(source)
    if reference and folder is None:
        raise UsageError("comparing with transformers needs a source that is a folder")
    target = Path(target)
    seen = inspect(target)
    stored = stored_as(inspect(folder) if folder else None, seen)
    limits = LIMITS_DB | (limits_db or {})
    cases = list(pictures) if pictures is not None else default_pictures()
    names = _picture_names(cases)

    from fastvlm_mlx.loading import load_folder

    load_source = source if callable(source) else lambda: load_folder(Path(source))
    expected = trace(load_source, cases, prompt, tokens)
    found = trace(lambda: load_folder(target), cases, prompt, tokens)
    result = Verification(source_name or str(folder or "source"), str(target), stored)
    result.comparisons.append(_compare("source", names, expected, found, stored, limits))
    if reference and folder is not None:
        from .reference import trace_with_transformers

        expected = trace_with_transformers(folder, expected, tokens)
        capped = {k: min(v, _ANOTHER_FRAMEWORK_DB) for k, v in limits.items()}
        result.comparisons.append(
            _compare("transformers", names, expected, found, stored, capped, exact_tokens=False)
        )
    return result


class DifferentError(FastVLMError):
    """The target is further from its source than its precision explains."""

    def __init__(self, verification: Verification) -> None:
        worst = next(c for c in verification.comparisons if not c.passed)
        far = [d for d in worst.differences if not d.within]
        if worst.faults:
            what = worst.faults[0]
        elif far:
            what = f"{far[0].picture}: {far[0].stage} are {_decibels(far[0].psnr_db)} from it"
            what += f", {_decibels(far[0].limit_db)} are needed"
        else:
            what = "the greedy tokens differ"
        super().__init__(f"the converted model is not its source ({what}); it was not put in place")
        self.verification = verification


def checker(**options: Any) -> Callable[[Path, Path], Verification]:
    """`verify` with these options, as the `verification` of `convert`: stops a conversion that
    fails it, before anything is put in place, by DifferentError.
    """

    def check(source: Path, target: Path) -> Verification:
        result = verify(source, target, **options)
        if not result.passed:
            raise DifferentError(result)
        return result

    return check


def _decibels(value: float | None) -> str:
    return "identical" if value is None else f"{value:.1f} dB"


# Running -------------------------------------------------------------------------------------


def trace(load: Loader, pictures: Sequence[Any], prompt: str, tokens: int) -> list[Trace]:
    """Load a model, let it see each picture, and let it go."""
    import mlx.core as mx

    model, processor = load()
    try:
        return [_trace_one(model, processor, picture, prompt, tokens) for picture in pictures]
    finally:
        del model, processor
        gc.collect()
        mx.clear_cache()


def _trace_one(model: Any, processor: Any, picture: Any, prompt: str, tokens: int) -> Trace:
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    pixels = processor.pixels([picture])[0]
    features = model.vision_features([mx.array(pixels)])[0]
    projected = model.project([features])[0]
    mx.eval(features, projected)
    ids = processor.prompt(prompt, [processor.visual_tokens(pixels)]).token_ids
    embeddings = model.embed_inputs(mx.array(ids), visual_tokens=[projected])
    mx.eval(embeddings)
    logits = model(mx.array([ids]), input_embeddings=embeddings[None])[0, -1]
    known = mx.minimum(mx.array(ids), model.config.text["vocab_size"] - 1)
    steps = generate_step(known, model, max_tokens=tokens, input_embeddings=embeddings)
    greedy = [int(token) for token, _ in steps]
    image = model.config.image_token_id
    return Trace(
        pixels,
        _float64(features),
        _float64(projected),
        _float64(logits),
        [-200 if token == image else token for token in ids],
        greedy,
    )


def _float64(array: Any) -> Array:
    import mlx.core as mx

    return np.array(array.astype(mx.float32)).astype(np.float64)


# Comparing -----------------------------------------------------------------------------------


def stored_as(source: Inspection | None, target: Inspection) -> dict[str, str]:
    """By part: "same" if the target is a copy, else what most of the target's bytes are in."""
    before = {part.name: list(part.dtypes) for part in source.parts} if source else {}
    fused = source is not None and source.encoder == "fused"
    result = {}
    for part in target.parts:
        if part.name not in _PART_OF.values() or not part.dtypes:
            continue
        kinds = [kind for kind in part.dtypes if not kind.endswith("(scales)")]
        copied = before.get(part.name) == list(part.dtypes) and (
            fused or part.name != "vision_tower"
        )
        # The least exact type decides; a list of one is the common case.
        worst = min(kinds, key=lambda kind: LIMITS_DB.get(kind, 0.0))
        result[part.name] = "same" if copied else worst
    return result


def difference(
    picture: str, stage: str, expected: Array, found: Array, limit_db: float | None
) -> Difference:
    """Errors of `found` against `expected`, finite and of any one shape."""
    x, y = expected.astype(np.float64).ravel(), found.astype(np.float64).ravel()
    error = np.abs(x - y)
    mean_square = float(np.mean(error**2))
    norms = float(np.linalg.norm(x) * np.linalg.norm(y))
    if mean_square == 0:
        psnr: float | None = None
    else:
        psnr = 20 * math.log10(max(float(np.abs(x).max()), 1e-30) / math.sqrt(mean_square))
    return Difference(
        picture,
        stage,
        max_abs=float(error.max()),
        mean_abs=float(error.mean()),
        cosine=float(x @ y) / norms if norms else float(mean_square == 0),
        psnr_db=psnr,
        limit_db=limit_db,
    )


def _compare(
    against: str,
    names: Sequence[str],
    expected: Sequence[Trace],
    found: Sequence[Trace],
    stored: dict[str, str],
    limits: dict[str, float],
    *,
    exact_tokens: bool = True,
) -> Comparison:
    result = Comparison(against)
    # A stage can be no better than those before it.
    needed: dict[str, float | None] = {"pixels": None}
    least = math.inf
    for stage, part in _PART_OF.items():
        least = min(least, limits.get(stored.get(part, "same"), 0.0))
        needed[stage] = least
    copy = all(kind == "same" for kind in stored.values())
    for name, x, y in zip(names, expected, found, strict=True):
        if x.prompt != y.prompt:
            result.faults.append(f"{name}: the prompt becomes other tokens; the tokenizer differs")
        for stage in STAGES:
            a, b = getattr(x, stage), getattr(y, stage)
            if stage == "logits":
                rows = min(len(a), len(b))  # a table may have been cut to the tokenizer
                a, b = a[:rows], b[:rows]
            if a.shape != b.shape:
                result.faults.append(f"{name}: {stage} are {b.shape}, expected {a.shape}")
                break
            if not np.isfinite(b).all():
                result.faults.append(f"{name}: {stage} hold NaN or infinite values")
                break
            result.differences.append(difference(name, stage, a, b, needed[stage]))
        equal = next(
            (i for i, (a, b) in enumerate(zip(x.tokens, y.tokens, strict=False)) if a != b),
            min(len(x.tokens), len(y.tokens)),
        )
        result.agreement.append(Agreement(name, equal, len(x.tokens), needed=copy and exact_tokens))
    return result


def verification_text(result: Verification) -> str:
    """The table that `convert --verify` prints."""
    blocks = []
    for comparison in result.comparisons:
        rows = [("picture", "stage", "max error", "mean error", "cosine", "PSNR", "needed", "")]
        rows += [
            (
                d.picture,
                d.stage,
                f"{d.max_abs:.3g}",
                f"{d.mean_abs:.3g}",
                f"{d.cosine:.7f}",
                _decibels(d.psnr_db),
                _decibels(d.limit_db),
                "ok" if d.within else "TOO FAR",
            )
            for d in comparison.differences
        ]
        agreement = [("picture", "greedy tokens equal", "")]
        agreement += [
            (a.picture, f"{a.equal} of {a.of}", "ok" if a.within else "TOO FEW")
            for a in comparison.agreement
        ]
        lines = [f"against {comparison.against}:", table(rows, right=(2, 3, 4, 5, 6))]
        lines += ["", table(agreement), *comparison.faults]
        blocks.append("\n".join(lines))
    stored = ", ".join(f"{part} {kind}" for part, kind in result.stored.items())
    verdict = "the same within tolerance" if result.passed else "DIFFERENT beyond tolerance"
    blocks.append(f"limits by what is stored: {stored}\n{verdict}")
    return "\n\n".join(blocks)


# Pictures ------------------------------------------------------------------------------------


def default_pictures() -> list[Any]:
    """The repository's examples where it is checked out, else pictures drawn from a seed."""
    import fastvlm_mlx

    examples = Path(fastvlm_mlx.__file__).parents[1] / "examples"
    found = sorted(examples.glob("*.jpg"))[:PICTURES] if examples.is_dir() else []
    return list(found) or [drawn_picture(seed) for seed in range(PICTURES)]


def drawn_picture(seed: int) -> Any:
    """A picture of shades, boxes and grain: something at every scale. A PIL image."""
    from PIL import Image

    random = np.random.default_rng(seed)
    height, width = ((240, 320), (300, 200), (256, 256))[seed % 3]
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    shades = [np.sin(x * a + y * b) for a, b in random.uniform(1, 9, (3, 2))]
    canvas = 128 + 90 * np.stack(shades, axis=-1)
    for _ in range(8):
        top, left = random.integers(0, height - 20), random.integers(0, width - 20)
        canvas[top : top + 40, left : left + 40] = random.uniform(0, 255, 3)
    canvas += random.normal(0, 6, canvas.shape)
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8))


def _picture_names(pictures: Sequence[Any]) -> list[str]:
    return [
        Path(p).name if isinstance(p, str | Path) else f"picture {i + 1}"
        for i, p in enumerate(pictures)
    ]


__all__ = [
    "LIMITS_DB",
    "Comparison",
    "Difference",
    "DifferentError",
    "Verification",
    "checker",
    "verification_text",
    "verify",
]
