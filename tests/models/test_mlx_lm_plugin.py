"""FastVLM as an architecture of mlx-lm: its `load`, command line and server, with pictures."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx_lm
import numpy as np
import pytest
import tiny
from PIL import Image

from fastvlm_mlx.generation import generate
from fastvlm_mlx.loading import load_folder
from fastvlm_mlx.mlx_lm_plugin import MODEL_TYPES, register
from fastvlm_mlx.models.fastvlm import FastVLM
from fastvlm_mlx.processing.processor import Processor

processors = pytest.importorskip("mlx_lm.processors", reason="mlx-lm before 0.32 takes text alone")

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """For this test only: mlx-lm as it was afterwards."""
    monkeypatch.setattr(sys, "modules", sys.modules)
    for model_type in MODEL_TYPES:
        monkeypatch.setitem(sys.modules, f"mlx_lm.models.{model_type}", None)
    monkeypatch.setitem(processors.PROCESSORS, "fastvlm", None)
    register()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In mlx layout, with `<image>` in the tokenizer, as the converter writes it."""
    folder = tiny.write(tmp_path_factory.mktemp("tiny"), "mlx")
    tiny.write_tokenizer(folder, image_mark=True)
    config = json.loads((folder / "config.json").read_text())
    config["image_token_index"] = tiny.IM_END + 1
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def whole(text: str) -> str:
    """Without the mark that mlx-lm puts where an answer is cut off within a character."""
    return text.rstrip("\ufffd")


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray((tiny.pictures(1, 96, seed)[0] * 255).astype(np.uint8))


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("layout", ["llava", "mlx", "transformers"])
def test_load(tmp_path: Path, layout: str) -> None:
    model, tokenizer = mlx_lm.load(str(tiny.write(tmp_path, layout)))
    assert isinstance(model, FastVLM)
    ours, processor = load_folder(tmp_path)
    ids = processor.prompt("What is this?").token_ids
    theirs = mlx_lm.generate(model, tokenizer, ids, max_tokens=6)
    assert whole(theirs) == generate(ours, processor, "What is this?", max_tokens=6)


@pytest.mark.usefixtures("registered")
def test_processor(folder: Path) -> None:
    model, _, config = mlx_lm.load(str(folder), return_config=True)
    processor = processors.load_processor(model, config)
    assert isinstance(processor, Processor)
    assert processor.pictures == load_folder(folder)[1].pictures


def test_register_twice() -> None:
    """In a process of its own; and without it, mlx-lm does not know us."""
    code = (
        "from fastvlm_mlx.mlx_lm_plugin import register; register(); register()\n"
        "import mlx_lm.utils as u\n"
        "print(u._get_classes({'model_type': 'llava_qwen2'})[0].__name__)\n"
        "print(u._get_classes({'model_type': 'qwen2'})[0].__module__)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert out.stdout.split() == ["FastVLM", "mlx_lm.models.qwen2"], out.stderr


# The server ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "fastvlm_mlx.mlx_lm_plugin", "server"]
    command += ["--model", str(folder), "--port", str(port), "--temp", "0"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if process.poll() is not None:
                pytest.fail(f"the server ended: {process.stdout.read().decode()}")  # type: ignore[union-attr]
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).read()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def ask(server: str, messages: list[dict[str, Any]], tokens: int = 6) -> dict[str, Any]:
    body = {"messages": messages, "max_tokens": tokens, "temperature": 0}
    request = urllib.request.Request(
        f"{server}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        made: dict[str, Any] = json.load(answer)
    return made


def data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def with_picture(image: Image.Image, question: str) -> list[dict[str, Any]]:
    content = [
        {"type": "image_url", "image_url": {"url": data_url(image)}},
        {"type": "text", "text": question},
    ]
    return [{"role": "user", "content": content}]


def text(answer: dict[str, Any]) -> str:
    return whole(answer["choices"][0]["message"]["content"])


def test_a_picture_over_http(server: str, folder: Path) -> None:
    """The very answer that this package gives, and the picture's tokens counted."""
    model, processor = load_folder(folder)
    for seed in (1, 2):
        answer = ask(server, with_picture(picture(seed), "What is this?"))
        assert text(answer) == generate(
            model, processor, "What is this?", [picture(seed)], max_tokens=6
        )
        expected = processor.prompt("What is this?", [tiny.PICTURE_TOKENS])
        assert answer["usage"]["prompt_tokens"] == len(expected.token_ids)


def test_text_over_http(server: str, folder: Path) -> None:
    model, processor = load_folder(folder)
    answer = ask(server, [{"role": "user", "content": "Hello"}])
    assert text(answer) == generate(model, processor, "Hello", max_tokens=6)


def test_a_second_question_about_a_picture(server: str, folder: Path) -> None:
    """The server goes on from its cache, and does not take another picture's."""
    model, processor = load_folder(folder)
    first = with_picture(picture(1), "What is this?")
    turns = [
        *first,
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Sure?"},
    ]
    for seed in (1, 3):
        turns[0] = with_picture(picture(seed), "What is this?")[0]
        answer = ask(server, turns)
        assert text(answer) == generate(model, processor, turns, [picture(seed)], max_tokens=6)
