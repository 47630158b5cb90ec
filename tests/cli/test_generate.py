"""`generate` on its own side of the road: what it asks of the library and what it prints.

The library is replaced by one that notes what it was asked; the answers of the real one are in
test_end_to_end.py.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

import fastvlm_mlx
from fastvlm_mlx.cli import main
from fastvlm_mlx.cli.generate import DEFAULT_PROMPT, stats_table
from fastvlm_mlx.errors import CheckpointError

FIGURES = {
    "load_s": 0.0,
    "preprocess_s": 0.25,
    "encode_s": 1.5,
    "project_s": 0.001,
    "prefill_s": 0.5,
    "ttft_s": 2.251,
    "decode_tokens_per_s": 12.34,
    "prompt_tokens": 40,
    "visual_tokens": 16,
    "generated_tokens": 2,
    "peak_memory_bytes": 123_456_789,
}


@dataclass
class Library:
    """Stands in for `load` and `stream_generate`."""

    pieces: tuple[str, ...] = ("It is ", "a cat.")
    loaded: list[tuple[Path, str]] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)

    def load(self, path: Path, dtype: str) -> tuple[str, str]:
        self.loaded.append((path, dtype))
        return "model", "processor"

    def stream_generate(
        self, model: str, processor: str, prompt: str, images: list[Any] | None, **options: Any
    ) -> Iterator[SimpleNamespace]:
        self.asked.append({"prompt": prompt, "images": images, **options})
        for number, text in enumerate(self.pieces, 1):
            done = number == len(self.pieces)
            yield SimpleNamespace(
                text=text,
                finish_reason="stop" if done else None,
                stats=SimpleNamespace(to_dict=lambda: dict(FIGURES)) if done else None,
            )


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, empty_cache: Path) -> Library:
    replacement = Library()
    monkeypatch.setattr(fastvlm_mlx, "load", replacement.load, raising=False)
    monkeypatch.setattr(fastvlm_mlx, "stream_generate", replacement.stream_generate, raising=False)
    monkeypatch.setenv("FASTVLM_MODEL", str(tmp_path))
    return replacement


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "red.png"
    Image.new("RGB", (5, 3), "red").save(path)
    return str(path)


def test_the_answer_alone_goes_to_standard_output(
    library: Library, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "What is this?"]) == 0
    assert capsys.readouterr() == ("It is a cat.\n", "")
    assert library.asked[0]["images"] is None


def test_every_option_arrives(library: Library, picture: str, tmp_path: Path) -> None:
    options = (
        f"--image {picture} --image {picture} --max-tokens 7 --temp 0.5 --top-p 0.9 --top-k 40 "
        "--min-p 0.1 --repetition-penalty 1.1 --seed 3 --system Brief. --dtype bfloat16"
    )
    assert main(["generate", *options.split(), "Compare <image> and <image>"]) == 0
    assert library.loaded == [(tmp_path, "bfloat16")]
    (asked,) = library.asked
    assert [image.size for image in asked.pop("images")] == [(5, 3), (5, 3)]
    assert asked == {
        "prompt": "Compare <image> and <image>",
        "system": "Brief.",
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "seed": 3,
    }


def test_a_picture_without_a_question_is_described(library: Library, picture: str) -> None:
    assert main(["generate", "--image", picture]) == 0
    assert library.asked[0]["prompt"] == DEFAULT_PROMPT


def test_the_question_from_standard_input(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is this?\n"))
    assert main(["generate", "-"]) == 0
    assert library.asked[0]["prompt"] == "What is this?"


def test_json_is_one_object_and_nothing_else(
    library: Library, picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "--json", "--image", picture, "What?"]) == 0
    out, err = capsys.readouterr()
    printed = json.loads(out)
    assert err == ""
    assert printed["answer"] == "It is a cat."
    assert printed["finish_reason"] == "stop"
    assert printed["model"] == str(tmp_path)
    assert printed["pictures"] == [picture]
    assert printed["stats"].keys() == FIGURES.keys()
    # Opening the pictures happens before the generator's clock starts, and is counted.
    assert printed["stats"]["preprocess_s"] > FIGURES["preprocess_s"]
    opening_s = printed["stats"]["preprocess_s"] - FIGURES["preprocess_s"]
    assert printed["stats"]["ttft_s"] == pytest.approx(FIGURES["ttft_s"] + opening_s)


def test_stats_go_to_standard_error(library: Library, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--stats", "What?"]) == 0
    out, err = capsys.readouterr()
    assert out == "It is a cat.\n"
    for name in ("load", "preprocess", "encode", "project", "prefill", "decode", "peak memory"):
        assert any(line.startswith(name) for line in err.splitlines())


def test_the_table_of_figures() -> None:
    assert stats_table(FIGURES).splitlines() == [
        "load                 0.0 ms",
        "preprocess           250.0 ms",
        "encode               1.50 s",
        "project              1.0 ms",
        "prefill              500.0 ms",
        "time to first token  2.25 s (without load)",
        "decode               12.3 tokens/s",
        "prompt               40 tokens, 16 of them visual",
        "answer               2 tokens",
        "peak memory          123.5 MB",
    ]


def test_sampling_options_without_temperature_are_remarked_on(
    library: Library, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "--top-p", "0.9", "What?"]) == 0
    assert capsys.readouterr().err.startswith("note: --top-p")


def test_an_empty_answer_prints_nothing_but_its_line(
    library: Library, capsys: pytest.CaptureFixture[str]
) -> None:
    library.pieces = ("",)
    assert main(["generate", "What?"]) == 0
    assert capsys.readouterr().out == "\n"


def test_an_error_of_the_library_keeps_its_status(
    library: Library, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path, dtype: str) -> None:
        raise CheckpointError("model.safetensors lacks\nlayers.3")

    monkeypatch.setattr(fastvlm_mlx, "load", refuse)
    assert main(["generate", "What?"]) == 1
    assert capsys.readouterr() == ("", "error: model.safetensors lacks layers.3\n")


def test_a_bad_picture_is_told_before_the_model_is_loaded(
    library: Library, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    assert main(["generate", "--image", str(tmp_path / "broken.png"), "What?"]) == 2
    assert library.loaded == []
    assert capsys.readouterr().err.startswith("error: ")
