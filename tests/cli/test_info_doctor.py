"""`info` and `doctor`: what they report and how it reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_process import RunCommand, one_line_error

from fastvlm_mlx import hub
from fastvlm_mlx.cli import doctor, main
from fastvlm_mlx.cli.info import summary_text
from fastvlm_mlx.hub import FoundModel

SUMMARY = {
    "parameters": {"vision_tower": 125_070_000, "mm_projector": 3_557_120, "language_model": 500},
    "precision": {"vision_tower": "F16", "mm_projector": "F16", "language_model": "4-bit"},
    "bytes": {"vision_tower": 250_140_000, "mm_projector": 7_114_240, "language_model": 1000},
    "resolution": (512, 1024),
    "visual_tokens": 128,
    "layout": "llava",
    "model_type": "llava_qwen2",
    "vocabulary": 151_936,
    "context_length": 8192,
    "memory_bytes": 300_000_000,
    "quantization": {"group_size": 64, "bits": 4, "some.layer": {"bits": 8}},
    "picture_mode": "pad",
    "repairs": ["tie_word_embeddings is true: there is no lm_head"],
}


def test_a_summary_reads_well(tmp_path: Path) -> None:
    text = summary_text(FoundModel(tmp_path, "apple/FastVLM-x", "cache"), SUMMARY)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "model apple/FastVLM-x" in lines
    assert "pictures 1024x512 pixels (pad), 128 tokens each" in lines
    assert "quantisation group_size 64, bits 4" in lines
    assert "corrected tie_word_embeddings is true: there is no lm_head" in lines
    assert "vision_tower 125.07 M 250.1 MB F16" in lines
    assert "total 128.63 M 257.3 MB" in lines


def test_info_on_a_model_that_is_not_here(run: RunCommand) -> None:
    result = run("info", "nobody/nothing")
    assert result.returncode == 1
    assert "fastvlm-mlx download nobody/nothing" in one_line_error(result)


def test_doctor_as_json(run: RunCommand) -> None:
    report = json.loads(run("doctor", "--json").stdout)
    assert report["device"]["kind"] in ("Metal", "CUDA", "CPU")
    assert report["versions"]["mlx"]
    assert report["disk"]["free_bytes"] > 0
    assert report["models"]["cached"] == []
    assert set(report) >= {"blas", "optional", "advice", "broken", "python", "system"}


def test_doctor_fails_only_if_something_is_broken(
    tmp_path: Path,
    empty_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    demo = tmp_path / "demo"
    demo.mkdir()
    (demo / "config.json").write_text("{}")
    monkeypatch.setattr(hub, "BUNDLED", demo)
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.endswith("Ready to answer.\n")

    monkeypatch.setitem(doctor._REQUIRED, "no-such-library", "no_such_library")
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "What is broken:" in out
    assert "no-such-library cannot be used" in out
    assert out.endswith("Answering is impossible until that is mended.\n")


def test_doctor_names_an_unfinished_download(
    empty_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshot = empty_cache / "models--apple--FastVLM-0.5B" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    main(["doctor"])
    out = capsys.readouterr().out
    assert "incomplete: no tokenizer.json, model.safetensors" in out
    assert "to finish it: fastvlm-mlx download apple/FastVLM-0.5B" in out
