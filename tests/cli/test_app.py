"""The command line as a whole: help, version, errors, completion, and how little it imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cli_process import RunCommand, environment, one_line_error, program

from fastvlm_mlx import __version__
from fastvlm_mlx.cli.app import COMMANDS, _take_debug

HEAVY = ("mlx", "numpy", "PIL", "transformers", "huggingface_hub", "rich", "mlx_lm")
COMMAND_NAMES = [entry.name for entry in COMMANDS]


def test_help_lists_every_command(run: RunCommand) -> None:
    result = run("--help")
    assert result.returncode == 0
    assert result.stderr == ""
    for entry in COMMANDS:
        assert f"{entry.name} " in result.stdout
        assert entry.help in result.stdout


def test_no_arguments_shows_the_help(run: RunCommand) -> None:
    assert run().stdout == run("--help").stdout


@pytest.mark.parametrize("name", COMMAND_NAMES)
def test_help_of_each_command_teaches_by_example(run: RunCommand, name: str) -> None:
    result = run(name, "--help")
    assert result.returncode == 0
    assert f"  fastvlm-mlx {name}" in result.stdout.split("Examples:")[1]


def test_version(run: RunCommand) -> None:
    assert run("--version").stdout == f"fastvlm-mlx {__version__}\n"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["generate", "--help"], ["generate"]]
)
def test_nothing_heavy_is_imported_for_help_or_wrong_usage(
    arguments: list[str], tmp_path: Path
) -> None:
    script = (
        "import sys\n"
        "from fastvlm_mlx.cli import main\n"
        f"main({arguments!r})\n"
        f"print('IMPORTED', [name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=environment(tmp_path),
        timeout=60,
    )
    assert "IMPORTED []" in result.stderr


def test_help_imports_no_module_of_a_command(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from fastvlm_mlx.cli import main\n"
        "main(['--help'])\n"
        "ours = {m for m in sys.modules if m.startswith('fastvlm_mlx.cli.')}\n"
        "print('IMPORTED', sorted(ours - {'fastvlm_mlx.cli.app'}))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=environment(tmp_path),
        timeout=60,
    )
    assert result.stdout.endswith("IMPORTED []\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--bogus"],
        ["generat"],
        ["generate"],
        ["generate", "--bogus", "x"],
        ["generate", "two", "questions"],
        ["generate", ""],
        ["generate", "--temp", "-0.1", "x"],
        ["generate", "--temp", "nan", "x"],
        ["generate", "--temp", "inf", "x"],
        ["generate", "--temp", "hot", "x"],
        ["generate", "--top-p", "1.01", "x"],
        ["generate", "--top-k", "-1", "x"],
        ["generate", "--min-p", "2", "x"],
        ["generate", "--max-tokens", "0", "x"],
        ["generate", "--repetition-penalty", "0", "x"],
        ["generate", "--seed", "-1", "x"],
        ["generate", "--seed", str(2**64), "x"],
        ["generate", "--dtype", "int3", "x"],
        ["generate", "--image", "-", "-"],
        ["generate", "--image", "-", "--image", "-", "x"],
        ["download"],
        ["info", "a", "b"],
    ],
)
def test_wrong_usage_is_one_line_and_exit_status_2(run: RunCommand, arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    one_line_error(result)


def test_a_mistyped_command_is_guessed(run: RunCommand) -> None:
    assert "generate" in one_line_error(run("generat"))


def test_missing_picture(run: RunCommand) -> None:
    result = run("generate", "--image", "nowhere.jpg", "What is this?")
    assert result.returncode == 2
    assert "nowhere.jpg" in one_line_error(result)


@pytest.mark.parametrize("place", ["before", "after"])
def test_debug_shows_the_traceback_wherever_it_stands(run: RunCommand, place: str) -> None:
    command = ["generate", "--image", "nowhere.jpg"]
    result = run(*(["--debug", *command] if place == "before" else [*command, "--debug"]))
    assert result.returncode == 2
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")


def test_debug_after_a_bare_double_dash_is_text() -> None:
    assert _take_debug(["generate", "--", "--debug"]) == (False, ["generate", "--", "--debug"])
    assert _take_debug(["generate", "--debug", "--", "x"]) == (True, ["generate", "--", "x"])


def test_an_unforeseen_error_is_one_line_too(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from fastvlm_mlx.cli import app, generate, main\n"
        "def broken(*a, **k): raise RuntimeError('first\\nsecond')\n"
        "generate._question = broken\n"
        "sys.exit(main(['generate', 'x']))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=environment(tmp_path),
        timeout=60,
    )
    assert result.returncode == 1
    assert (
        one_line_error(result)
        == "error: unexpected RuntimeError: first second (--debug shows where)"
    )


def test_ctrl_c_ends_without_a_traceback_and_keeps_the_answer(tmp_path: Path) -> None:
    # The real loop over the answer, with a generator that is interrupted where a person would.
    script = (
        "import sys\n"
        "from types import SimpleNamespace\n"
        "from fastvlm_mlx.cli import generate, main\n"
        "def answer():\n"
        "    yield SimpleNamespace(text='It is a', stats=None, finish_reason=None)\n"
        "    raise KeyboardInterrupt\n"
        "generate._question = lambda *a: generate._write(answer(), quiet=False)\n"
        "sys.exit(main(['generate', 'x']))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=environment(tmp_path),
        timeout=60,
    )
    assert result.returncode == 130
    assert result.stdout == "It is a\n"
    assert result.stderr == ""


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from types import SimpleNamespace\n"
        "from fastvlm_mlx.cli import generate, main\n"
        "def answer():\n"
        "    while True:\n"
        "        yield SimpleNamespace(text='word ' * 1000, stats=None, finish_reason=None)\n"
        "generate._question = lambda *a: generate._write(answer(), quiet=False)\n"
        "sys.exit(main(['generate', 'x']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(tmp_path),
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.read(4) == "word"
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    process.wait(timeout=60)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion(tmp_path: Path, shell: str) -> None:
    env = environment(tmp_path, _FASTVLM_MLX_COMPLETE=f"complete_{shell}")
    if shell == "bash":
        env |= {"COMP_WORDS": "fastvlm-mlx gen", "COMP_CWORD": "1"}
    else:
        env |= {
            "_TYPER_COMPLETE_ARGS": "fastvlm-mlx gen",
            "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        }
    result = subprocess.run(program(), capture_output=True, text=True, env=env, timeout=60)
    assert "generate" in result.stdout
    assert "doctor" not in result.stdout


def test_every_command_in_the_table_can_be_imported() -> None:
    import importlib

    for entry in COMMANDS:
        module = importlib.import_module(entry.module)
        assert callable(module.command)
        assert entry.name in module.EXAMPLES
