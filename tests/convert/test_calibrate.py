"""DWQ on pictures: scales and biases change, nothing else, and the model comes closer."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny
from convert_helpers import arrays, features, greedy, leftovers
from fastvlm_mlx.convert import ConvertOptions, calibrate, convert
from fastvlm_mlx.convert.calibrate import PictureLM
from PIL import Image

from fastvlm_mlx import load
from fastvlm_mlx.errors import UsageError


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("source") / "FastVLM-tiny")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i, picture in enumerate(tiny.pictures(3)):
        Image.fromarray(np.uint8(picture * 255)).save(folder / f"{i}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "_ANSWER", 6)


def told(notes: list[str]) -> tuple[float, float]:
    """The divergence before and after, out of the note on them."""
    note = next(note for note in notes if note.startswith("DWQ"))
    before, after = note.partition("whole model ")[2].split(" -> ")
    return float(before), float(after.split()[0].rstrip(","))


def test_only_scales_and_biases_change_and_the_model_comes_closer(
    source: Path, photos: Path, tmp_path: Path
) -> None:
    plain = ConvertOptions(bits=3, group_size=32)
    convert(source, tmp_path / "plain", plain)
    report = convert(
        source,
        tmp_path / "trained",
        ConvertOptions(bits=3, group_size=32, dwq=photos, dwq_rate=1e-3, dwq_passes=3),
    )
    before, after = told(report.notes)
    assert after < before
    a, b = arrays(tmp_path / "plain"), arrays(tmp_path / "trained")
    assert set(a) == set(b)
    changed = {n for n in a if not mx.array_equal(a[n], b[n]).item()}
    assert changed and all(n.endswith((".scales", ".biases")) for n in changed)
    assert all(n.startswith("language_model.") for n in changed)
    assert len(greedy(load(tmp_path / "trained")[0])) == 8
    assert leftovers(tmp_path, "plain", "trained") == []
    assert f"--dwq {photos.name}" in (tmp_path / "trained" / "README.md").read_text()


def test_training_that_does_harm_is_thrown_away(source: Path, photos: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "plain", ConvertOptions(bits=4, group_size=32))
    options = ConvertOptions(bits=4, group_size=32, dwq=photos, dwq_rate=0.9, dwq_passes=1)
    report = convert(source, tmp_path / "trained", options)
    before, after = told(report.notes)
    assert not after < before
    a, b = arrays(tmp_path / "plain"), arrays(tmp_path / "trained")
    assert all(mx.array_equal(a[n], b[n]).item() for n in a)


def test_ids_beyond_the_vocabulary_are_visual_tokens(source: Path) -> None:
    model, _ = load(source)
    visual = mx.array(features(model))
    count = visual.shape[0]
    wrapped = PictureLM(model.language_model, visual, tiny.VOCABULARY)
    image = model.config.image_token_id
    ids = mx.array([5, 6, *[image] * count, 7])
    embeddings = model.embed_inputs(ids, visual_tokens=[visual])
    expected = model(ids[None], input_embeddings=embeddings[None])
    places = mx.array([[5, 6, *range(tiny.VOCABULARY, tiny.VOCABULARY + count), 7]])
    assert mx.array_equal(wrapped(places), expected).item()


def test_what_cannot_be_calibrated(source: Path, photos: Path, tmp_path: Path) -> None:
    for wrong in ({}, {"mode": "mxfp4"}, {"bits": 8}, {"bits": 4, "dwq_passes": 0}):
        with pytest.raises(UsageError, match="--dwq"):
            ConvertOptions(dwq=photos, **wrong)  # type: ignore[arg-type]
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(UsageError, match="--dwq"):
            convert(source, tmp_path / "t", ConvertOptions(bits=4, dwq=folder))
    assert leftovers(tmp_path, "empty") == []
