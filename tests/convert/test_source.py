"""Every source that a conversion takes, and those that it refuses, with a line that says why."""

from __future__ import annotations

import os
import stat
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tiny
from convert_helpers import features, greedy, leftovers, stored
from fastvlm_mlx.convert import ConvertOptions, convert
from safetensors.numpy import save_file

from fastvlm_mlx import load
from fastvlm_mlx.errors import CheckpointError, FastVLMError, HubError, UsageError

LAYOUTS = ("llava", "mlx", "transformers")


def zipped(folder: Path, path: Path, inside: str = "FastVLM-tiny/") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("__MACOSX/._config.json", b"junk")
        for file in sorted(folder.iterdir()):
            archive.write(file, inside + file.name)
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_becomes_the_same_model(tmp_path: Path, layout: str) -> None:
    source = tiny.write(tmp_path / "source", layout)
    report = convert(source, tmp_path / "target")
    assert report.source_layout == layout
    expected = tiny.as_mlx(tiny.llava())
    found = stored(tmp_path / "target")
    assert set(found) == set(expected)
    for name, array in found.items():
        if not name.endswith("head.proj"):  # transformers has none: zeros, which nothing reads
            np.testing.assert_array_equal(array, expected[name], err_msg=name)
    model, _ = load(tmp_path / "target")
    original, _ = load(source)
    np.testing.assert_array_equal(features(model), features(original))
    assert greedy(model) == greedy(original)


def test_branches_of_training_are_fused(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "source", training=True)
    report = convert(source, tmp_path / "target")
    assert any("training branches" in note for note in report.notes)
    assert not any("rbr_" in name or "lkb_origin" in name for name in stored(tmp_path / "target"))
    expected, found = load(source)[0], load(tmp_path / "target")[0]
    np.testing.assert_allclose(features(found), features(expected), atol=1e-5)


def test_shards_are_read_and_written(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "source", shards=3)
    report = convert(source, tmp_path / "target", ConvertOptions(shard_size=1_000_000))
    assert set(report.source_sha256) == {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    assert greedy(load(tmp_path / "target")[0]) == greedy(load(source)[0])


def test_a_zip_as_it_is_downloaded(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "source")
    (source / "LICENSE_MODEL").write_text("terms")
    archive = zipped(source, tmp_path / "m.zip")
    stages = set()
    report = convert(archive, tmp_path / "target", progress=lambda stage, *_: stages.add(stage))
    assert stages == {"unpack", "write"}
    assert list(report.source_sha256) == ["m.zip"]
    assert (tmp_path / "target" / "LICENSE_MODEL").read_text() == "terms"
    assert greedy(load(tmp_path / "target")[0]) == greedy(load(source)[0])
    assert leftovers(tmp_path, "source", "m.zip", "target") == []


def hostile(path: Path, name: str, data: bytes = b"{}", mode: int = 0) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/config.json", b"{}")
        info = zipfile.ZipInfo(name)
        info.compress_type = zipfile.ZIP_DEFLATED
        info.external_attr = mode << 16
        archive.writestr(info, data)
    return path


@pytest.mark.parametrize(
    ("name", "data", "mode", "why"),
    [
        ("../evil.safetensors", b"x", 0, "leaves the folder"),
        ("/etc/evil", b"x", 0, "leaves the folder"),
        ("m/..\\evil", b"x", 0, "leaves the folder"),
        ("m/model.safetensors", b"/etc/passwd", stat.S_IFLNK | 0o777, "link"),
        ("m/model.safetensors", b"\0" * 8_000_000, 0, "bomb"),
        ("other/config.json", b"{}", 0, "several models"),
        ("m/readme.txt", b"x", 0, "no weights"),
    ],
)
def test_a_hostile_zip_is_refused_by_the_member(
    tmp_path: Path, name: str, data: bytes, mode: int, why: str
) -> None:
    archive = hostile(tmp_path / "m.zip", name, data, mode)
    with pytest.raises(CheckpointError, match=why):
        convert(archive, tmp_path / "target")
    assert leftovers(tmp_path, "m.zip") == []


def test_a_damaged_zip_is_refused(tmp_path: Path) -> None:
    archive = zipped(tiny.write(tmp_path / "source"), tmp_path / "m.zip")
    data = bytearray(archive.read_bytes())
    data[2000:2100] = os.urandom(100)
    archive.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged zip"):
        convert(archive, tmp_path / "target")
    assert leftovers(tmp_path, "m.zip", "source") == []


def test_an_export_without_encoder_takes_one_from_elsewhere(tmp_path: Path) -> None:
    export = tiny.write(tmp_path / "export", "apple-mlx")
    whole = tiny.write(tmp_path / "whole")
    with pytest.raises(CheckpointError, match="--encoder"):
        convert(export, tmp_path / "target")
    report = convert(export, tmp_path / "target", ConvertOptions(encoder=whole))
    assert report.source_layout == "apple-mlx + encoder"
    np.testing.assert_array_equal(features(load(tmp_path / "target")[0]), features(load(whole)[0]))


def test_an_encoder_alone_in_a_file(tmp_path: Path) -> None:
    export = tiny.write(tmp_path / "export", "apple-mlx")
    tower = {
        "image_encoder.model." + name.removeprefix(tiny.APPLE_TOWER): array
        for name, array in tiny.llava(seed=5).items()
        if name.startswith(tiny.APPLE_TOWER)
    }
    tower["text_encoder.embedding.weight"] = np.zeros((2, 2), np.float32)
    save_file(tower, tmp_path / "tower.safetensors")
    # The file says nothing of its sizes; those of the released encoder are taken, and do not fit.
    with pytest.raises(CheckpointError, match="do not fit the model"):
        convert(export, tmp_path / "t", ConvertOptions(encoder=tmp_path / "tower.safetensors"))


def test_a_repository_in_the_local_cache(tmp_path: Path, empty_cache: Path) -> None:
    snapshot = empty_cache / "models--owner--name" / "snapshots" / ("0" * 40)
    tiny.write(snapshot)
    refs = empty_cache / "models--owner--name" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    convert("owner/name", tmp_path / "target", ConvertOptions(download=False))
    card = (tmp_path / "target" / "README.md").read_text()
    assert "base_model:\n- owner/name\n" in card
    with pytest.raises(HubError, match="not on this machine"):
        convert("owner/other", tmp_path / "t2", ConvertOptions(download=False))


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        ("cut", "cut"),
        ("nan", "q_proj.weight' holds 1 NaN and 1 infinite"),
        ("nan-encoder", "proj.weight' holds 1 NaN"),
        ("missing", "missing: language_model.model.norm.weight"),
        ("extra", "model.surprise"),
        ("shape", "wrong shape: model.norm.weight"),
        ("encoder-shape", r"wrong shape: .*patch_embed\.0"),
        ("integers", "of the type I32"),
        ("scales", "belongs to no packed layer"),
    ],
)
def test_damage_is_named_and_nothing_is_written(tmp_path: Path, damage: str, why: str) -> None:
    tensors = tiny.llava()
    weight = tensors["model.layers.0.self_attn.q_proj.weight"]
    tower = tiny.APPLE_TOWER
    if damage == "nan":
        weight[3, 4], weight[5, 6] = np.nan, -np.inf
    elif damage == "nan-encoder":
        name = next(n for n in tensors if n.endswith("token_mixer.proj.weight"))
        tensors[name][0, 0] = np.nan
    elif damage == "missing":
        del tensors["model.norm.weight"]
    elif damage == "extra":
        tensors["model.surprise"] = weight
    elif damage == "shape":
        tensors["model.norm.weight"] = np.zeros(7, np.float32)
    elif damage == "encoder-shape":
        tensors[tower + "patch_embed.0.reparam_conv.weight"] = np.zeros((8, 3, 5, 5), np.float32)
    elif damage == "integers":
        tensors["model.norm.weight"] = np.zeros(tiny.HIDDEN, np.int32)
    elif damage == "scales":
        tensors["model.norm.scales"] = np.zeros((4, 2), np.float32)
    source = tiny.write(tmp_path / "source", tensors=tensors)
    if damage == "cut":
        file = source / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=why) as caught:
        convert(source, tmp_path / "target")
    assert "\n" not in str(caught.value)
    assert leftovers(tmp_path, "source") == []


def test_nothing_to_convert(tmp_path: Path) -> None:
    with pytest.raises(HubError):
        convert(tmp_path / "nowhere", tmp_path / "target")
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(UsageError, match="file of weights"):
        convert(tmp_path / "weights.bin", tmp_path / "target")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FastVLMError):
        convert(tmp_path / "empty", tmp_path / "target")
    assert leftovers(tmp_path, "weights.bin", "empty") == []


def test_a_source_is_never_written_to(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "source")
    before = {f: f.read_bytes() for f in source.iterdir()}
    for target in (source, source / "inside", tmp_path):
        with pytest.raises(UsageError, match="choose another folder"):
            convert(source, target, ConvertOptions(overwrite=True))
    link = tmp_path / "link"
    link.symlink_to(source)
    with pytest.raises(UsageError):
        convert(source, link, ConvertOptions(overwrite=True))
    assert {f: f.read_bytes() for f in source.iterdir()} == before
