"""`verify`: a copy is a copy, what is damaged is noticed at the stage that it touches."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from damaged import checkpoint
from fastvlm_mlx.convert import ConvertOptions, convert
from fastvlm_mlx.convert.verify import (
    LIMITS_DB,
    DifferentError,
    Trace,
    Verification,
    checker,
    difference,
    drawn_picture,
    verification_text,
    verify,
)

from fastvlm_mlx import loading
from fastvlm_mlx.errors import UsageError

ONE: dict[str, Any] = {"pictures": [drawn_picture(0)], "tokens": 3}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("source") / "model")


def by_stage(result: Verification) -> dict[str, bool]:
    return {d.stage: d.within for d in result.comparisons[0].differences}


def test_a_conversion_without_options_is_a_copy(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    report = convert(source, target, verification=checker(**ONE))
    result = report.verification
    assert result.passed
    assert set(result.stored.values()) == {"same"}
    assert all(d.psnr_db is None or d.psnr_db > 110 for d in result.comparisons[0].differences)
    assert [(a.equal, a.of, a.needed) for a in result.comparisons[0].agreement] == [(3, 3, True)]
    text = verification_text(result)
    assert "the same within tolerance" in text and "3 of 3" in text
    plain = json.loads(json.dumps(result.to_dict()))
    assert plain["passed"] is True
    assert plain["comparisons"][0]["differences"][1]["stage"] == "features"


def test_limits_follow_what_is_stored(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "packed"
    convert(source, target, ConvertOptions(bits=8, dtype="bfloat16"))
    result = verify(source, target, **ONE)
    assert result.passed, verification_text(result)
    assert result.stored == {
        "vision_tower": "BF16",
        "mm_projector": "BF16",
        "language_model": "8-bit",
    }
    limits = {d.stage: d.limit_db for d in result.comparisons[0].differences}
    assert limits["pixels"] is None
    assert limits["features"] == limits["projected"] == LIMITS_DB["BF16"]
    assert limits["logits"] == LIMITS_DB["8-bit"]
    assert not result.comparisons[0].agreement[0].needed
    # The same differences are too much for a limit that somebody sets.
    strict = verify(source, target, **ONE, limits_db={"BF16": 100.0})
    assert not strict.passed


def scaled(name: str) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        tensors[name] = tensors[name] * np.float32(1.01)

    return change


@pytest.mark.parametrize(
    ("tensor", "first"),
    [
        (f"{tiny.APPLE_TOWER}network.0.0.convffn.fc1.weight", "features"),
        ("model.mm_projector.2.weight", "projected"),
        ("model.layers.1.mlp.up_proj.weight", "logits"),
    ],
)
def test_damage_shows_from_the_stage_that_it_touches(
    source: Path, tmp_path: Path, tensor: str, first: str
) -> None:
    target = checkpoint(tmp_path / "damaged", scaled(tensor))
    result = verify(source, target, **ONE)
    assert not result.passed
    stages = by_stage(result)
    before = list(stages)[: list(stages).index(first)]
    assert all(stages[stage] for stage in before)
    assert not stages[first]
    assert "TOO FAR" in verification_text(result)


def test_a_conversion_that_fails_the_check_leaves_nothing(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "never"
    check = checker(**ONE, limits_db={"BF16": 300.0})
    with pytest.raises(
        DifferentError, match=r"features are \d+\.\d dB from it, 300\.0 dB"
    ) as caught:
        convert(source, target, ConvertOptions(dtype="bfloat16"), verification=check)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_another_picture_size_or_tokenizer_is_a_fault(source: Path, tmp_path: Path) -> None:
    wide = tiny.write(
        tmp_path / "wide", config={"vision_config": {**tiny.VISION_CONFIG, "image_size": 192}}
    )
    result = verify(source, wide, **ONE)
    assert "pixels are (192, 192, 3), expected (128, 128, 3)" in result.comparisons[0].faults[1]
    other = tiny.write(tmp_path / "other")
    settings = json.loads((other / "tokenizer.json").read_text())
    settings["model"]["merges"] = []
    (other / "tokenizer.json").write_text(json.dumps(settings))
    result = verify(source, other, **ONE, prompt="a cat sat")
    assert "the tokenizer differs" in result.comparisons[0].faults[0]
    assert not result.passed


def test_source_and_target_are_never_loaded_together(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Any]] = []
    original = loading.load_folder

    def load(*arguments: Any) -> tuple[Any, Any]:
        gc.collect()
        assert not any(one() for one in alive)
        loaded = original(*arguments)
        alive.append(weakref.ref(loaded[0]))
        return loaded

    monkeypatch.setattr(loading, "load_folder", load)
    assert verify(source, source, **ONE).passed
    assert len(alive) == 2


def test_the_source_may_be_a_function(source: Path) -> None:
    result = verify(
        lambda: loading.load_folder(source), source, **ONE, source_name="an adapter on a base"
    )
    assert result.source == "an adapter on a base"
    # What the source stores is not known then, so nothing is called a copy.
    assert result.stored["language_model"] == "F32"
    assert result.passed


def test_figures_of_a_difference() -> None:
    x = np.array([3.0, 0.0, 4.0])
    one = difference("p", "features", x, x + np.array([0.0, 0.3, 0.0]), 20.0)
    assert one.max_abs == pytest.approx(0.3) and one.mean_abs == pytest.approx(0.1)
    assert one.cosine == pytest.approx(25 / (5 * np.sqrt(25.09)))
    assert one.psnr_db == pytest.approx(20 * np.log10(4 / (0.3 / np.sqrt(3))))
    assert one.within
    assert difference("p", "features", x, x, None).psnr_db is None


def test_values_that_are_not_finite_are_a_fault(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traces = iter([1.0, np.nan])

    def trace(*_: Any) -> list[Trace]:
        x = np.full((2, 2), next(traces))
        return [Trace(np.ones((2, 2, 3)), np.ones((1, 1, 4)), x, x[0], [1, -200], [1])]

    monkeypatch.setattr("fastvlm_mlx.convert.verify.trace", trace)
    result = verify(source, source, pictures=[None])
    assert not result.passed
    assert result.comparisons[0].faults == ["picture 1: projected hold NaN or infinite values"]
    json.dumps(result.to_dict(), allow_nan=False)


def test_wrong_use(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        verify(source, source, tokens=0)
    with pytest.raises(UsageError, match="needs a source that is a folder"):
        verify(lambda: loading.load_folder(source), source, reference=True)
    with pytest.raises(UsageError, match="there is no file or folder"):
        verify(source, tmp_path / "nowhere")


@pytest.mark.parity
@pytest.mark.parametrize("layout", ["llava", "mlx", "transformers"])
def test_against_transformers(source: Path, tmp_path: Path, layout: str) -> None:
    for name in ("torch", "timm"):
        pytest.importorskip(name)
    given = tiny.write(tmp_path / layout, layout)
    result = verify(given, source, **ONE, reference=True)
    against = {c.against: c for c in result.comparisons}
    assert against["transformers"].passed, verification_text(result)
    assert against["transformers"].agreement[0].equal == 3


def test_transformers_missing_is_said(source: Path) -> None:
    try:
        import torch  # noqa: F401
    except ImportError:
        with pytest.raises(UsageError, match=r"fastvlm-mlx\[parity\]"):
            verify(source, source, **ONE, reference=True)
