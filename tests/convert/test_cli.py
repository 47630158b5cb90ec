"""`fastvlm-mlx convert` as a person uses it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from convert_helpers import leftovers
from fastvlm_mlx.convert import ConvertOptions, convert
from fastvlm_mlx.convert.options import parse_size

from fastvlm_mlx.cli import main
from fastvlm_mlx.cli.convert import EXAMPLES, report_text
from fastvlm_mlx.errors import UsageError


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("source") / "FastVLM-tiny")


@pytest.fixture(autouse=True)
def keep_signals() -> object:
    """The command handles SIGTERM; the tests' own process must not go on doing so."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_it_says_what_it_did(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "convert",
        str(source),
        str(tmp_path / "t"),
        "--bits",
        "4",
        "--keep",
        "embed_tokens",
    ]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    for words in (
        "language_model",
        "bits per weight",
        "total",
        "kept      language_model.model.embed",
    ):
        assert words in out
    assert f"written   {tmp_path / 't'} in " in out
    assert err == ""  # no bar: this is no terminal


def test_json(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(source), str(tmp_path / "t"), "--json", "--dtype", "bfloat16"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["parts"]["language_model"]["bits_per_weight"] == 16
    assert report["source_layout"] == "llava"
    assert set(report["files"]) == {p.name for p in (tmp_path / "t").iterdir()}


def test_verifying(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["convert", str(source), str(tmp_path / "t"), "--verify", "--no-reference"]
    assert main(arguments) == 0
    assert "the same within tolerance" in capsys.readouterr().out
    card = (tmp_path / "t" / "README.md").read_text()
    assert "Compared with the source" in card and "logits" in card
    assert str(tmp_path) not in card


def test_a_result_that_fails_the_check_is_not_put_in_place(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fastvlm_mlx.convert import verify

    impossible = dict.fromkeys(verify.LIMITS_DB, 1000.0)
    monkeypatch.setattr(verify, "LIMITS_DB", impossible)
    arguments = ["convert", str(source), str(tmp_path / "t"), "--bits", "2", "--verify"]
    assert main([*arguments, "--no-reference"]) == 1
    out, err = capsys.readouterr()
    assert "TOO FAR" in out
    assert err.startswith("error: ") and "not put in place" in err
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "status", "why"),
    [
        (["--bits", "7"], 2, "--bits 7 is not known; choose from 2, 3, 4, 5, 6, 8"),
        (["--bits", "4", "--dequantize"], 2, "contradict"),
        (["--shard-size", "big"], 2, "is not a size"),
        (["--upload-repo", "nobody"], 2, "OWNER/NAME"),
        (["--base", "x"], 2, "is a whole model"),
        (["--encoder", "./nowhere"], 1, "there is no folder ./nowhere"),
        (["--bits", "4", "--keep", "nothing"], 2, "--keep nothing"),
    ],
)
def test_errors_are_one_line(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    why: str,
) -> None:
    assert main(["convert", str(source), str(tmp_path / "t"), *arguments]) == status
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert why in err
    assert leftovers(tmp_path) == []


def test_the_help_has_every_option_of_its_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "--help"]) == 0
    words = [word for line in EXAMPLES.splitlines() for word in line.split()]
    options = {word for word in words if word.startswith("--")}
    out = capsys.readouterr().out
    assert len(options) > 5
    for option in options:
        assert f"{option} " in out.partition("Examples:")[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_being_stopped_tidies_up(source: Path, tmp_path: Path, number: signal.Signals) -> None:
    code = (
        "import sys, time\n"
        "from fastvlm_mlx.convert import writer\n"
        "plain = writer._write\n"
        "def slow(*a):\n"
        "    print('writing', flush=True); time.sleep(0.2); plain(*a)\n"
        "writer._write = slow\n"
        "from fastvlm_mlx.cli import main\n"
        "sys.exit(main(['convert', *sys.argv[1:]]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(source), str(tmp_path / "t")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert leftovers(tmp_path) == []


def test_sizes() -> None:
    assert parse_size("5GB") == 5_000_000_000
    assert parse_size("1.5 GiB") == 3 << 29
    assert parse_size("250m") == 250_000_000
    assert parse_size("12345") == 12345
    for wrong in ("", "GB", "5 apples", "-1GB", "1e9"):
        with pytest.raises(UsageError):
            parse_size(wrong)


def test_the_report_in_words(source: Path, tmp_path: Path) -> None:
    report = convert(source, tmp_path / "t", ConvertOptions(bits=4, group_size=128))
    text = report_text(report)
    assert "layers (language_model.model.embed_tokens, ...): its width 64 is no multiple" in text
    assert "1 file of weights, from the llava layout" in text
