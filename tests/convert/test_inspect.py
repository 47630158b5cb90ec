"""`inspect`: a checkpoint described from its headers, honest or broken."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
from damaged import Q_PROJ, TOWER, checkpoint
from fastvlm_mlx.convert.inspection import Inspection, inspect
from safetensors.numpy import save_file

from fastvlm_mlx.errors import UsageError
from fastvlm_mlx.weights.lazy import LazyTensor, SourceFile


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("honest") / "model", shards=3)


def faults(report: Inspection) -> str:
    return "\n".join(map(str, report.faults))


def change_header(path: Path, change: Callable[[dict[str, dict[str, object]]], None]) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def test_an_honest_checkpoint(honest: Path) -> None:
    report = inspect(honest)
    assert not report.broken
    assert (report.kind, report.layout, report.model_type) == ("folder", "llava", "llava_qwen2")
    assert (report.encoder, report.picture_size, report.visual_tokens) == ("fused", 128, 4)
    assert [file.name for file in report.files] == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    shapes = {name: value.shape for name, value in tiny.llava().items()}
    by_name = {part.name: part for part in report.parts}
    assert sum(part.tensors for part in report.parts) == len(shapes) == len(report.tensors)
    language = sum(
        int(np.prod(shape))
        for name, shape in shapes.items()
        if name.startswith("model.") and "vision" not in name and "projector" not in name
    )
    assert by_name["language_model"].parameters == language
    assert by_name["language_model"].dtypes == {"F32": 4 * language}
    assert by_name["not used"].tensors == 7  # the pooled head, and six counters of BatchNorm
    assert report.quantization is None
    assert report.repairs == ["image token: the tokenizer has no <image>; loading adds it"]
    assert json.loads(json.dumps(report.to_dict(tensors=True)))["broken"] is False
    assert report.tensors[f"{Q_PROJ}.weight"]["canonical"] == f"language_model.{Q_PROJ}.weight"


@pytest.mark.parametrize("layout", ["llava", "mlx", "transformers", "apple-mlx"])
def test_every_layout_is_recognised(tmp_path: Path, layout: str) -> None:
    report = inspect(tiny.write(tmp_path / "model", layout))
    assert not report.broken, faults(report)
    assert report.layout == layout
    whole = layout != "apple-mlx"
    assert report.content.startswith("FastVLM" if whole else "FastVLM without its vision tower")
    assert (report.encoder == "fused") == whole


def test_a_training_checkpoint(tmp_path: Path) -> None:
    report = inspect(tiny.write(tmp_path / "model", training=True))
    assert not report.broken, faults(report)
    assert report.encoder is not None and report.encoder.endswith("as training branches")


def test_no_value_of_a_tensor_is_read(honest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(SourceFile, "map", refuse)
    monkeypatch.setattr(LazyTensor, "stored", refuse)
    opened: list[int] = []
    original = SourceFile.open
    monkeypatch.setattr(SourceFile, "open", lambda self: opened.append(1) or original(self))
    assert not inspect(honest).broken
    # The index, and for each of three shards its kind and its header.
    assert len(opened) == 1 + 2 * 3


def test_bytes_read_do_not_grow_with_the_tensors(tmp_path: Path) -> None:
    """The same headers over holes of a terabyte: reading them would show."""
    folder = checkpoint(tmp_path / "model")
    weights = folder / "model.safetensors"
    big = {"dtype": "F32", "shape": [500, 500_000_000]}

    def widen(header: dict[str, dict[str, object]]) -> None:
        end = max(int(e["data_offsets"][1]) for n, e in header.items() if n != "__metadata__")  # type: ignore[index]
        header["vision_resampler.big"] = {**big, "data_offsets": [end, end + 10**12]}

    change_header(weights, widen)
    try:
        with weights.open("ab") as file:
            file.truncate(weights.stat().st_size + 10**12)
    except OSError as error:
        pytest.skip(f"no sparse files of that size here: {error}")
    report = inspect(folder)
    assert not report.broken
    assert report.bytes > 10**12


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_of_a_folder(honest: Path, tmp_path: Path, method: int) -> None:
    path = tmp_path / "model.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in honest.iterdir():
            archive.write(file, f"llava-fastvithd/{file.name}")
    report = inspect(path)
    inside = inspect(honest)
    assert report.kind == "zip archive"
    assert (report.faults, report.repairs) == (inside.faults, inside.repairs)
    assert report.parts == inside.parts


def test_one_file_without_a_configuration(honest: Path, tmp_path: Path) -> None:
    shard = tmp_path / "model-00001-of-00003.safetensors"
    shard.write_bytes((honest / shard.name).read_bytes())
    report = inspect(shard)
    assert not report.broken
    assert (report.kind, report.layout) == ("file", "llava")
    assert report.model_type is None


def test_a_projector_and_an_adapter_are_parts_not_faults(tmp_path: Path) -> None:
    folder = tmp_path / "trained"
    folder.mkdir()
    zeros = np.zeros((4, 4), np.float32)
    save_file({f"model.mm_projector.{i}.weight": zeros for i in (0, 2)}, folder / "x.safetensors")
    assert "projector alone" in inspect(folder / "x.safetensors").content
    save_file(
        {f"base_model.model.{Q_PROJ}.lora_{x}.weight": zeros for x in "AB"},
        folder / "adapter_model.safetensors",
    )
    (folder / "x.safetensors").unlink()
    report = inspect(folder)
    assert "LoRA adapter" in report.content
    assert not report.broken


def test_quantised_layers_are_recognised_from_their_shapes(tmp_path: Path) -> None:
    def pack(tensors: dict[str, np.ndarray]) -> None:
        rows, columns = tensors[f"{Q_PROJ}.weight"].shape
        tensors[f"{Q_PROJ}.weight"] = np.zeros((rows, columns * 4 // 32), np.uint32)
        tensors[f"{Q_PROJ}.scales"] = np.zeros((rows, columns // 32), np.float16)
        tensors[f"{Q_PROJ}.biases"] = np.zeros((rows, columns // 32), np.float16)

    folder = checkpoint(tmp_path / "model", pack)
    report = inspect(folder)
    assert not report.broken, faults(report)
    assert report.quantization == {
        "layers": {"4-bit, groups of 32, affine": 1},
        "config": {},
    }
    plain = inspect(checkpoint(tmp_path / "plain"))
    assert report.parts[2].parameters == plain.parts[2].parameters
    assert any("several types" in str(s) for s in report.surprises)


def test_training_branches_are_a_repair(tmp_path: Path) -> None:
    def unfuse(tensors: dict[str, np.ndarray]) -> None:
        """A positional encoding as training has it: x + pe(x)."""
        for part in ("weight", "bias"):
            fused = tensors.pop(f"{TOWER}network.6.reparam_conv.{part}")
            tensors[f"{TOWER}network.6.pe.{part}"] = fused

    report = inspect(checkpoint(tmp_path / "model", unfuse))
    assert not report.broken, faults(report)
    assert report.encoder == "1 convolutions as training branches"
    assert any("branches of training" in line for line in report.repairs)


def test_what_the_configuration_gets_wrong_is_a_repair(tmp_path: Path) -> None:
    folder = checkpoint(
        tmp_path / "model",
        config={"tie_word_embeddings": False, "vocab_size": 999, "image_token_index": 5},
    )
    added = {"300": {"content": "<image>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    report = inspect(folder)
    assert not report.broken, faults(report)
    text = "\n".join(report.repairs)
    assert f"vocab_size: config says 999, the tensors {tiny.VOCABULARY}" in text
    assert "tie_word_embeddings: config says false, but there is no lm_head" in text
    assert "image token: config says 5, the tokenizer 300" in text


# Broken ones ---------------------------------------------------------------------------------


def test_missing_extra_and_misshapen_tensors_are_each_named(tmp_path: Path) -> None:
    def damage(tensors: dict[str, np.ndarray]) -> None:
        del tensors[f"{Q_PROJ}.bias"]
        del tensors[f"{TOWER}conv_exp.se.reduce.weight"]
        tensors["model.layers.0.self_attn.sinks"] = np.zeros(4, np.float32)
        tensors["model.mm_projector.0.weight"] = np.zeros((64, 7), np.float32)
        tensors["something.else"] = np.zeros(1, np.float32)

    report = inspect(checkpoint(tmp_path / "model", damage))
    text = faults(report)
    assert report.broken and len(report.faults) == 5
    assert f"language_model.{Q_PROJ}.bias is missing, [64]" in text
    assert "vision_tower.final_conv.se.fc1.weight is missing" in text
    assert "model.safetensors: model.layers.0.self_attn.sinks: is no tensor of this model" in text
    assert "model.mm_projector.0.weight: has the shape [64, 7], expected [64, 256]" in text
    assert "something.else: is no tensor of this model" in text


def test_a_cut_shard_is_reported_and_the_others_are_described(honest: Path, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", shards=3)
    cut = folder / "model-00002-of-00003.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    report = inspect(folder)
    assert report.broken
    assert "the file is cut" in faults(report)
    by_name = {file.name: file for file in report.files}
    assert by_name[cut.name].fault and by_name["model-00001-of-00003.safetensors"].tensors > 40
    assert report.layout == "llava"
    assert str(tmp_path) not in faults(report)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ("model.safetensors", b"<!DOCTYPE html><html></html>", "web page"),
        ("model.safetensors", b"", "is empty"),
        ("model.safetensors", struct.pack("<Q", 1 << 60) + b"{}", "is not safetensors"),
        ("config.json", b'{"model_type": "llava-qwen2"}', "Bunny"),
        ("config.json", b"{", "not valid JSON"),
        ("config.json", None, "no such file"),
        ("tokenizer.json", None, "no tokenizer"),
        ("model.safetensors", None, "holds no weights"),
    ],
)
def test_a_broken_file_is_a_fault_in_words(
    tmp_path: Path, name: str, content: bytes | None, complaint: str
) -> None:
    folder = checkpoint(tmp_path / "model")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    report = inspect(folder)
    assert report.broken
    assert complaint in faults(report)


def test_an_archive_that_leaves_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "model.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/config.json", "{}")
        archive.writestr("model/../../evil.json", "{}")
    report = inspect(path)
    assert report.broken
    assert "evil.json" in faults(report)
    assert not (tmp_path / "evil.json").exists()


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no file or folder"):
        inspect(tmp_path / "nowhere")


def test_other_bytes_and_types_are_surprises(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", lambda t: t.update({f"{Q_PROJ}.bias": np.zeros(64)}))
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"after")
    (folder / "pytorch_model.bin").write_bytes(b"old")
    report = inspect(folder)
    assert not report.broken, faults(report)
    text = "\n".join(map(str, report.surprises))
    assert f"model.safetensors: {Q_PROJ}.bias: is stored as F64" in text
    assert "model.safetensors: has 5 bytes after its last tensor" in text
    assert "pytorch_model.bin: lies beside the weights and is not read" in text


# The command ---------------------------------------------------------------------------------


def test_the_command_and_its_exit_code(honest: Path, tmp_path: Path) -> None:
    def damage(tensors: dict[str, np.ndarray]) -> None:
        del tensors["model.norm.weight"]

    broken = checkpoint(tmp_path / "broken", damage)
    script = (
        "import sys, json\n"
        "from fastvlm_mlx.cli import main\n"
        "codes = [main(arguments) for arguments in json.loads(sys.argv[1])]\n"
        "print(json.dumps([codes, [m for m in ('transformers', 'mlx_lm') if m in sys.modules]]))\n"
    )
    calls = [["inspect", str(honest)], ["inspect", str(broken), "--json"]]
    result = subprocess.run(
        [sys.executable, "-c", script, json.dumps(calls)], capture_output=True, text=True
    )
    assert result.stderr == ""
    assert "no fault found" in result.stdout
    assert "language_model.model.norm.weight is missing" in result.stdout
    codes, heavy = json.loads(result.stdout.splitlines()[-1])
    assert codes == [0, 1]
    assert heavy == []  # they alone would take seconds to import
