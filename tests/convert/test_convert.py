"""What stands at the target: the files, and that it is all of them or none."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny
from convert_helpers import arrays, features, greedy, leftovers, stored
from fastvlm_mlx.convert import ConvertOptions, convert
from fastvlm_mlx.convert import target as target_module
from fastvlm_mlx.convert.target import Target, TargetError

from fastvlm_mlx import load
from fastvlm_mlx.config import read_config
from fastvlm_mlx.errors import CheckpointError, ConfigError, UsageError
from fastvlm_mlx.loading import load_tokenizer
from fastvlm_mlx.processing.prompt import as_messages, chat_style

SWIFT_VISION = """
cls_ratio down_patch_size down_stride downsamples embed_dims hidden_size image_size
intermediate_size layers layer_scale_init_value mlp_ratios num_classes patch_size pos_embs_shapes
projection_dim repmixer_kernel_size token_mixers
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("source") / "FastVLM-tiny")


def settings(folder: Path, name: str = "config.json") -> dict[str, object]:
    return json.loads((folder / name).read_text())


# The small files ------------------------------------------------------------------------------


def test_config_has_what_each_reader_insists_on(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "t")
    config = settings(tmp_path / "t")
    assert config["model_type"] == "llava_qwen2"
    assert config["image_token_index"] == -200
    assert config["eos_token_id"] == tiny.IM_END  # one number: Swift's decoder takes no list
    text, vision = config["text_config"], config["vision_config"]
    assert isinstance(text, dict) and isinstance(vision, dict)
    assert text["model_type"] == "qwen2"
    for name in ("hidden_size", "num_hidden_layers", "rope_theta", "tie_word_embeddings"):
        assert config[name] == text[name]
    # Every field that mlx-swift-lm's FastVLMConfiguration decodes without a default.
    for name in SWIFT_VISION.split():
        assert name in vision
    for name in ("mm_projector_type", "mm_hidden_size", "tokenizer_padding_side"):
        assert name in config
    assert config["tokenizer_model_max_length"] == 512
    assert settings(tmp_path / "t", "generation_config.json")["eos_token_id"] == [
        tiny.IM_END,
        tiny.ENDOFTEXT,
    ]
    pictures = settings(tmp_path / "t", "preprocessor_config.json")
    assert pictures["processor_class"] == "FastVLMProcessor"
    assert pictures["crop_size"] == {"height": tiny.IMAGE_SIZE, "width": tiny.IMAGE_SIZE}


@pytest.mark.parametrize("layout", ["llava", "mlx", "transformers"])
def test_the_configuration_reads_back_the_same(tmp_path: Path, layout: str) -> None:
    folder = tiny.write(tmp_path / "s", layout)
    convert(folder, tmp_path / "t")
    before, after = read_config(folder), read_config(tmp_path / "t")
    assert after.vision == before.vision
    assert after.projector == before.projector
    assert after.aspect == before.aspect == "pad"
    assert after.eos_token_ids == before.eos_token_ids
    wanted = {k: v for k, v in before.text.items() if k in tiny.TEXT_CONFIG}
    assert {k: after.text[k] for k in wanted} == wanted
    # Once more, from what was written: nothing is left to change.
    convert(tmp_path / "t", tmp_path / "u")
    for name in ("config.json", "generation_config.json", "preprocessor_config.json"):
        assert settings(tmp_path / "u", name) == settings(tmp_path / "t", name)
    assert (tmp_path / "u" / "model.safetensors").read_bytes() == (
        tmp_path / "t" / "model.safetensors"
    ).read_bytes()


def test_what_the_configuration_says_wrongly_is_repaired(tmp_path: Path) -> None:
    lies = {"tie_word_embeddings": True, "vocab_size": 999, "eos_token_id": 5}
    lies |= {"image_token_index": 7, "_name_or_path": "/home/author/run", "auto_map": {"x": "y"}}
    folder = tiny.write(
        tmp_path / "s",
        tensors=tiny.llava(tied=False),
        config={**lies, "mm_vision_tower": "/a/b_128"},
    )
    (folder / "generation_config.json").unlink()
    report = convert(folder, tmp_path / "t")
    told = "\n".join(report.repairs)
    for what in ("tie_word_embeddings", "vocab_size", "eos_token_id", "image token"):
        assert what in told
    config = settings(tmp_path / "t")
    assert config["tie_word_embeddings"] is False
    assert config["vocab_size"] == tiny.VOCABULARY
    assert config["eos_token_id"] == tiny.IM_END
    assert "author" not in json.dumps(config) and "auto_map" not in config
    assert config["mm_vision_tower"] == "b_128"
    assert load(tmp_path / "t")[0].loaded_from.repairs == []


def test_a_head_that_equals_the_embeddings_is_dropped(tmp_path: Path) -> None:
    tensors = tiny.llava()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    folder = tiny.write(tmp_path / "s", tensors=tensors, config={"tie_word_embeddings": False})
    report = convert(folder, tmp_path / "t")
    assert any("tie_word_embeddings" in repair for repair in report.repairs)
    assert "language_model.lm_head.weight" not in stored(tmp_path / "t")
    assert settings(tmp_path / "t")["tie_word_embeddings"] is True


def test_a_template_that_cannot_place_pictures_is_replaced(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "s")
    file = folder / "tokenizer_config.json"
    plain = "{% for m in messages %}{{ m['content'] + '' }}{% endfor %}"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": plain}))
    report = convert(folder, tmp_path / "t")
    assert any("chat_template" in repair for repair in report.repairs)
    tokenizer = load_tokenizer(tmp_path / "t", read_config(tmp_path / "t"))
    style = chat_style("qwen2")
    for content in ("<image>\nWhat?", [{"type": "image"}, {"type": "text", "text": "What?"}]):
        made = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        assert made == style.render(as_messages("What?", 1, None, style))


def test_a_good_template_and_the_tokenizer_stay_as_they_are(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "t")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "t" / name).read_bytes() == (source / name).read_bytes()


def test_the_card_says_what_was_done(source: Path, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    folder = shutil.copytree(source, tmp_path / "s" / "Tiny")
    (folder / "README.md").write_text("---\nlicense: apple-amlr\nother: x\n---\nText")
    (folder / "LICENSE").write_text("terms")
    report = convert(
        folder,
        tmp_path / "t",
        ConvertOptions(bits=4, group_size=32, keep=("lm_head", "embed")),
        verification=lambda _source, _folder: "logits agree",
    )
    card = (tmp_path / "t" / "README.md").read_text()
    for words in (
        "license: apple-amlr",
        "`Tiny`",
        "--bits 4 --group-size 32 --keep lm_head,embed",
        report.source_sha256["model.safetensors"],
        "logits agree",
        "[LICENSE](LICENSE)",
        "asked for with --keep",
        "mlx-lm",
    ):
        assert words in card
    assert str(tmp_path) not in card
    json.dumps(report.to_dict())


# Precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "encoder_dtype", "language", "tower"),
    [
        (None, None, mx.float32, mx.float32),
        ("bfloat16", None, mx.bfloat16, mx.bfloat16),
        ("float16", None, mx.float16, mx.float32),
        ("float16", "float16", mx.float16, mx.float16),
        (None, "bfloat16", mx.float32, mx.bfloat16),
    ],
)
def test_types(
    source: Path,
    tmp_path: Path,
    dtype: str | None,
    encoder_dtype: str | None,
    language: mx.Dtype,
    tower: mx.Dtype,
) -> None:
    options = ConvertOptions(dtype=dtype, encoder_dtype=encoder_dtype)  # type: ignore[arg-type]
    report = convert(source, tmp_path / "t", options)
    wanted = arrays(source)
    for name, array in arrays(tmp_path / "t").items():
        assert array.dtype == (tower if name.startswith("vision_tower") else language)
        if name.startswith("language_model."):
            original = wanted[name.removeprefix("language_model.")].astype(language)
            assert mx.array_equal(array, original).item()
    assert any("float16's range" in n for n in report.notes) == (
        dtype == "float16" and encoder_dtype is None
    )


def test_a_float16_encoder_is_widened(tmp_path: Path) -> None:
    half = {n: a.astype(np.float16) for n, a in tiny.llava().items()}
    convert(tiny.write(tmp_path / "s", tensors=half), tmp_path / "t")
    kinds = {n.split(".")[0]: a.dtype for n, a in arrays(tmp_path / "t").items()}
    assert kinds["vision_tower"] == mx.float32
    assert kinds["language_model"] == kinds["mm_projector"] == mx.float16


def test_values_that_do_not_fit_the_type_are_refused(tmp_path: Path) -> None:
    tensors = tiny.llava()
    tensors["model.norm.weight"][3] = 1e6
    folder = tiny.write(tmp_path / "s", tensors=tensors)
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' has values too large for F16"):
        convert(folder, tmp_path / "t", ConvertOptions(dtype="float16"))
    assert leftovers(tmp_path, "s") == []


# All or nothing -------------------------------------------------------------------------------


def test_what_is_there_is_replaced_only_when_asked(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "t"
    convert(source, target)
    before = (target / "model.safetensors").read_bytes()
    with pytest.raises(TargetError, match="--overwrite"):
        convert(source, target, ConvertOptions(dtype="bfloat16"))
    assert (target / "model.safetensors").read_bytes() == before
    (target / "old-file.txt").write_text("x")
    convert(source, target, ConvertOptions(dtype="bfloat16", overwrite=True))
    assert (target / "model.safetensors").read_bytes() != before
    assert not (target / "old-file.txt").exists()
    assert leftovers(tmp_path, "t") == []


def test_what_is_no_model_is_not_removed(source: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"x")
    with pytest.raises(TargetError, match="holds no model"):
        convert(source, tmp_path / "photos", ConvertOptions(overwrite=True))
    (tmp_path / "file").write_text("x")
    with pytest.raises(TargetError, match="is a file"):
        convert(source, tmp_path / "file", ConvertOptions(overwrite=True))
    assert leftovers(tmp_path, "photos", "file") == []


def test_an_empty_folder_and_folders_that_are_not_there(source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    convert(source, tmp_path / "empty")
    convert(source, tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c" / "config.json").exists()
    with pytest.raises(UsageError):
        convert(source, tmp_path / "d" / "e", ConvertOptions(base=source))
    assert leftovers(tmp_path, "empty", "a") == []


def test_a_check_that_raises_leaves_the_old_folder(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "t")
    before = {f.name: f.read_bytes() for f in (tmp_path / "t").iterdir()}

    def refuse(original: object, folder: Path) -> None:
        assert greedy(load(folder)[0]) == greedy(load(source)[0])
        assert original == source
        raise ConfigError("no")

    with pytest.raises(ConfigError, match="no"):
        convert(source, tmp_path / "t", ConvertOptions(overwrite=True), verification=refuse)
    assert {f.name: f.read_bytes() for f in (tmp_path / "t").iterdir()} == before
    assert leftovers(tmp_path, "t") == []


def test_interrupting_leaves_nothing(source: Path, tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "t", progress=stop)
    assert leftovers(tmp_path) == []


def test_too_little_room_is_said_before_the_first_byte(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(target_module.shutil, "disk_usage", lambda _path: usage)
    written = []
    with pytest.raises(TargetError, match=r"1\.0 kB free"):
        convert(source, tmp_path / "t", progress=lambda *_: written.append(1))
    assert written == [] and leftovers(tmp_path) == []


def test_two_conversions_to_one_target(source: Path, tmp_path: Path) -> None:
    with Target(tmp_path / "t"):
        with pytest.raises(TargetError, match="another conversion"):
            convert(source, tmp_path / "t")
        convert(source, tmp_path / "u")  # another name is another matter
    convert(source, tmp_path / "t")
    assert leftovers(tmp_path, "t", "u") == []


def test_what_a_killed_conversion_left_is_cleared(source: Path, tmp_path: Path) -> None:
    code = (
        "import os, sys; from fastvlm_mlx.convert import convert\n"
        "convert(sys.argv[1], sys.argv[2], progress=lambda *_: os.kill(os.getpid(), 9))"
    )
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    killed = subprocess.run(
        [sys.executable, "-c", code, str(source), str(tmp_path / "t")], env=environment, check=False
    )
    assert killed.returncode == -9
    assert not (tmp_path / "t").exists() and leftovers(tmp_path) != []
    convert(source, tmp_path / "t")
    assert leftovers(tmp_path, "t") == []


@pytest.mark.parametrize("swaps", [True, False])
def test_at_every_step_of_replacing_a_whole_folder_stands_or_comes_back(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swaps: bool
) -> None:
    """Stop dead at each system call of `commit`, as a kill would, and look."""
    old, new = b"old", b"new"
    real = {name: getattr(os, name) for name in ("rename", "fsync")}
    exchange = target_module.exchange
    for stop_at in range(40):
        home = tmp_path / f"{swaps}-{stop_at}"
        (home / "t").mkdir(parents=True)
        for name, data in (("config.json", b"{}"), ("model", old)):
            (home / "t" / name).write_bytes(data)
        left = iter(range(stop_at))

        def step(name: str, *arguments: object, left: Iterator[int] = left) -> object:
            if next(left, None) is None:
                raise SystemExit  # no `except` of ours stops it
            return real[name](*arguments)

        def swap(a: Path, b: Path, left: Iterator[int] = left) -> bool:
            if next(left, None) is None:
                raise SystemExit
            return swaps and exchange(a, b)

        place = Target(home / "t", overwrite=True)
        place.__enter__()
        (place.partial / "config.json").write_bytes(b"{}")
        (place.partial / "model").write_bytes(new)
        finished = False
        with monkeypatch.context() as patch:
            patch.setattr(target_module.os, "rename", lambda *a: step("rename", *a))
            patch.setattr(target_module.os, "fsync", lambda *a: step("fsync", *a))
            patch.setattr(target_module, "exchange", swap)
            try:
                place.commit()
                finished = True
            except SystemExit:
                pass
        if swaps:
            assert (home / "t" / "model").read_bytes() in (old, new)
        os.close(place._lock)  # type: ignore[arg-type] - as the kernel does for the dead
        with pytest.raises(TargetError, match="--overwrite"), Target(home / "t"):
            pass
        assert (home / "t" / "model").read_bytes() in (old, new)
        assert (home / "t" / "config.json").exists()
        if finished:
            assert (home / "t" / "model").read_bytes() == new
            return
    pytest.fail("commit did not end")


def test_options_that_contradict_each_other() -> None:
    for wrong in (
        {"bits": 7},
        {"bits": 4, "dequantize": True},
        {"recipe": "mixed_4_6", "bits": 4},
        {"recipe": "mixed_1_2"},
        {"mode": "mxfp4", "bits": 8},
        {"mode": "mxfp4", "group_size": 64},
        {"bits": 4, "group_size": 48},
        {"keep": ("lm_head",)},
        {"dtype": "int8"},
        {"shard_size": 10},
    ):
        with pytest.raises(UsageError):
            ConvertOptions(**wrong)  # type: ignore[arg-type]


def test_features_do_not_depend_on_the_way(source: Path, tmp_path: Path) -> None:
    """transformers -> mlx -> mlx, in shards and not, is one model."""
    first = tiny.write(tmp_path / "s", "transformers")
    convert(first, tmp_path / "a", ConvertOptions(shard_size=1_000_000))
    convert(tmp_path / "a", tmp_path / "b")
    np.testing.assert_array_equal(features(load(tmp_path / "b")[0]), features(load(source)[0]))
