"""What `convert` refuses: in one line that names the file and the tensor, with nothing written.

Damaged files of every kind are in `tests/weights`, where the readers are tested by themselves, and
by the hundred thousand in `benchmarks/fuzz_readers.py`; here is what a person meets.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from damaged import Q_PROJ, TOWER, checkpoint
from fastvlm_mlx.convert import ConvertOptions, convert

from fastvlm_mlx.cli.app import run
from fastvlm_mlx.config import read_config
from fastvlm_mlx.errors import ConfigError, FastVLMError

sys.path.insert(0, str(Path(__file__).parents[1] / "weights"))
from torch_writer import call, glob, pickled, tensor, zip_bytes

WEIGHTS = "model.safetensors"
SECOND = "model-00002-of-00002.safetensors"
EMBEDDINGS = "model.embed_tokens.weight"
Damage = Callable[[Path], None]


@pytest.fixture(autouse=True)
def nothing_is_written(tmp_path: Path) -> Iterator[None]:
    """Whatever the test refused, the place of the target is as empty as before."""
    place = tmp_path / "place"
    place.mkdir()
    yield
    assert list(place.iterdir()) == []


def refusal(source: Path, tmp_path: Path, **options: Any) -> str:
    with pytest.raises(FastVLMError) as caught:
        convert(source, tmp_path / "place" / "model", ConvertOptions(**options))
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 2000
    return text


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def overlap(header: dict[str, Any]) -> None:
    names = [name for name in header if name != "__metadata__"]
    header[names[5]]["data_offsets"] = header[names[6]]["data_offsets"]


# Files ---------------------------------------------------------------------------------------


def test_a_shard_that_is_cut(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", shards=2)
    shard = source / SECOND
    shard.write_bytes(shard.read_bytes()[:-1])
    text = refusal(source, tmp_path)
    assert SECOND in text and "tensor '" in text and "the file is cut" in text


def test_a_shard_that_is_missing(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", shards=2)
    (source / SECOND).unlink()
    assert SECOND in refusal(source, tmp_path)


@pytest.mark.parametrize("length", [0, 1 << 20, 1 << 40, (1 << 64) - 1])
def test_a_header_length_out_of_bounds(tmp_path: Path, length: int) -> None:
    source = checkpoint(tmp_path / "source")
    data = (source / WEIGHTS).read_bytes()
    (source / WEIGHTS).write_bytes(struct.pack("<Q", length) + data[8:])
    text = refusal(source, tmp_path)
    assert WEIGHTS in text and "safetensors" in text


def test_offsets_that_overlap_or_lie(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source")
    rewrite_header(source / WEIGHTS, overlap)
    text = refusal(source, tmp_path)
    assert WEIGHTS in text and "tensor '" in text


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", shards=2)
    (source / "model.safetensors.index.json").unlink()
    first = source / "model-00001-of-00002.safetensors"
    (source / SECOND).write_bytes(first.read_bytes())
    text = refusal(source, tmp_path)
    assert SECOND in text and "is also in" in text


def test_an_index_that_leaves_the_folder(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", shards=2)
    index = source / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"] = dict.fromkeys(listed["weight_map"], "../outside.safetensors")
    index.write_text(json.dumps(listed))
    (tmp_path / "outside.safetensors").write_bytes((source / SECOND).read_bytes())
    text = refusal(source, tmp_path)
    assert "outside.safetensors" in text and "leaves the folder" in text


@pytest.mark.parametrize(
    "name", [WEIGHTS, "config.json", "tokenizer.json", "generation_config.json", "LICENSE"]
)
def test_a_link_out_of_the_folder(tmp_path: Path, name: str) -> None:
    """Or a checkpoint could have a private file of this machine published with the result."""
    source = checkpoint(tmp_path / "source")
    outside = tmp_path / "outside"
    if (source / name).exists():
        (source / name).rename(outside)
    else:
        outside.write_text("a private key")
    (source / name).symlink_to(outside)
    text = refusal(source, tmp_path)
    assert name in text and "link out of the folder" in text


def test_a_folder_or_a_pipe_in_the_place_of_weights(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source")
    (source / WEIGHTS).unlink()
    (source / WEIGHTS).mkdir()
    assert "holds no weights" in refusal(source, tmp_path)
    (source / WEIGHTS).rmdir()
    os.mkfifo(source / WEIGHTS)
    assert "is not an ordinary file" in refusal(source, tmp_path)


# Values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"bits": 4}, {"dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize(
    "name", [f"{Q_PROJ}.weight", "model.mm_projector.0.bias", f"{TOWER}conv_exp.se.expand.weight"]
)
def test_nan_and_infinity(tmp_path: Path, name: str, value: float, options: dict[str, Any]) -> None:
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        tensors[name].flat[-3] = value

    text = refusal(checkpoint(tmp_path / "source", spoil), tmp_path, **options)
    assert WEIGHTS in text and repr(name) in text
    assert ("1 NaN" if np.isnan(value) else "1 infinite") in text


def test_values_too_large_for_the_type_asked_for(tmp_path: Path) -> None:
    def enlarge(tensors: dict[str, np.ndarray]) -> None:
        tensors[f"{Q_PROJ}.weight"][0, 0] = 1e5

    source = checkpoint(tmp_path / "source", enlarge)
    text = refusal(source, tmp_path, dtype="float16")
    assert f"{Q_PROJ}.weight" in text and "too large for F16" in text


# Names and shapes ----------------------------------------------------------------------------


def missing(tensors: dict[str, Any]) -> None:
    del tensors[f"{Q_PROJ}.bias"]


def missing_encoder(tensors: dict[str, Any]) -> None:
    del tensors[f"{TOWER}conv_exp.se.expand.bias"]


def extra(tensors: dict[str, Any]) -> None:
    tensors["model.layers.7.self_attn.q_proj.bias"] = np.zeros(64, np.float32)


def stranger(tensors: dict[str, Any]) -> None:
    tensors["wholly.unknown"] = np.zeros(3, np.float32)


def misshapen(tensors: dict[str, Any]) -> None:
    tensors[f"{Q_PROJ}.weight"] = tensors[f"{Q_PROJ}.weight"][:-1]


def misshapen_encoder(tensors: dict[str, Any]) -> None:
    name = f"{TOWER}network.0.0.convffn.fc1.weight"
    tensors[name] = tensors[name][:, :-1]


def integers(tensors: dict[str, Any]) -> None:
    tensors[f"{Q_PROJ}.weight"] = tensors[f"{Q_PROJ}.weight"].astype(np.int32)


def scales_of_nothing(tensors: dict[str, Any]) -> None:
    tensors[f"{Q_PROJ}.scales"] = np.zeros((64, 1), np.float16)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (missing, f"{Q_PROJ}.bias"),
        (missing_encoder, "final_conv.se.fc2.bias"),
        (extra, "model.layers.7.self_attn.q_proj.bias"),
        (stranger, "wholly.unknown"),
        (misshapen, f"{Q_PROJ}.weight"),
        (misshapen_encoder, f"{TOWER}network.0.0.convffn.fc1.weight"),
        (integers, f"{Q_PROJ}.weight"),
        (scales_of_nothing, f"{Q_PROJ}.scales"),
    ],
)
def test_tensors_that_do_not_fit(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], names: str
) -> None:
    source = checkpoint(tmp_path / "source", change)
    text = refusal(source, tmp_path)
    assert names in text
    assert str(source) in text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ('{"model_type": "llava-qwen2"}', "Bunny"),
        ('{"model_type": "gpt2"}', "not a FastVLM"),
        ("[" * 100_000, "JSON"),
    ],
)
def test_a_configuration_that_is_none(tmp_path: Path, content: str, says: str) -> None:
    source = checkpoint(tmp_path / "source")
    (source / "config.json").write_text(content)
    text = refusal(source, tmp_path)
    assert "config.json" in text and says in text


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 10**9},
        {"hidden_size": 10**12},
        {"intermediate_size": "wide"},
        {"num_attention_heads": 0},
        {"num_key_value_heads": 3},
        {"vision_config": {**tiny.VISION_CONFIG, "layers": [10**9, 1, 1, 1, 1]}},
        {"vision_config": {**tiny.VISION_CONFIG, "embed_dims": [-8, 16, 32, 64, 128]}},
        {"vision_config": {**tiny.VISION_CONFIG, "image_size": -5}},
        {"mm_projector_type": "mlp999999999x_gelu"},
        {"eos_token_id": "end"},
    ],
    ids=str,
)
def test_a_configuration_that_is_absurd(tmp_path: Path, config: dict[str, Any]) -> None:
    """Refused when it is read: whoever builds a model of a billion layers first, never ends."""
    source = checkpoint(tmp_path / "source", config=config)
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_config(source)
    assert "config.json" in refusal(source, tmp_path)


# Pickles and archives ------------------------------------------------------------------------


def test_a_pickle_that_would_run_code(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source")
    (source / WEIGHTS).unlink()
    marker = tmp_path / "was-run"
    weights = source / "pytorch_model.bin"
    state = {"evil": call(glob("posix system"), f"touch {marker}")}
    weights.write_bytes(zip_bytes(None, {}, pickle=pickled(state)))
    text = refusal(source, tmp_path)
    assert "pytorch_model.bin" in text and "posix.system" in text
    assert not marker.exists()


def test_a_hostile_projector_for_a_base(tmp_path: Path) -> None:
    base = tiny.write(tmp_path / "base")
    source = tmp_path / "source"
    source.mkdir()
    state = {
        "model.mm_projector.0.weight": tensor("0", np.zeros((64, 256), np.float32)),
        "hook": call(glob("builtins eval"), "1"),
    }
    data = zip_bytes(None, {"0": bytes(64 * 256 * 4)}, pickle=pickled(state))
    (source / "mm_projector.bin").write_bytes(data)
    text = refusal(source, tmp_path, base=base)
    assert "mm_projector.bin" in text and "builtins.eval" in text


def zipped(source: Path, path: Path, more: Callable[[zipfile.ZipFile], None]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in source.iterdir():
            archive.write(file, f"model/{file.name}")
        more(archive)
    return path


def climbing(archive: zipfile.ZipFile) -> None:
    archive.writestr("model/../../evil.json", "{}")


def absolute(archive: zipfile.ZipFile) -> None:
    archive.writestr("/tmp/evil.json", "{}")


def bomb(archive: zipfile.ZipFile) -> None:
    archive.writestr("model/evil.json", bytes(50_000_000))


def link(archive: zipfile.ZipFile) -> None:
    member = zipfile.ZipInfo("model/evil.json")
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    archive.writestr(member, "/etc/passwd")


@pytest.mark.parametrize("more", [climbing, absolute, bomb, link])
def test_an_archive_with_a_trick(tmp_path: Path, more: Callable[[zipfile.ZipFile], None]) -> None:
    path = zipped(checkpoint(tmp_path / "source"), tmp_path / "model.zip", more)
    text = refusal(path, tmp_path)
    assert "model.zip" in text and "evil.json" in text
    assert not (tmp_path / "evil.json").exists()


def test_an_archive_that_is_cut_or_damaged(tmp_path: Path) -> None:
    path = zipped(checkpoint(tmp_path / "source"), tmp_path / "model.zip", lambda _: None)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert "model.zip" in refusal(path, tmp_path)
    middle = data.index(b"model/model.safetensors") + 2000
    path.write_bytes(data[:middle] + bytes(64) + data[middle + 64 :])
    text = refusal(path, tmp_path)
    assert "model.zip" in text and "damaged" in text


# The command ---------------------------------------------------------------------------------


def cut(source: Path) -> None:
    weights = source / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])


def no_tokenizer(source: Path) -> None:
    (source / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("damage", "says"), [(cut, "the file is cut"), (no_tokenizer, "no tokenizer")]
)
def test_the_command_says_it_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], damage: Damage, says: str
) -> None:
    source = checkpoint(tmp_path / "source")
    damage(source)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        status = run(["convert", str(source), str(tmp_path / "place" / "model")])
    finally:
        signal.signal(signal.SIGTERM, handler)
    out, err = capfd.readouterr()
    assert status == 1 and out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ") and says in err and str(source) in err
