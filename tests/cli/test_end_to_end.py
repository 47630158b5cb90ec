"""The whole road, from the command a person types to the bundled model's answer."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from cli_process import RunCommand, environment, one_line_error, program

QUESTION = "How many circles are there?"


@pytest.fixture
def circles(demo_model: Path, examples: Path) -> str:
    """A picture of three circles."""
    return str(examples / "shapes.png")


def test_the_first_command_of_the_readme(run: RunCommand, circles: str) -> None:
    result = run("generate", "--image", circles, QUESTION)
    assert result.returncode == 0, result.stderr
    assert "three" in result.stdout.lower()
    assert result.stdout.endswith("\n")
    (notice,) = result.stderr.splitlines()
    assert notice.startswith("note: using the small bundled demo model")
    assert notice.endswith("fastvlm-mlx download apple/FastVLM-0.5B")


def test_json(run: RunCommand, circles: str) -> None:
    result = run("generate", "--model", "demo", "--image", circles, "--json", QUESTION)
    assert result.stderr == ""
    printed = json.loads(result.stdout)
    assert "three" in printed["answer"].lower()
    assert printed["finish_reason"] == "stop"
    assert printed["pictures"] == [circles]
    stats = printed["stats"]
    assert stats["visual_tokens"] > 0
    assert stats["generated_tokens"] > 0
    parts = ("preprocess_s", "encode_s", "project_s", "prefill_s")
    assert stats["ttft_s"] == pytest.approx(sum(stats[part] for part in parts))


def test_stats(run: RunCommand, circles: str) -> None:
    result = run("generate", "--model", "demo", "--image", circles, "--stats", QUESTION)
    assert result.returncode == 0
    assert "time to first token" in result.stderr
    assert "time to first token" not in result.stdout


def test_a_picture_from_standard_input_answers_like_the_file(
    run: RunCommand, circles: str, tmp_path: Path
) -> None:
    from_file = run("generate", "--model", "demo", "--image", circles, QUESTION)
    piped = subprocess.run(
        [*program(), "generate", "--model", "demo", "--image", "-", QUESTION],
        input=Path(circles).read_bytes(),
        capture_output=True,
        env=environment(tmp_path),
        timeout=120,
    )
    assert piped.returncode == 0, piped.stderr
    assert piped.stdout.decode() == from_file.stdout


def test_a_length_limit(run: RunCommand, circles: str) -> None:
    result = run(
        "generate", "-m", "demo", "--image", circles, "--max-tokens", "1", "--json", QUESTION
    )
    printed = json.loads(result.stdout)
    assert printed["stats"]["generated_tokens"] == 1
    assert printed["finish_reason"] == "length"


def test_a_seed_makes_sampling_repeatable(run: RunCommand, circles: str) -> None:
    command = f"generate --model demo --image {circles} --temp 1.5 --seed 11".split()
    first, second = (run(*command, QUESTION) for _ in range(2))
    assert first.returncode == 0
    assert first.stdout == second.stdout


def test_the_variable_names_the_model(run: RunCommand, circles: str, demo_model: Path) -> None:
    result = run("generate", "--image", circles, QUESTION, env={"FASTVLM_MODEL": str(demo_model)})
    assert result.returncode == 0
    assert result.stderr == ""


@pytest.mark.parametrize("content", [b"", b"not a picture at all", b"\xff\xd8\xff\xe0 broken"])
def test_an_unreadable_picture(
    run: RunCommand, demo_model: Path, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "bad.jpg").write_bytes(content)
    result = run("generate", "--model", "demo", "--image", "bad.jpg", QUESTION)
    assert result.returncode == 2
    assert "bad.jpg" in one_line_error(result)


def test_a_folder_for_a_picture(run: RunCommand, demo_model: Path, tmp_path: Path) -> None:
    result = run("generate", "--model", "demo", "--image", str(tmp_path), QUESTION)
    assert result.returncode == 2
    one_line_error(result)


def test_info(run: RunCommand, demo_model: Path) -> None:
    result = run("info", "demo")
    assert result.returncode == 0, result.stderr
    for part in ("vision_tower", "mm_projector", "language_model", "memory needed"):
        assert part in result.stdout


def test_info_as_json(run: RunCommand, demo_model: Path) -> None:
    printed = json.loads(run("info", "demo", "--json").stdout)
    assert set(printed["parameters"]) == {"vision_tower", "mm_projector", "language_model"}
    assert printed["visual_tokens"] > 0
    assert printed["memory_bytes"] >= sum(printed["bytes"].values())


def test_doctor_finds_everything(run: RunCommand, demo_model: Path) -> None:
    result = run("doctor")
    assert result.returncode == 0, result.stdout
    assert result.stdout.endswith("Ready to answer.\n")
    assert "fastvlm-mlx download apple/FastVLM-0.5B" in result.stdout
