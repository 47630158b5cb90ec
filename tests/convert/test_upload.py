"""Uploading to a stand-in of the hub on this machine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from fastvlm_mlx.convert.upload import check_repo, plan_upload, upload
from hub_stand_in import COMMIT, StandIn, standing_in

from fastvlm_mlx.errors import HubError, UsageError

REPO = "somebody/FastVLM-tiny-4bit"
TOKEN = "hf_notarealtoken"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tiny.write(tmp_path_factory.mktemp("upload") / "model")
    (made / "README.md").write_text("# A model card\n")
    (made / ".secret").write_text("stays here")
    (made / "notes.pdf").write_text("stays here too")
    return made


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    from huggingface_hub import _commit_api, constants, hf_api
    from huggingface_hub.utils import _http, _runtime

    with standing_in() as served:
        # What HF_ENDPOINT, HF_TOKEN and HF_HUB_DISABLE_XET set before the first import.
        for module in (constants, hf_api):
            if hasattr(module, "ENDPOINT"):
                monkeypatch.setattr(module, "ENDPOINT", served.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        for module in (_runtime, _commit_api, hf_api):
            monkeypatch.setattr(module, "is_xet_available", lambda: False)
        # Its waiting between attempts, up to 8 s each, is not what is tested.
        monkeypatch.setattr(_http.time, "sleep", lambda _: None)
        yield served


def line(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text
    return text


def test_a_whole_upload(hub: StandIn, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    asked: list[str] = []
    plan = plan_upload(folder, REPO)
    done = upload(plan, confirm=lambda question: bool(asked.append(question)) or True)
    assert len(asked) == 1
    assert hub.steps == ["create", "preupload", "batch", "put", "verify", "commit"]
    assert f"{hub.created['organization']}/{hub.created['name']}" == REPO
    assert hub.created["visibility"] == "private"
    assert hub.tokens == {f"Bearer {TOKEN}"}
    expected = {n: (folder / n).read_bytes() for n in plan.files}
    assert hub.files == expected
    assert {"config.json", "tokenizer.json", "model.safetensors", "README.md"} <= set(expected)
    assert ".secret" not in expected and "notes.pdf" not in expected
    assert (done.commit, done.files, done.bytes) == (COMMIT, len(expected), plan.bytes)
    assert done.url == f"{hub.url}/{REPO}"
    assert hub.summary == "Converted with fastvlm-mlx"
    assert capfd.readouterr() == ("", "")  # no bars where nobody looks


def test_the_question_says_what_would_happen(folder: Path) -> None:
    question = plan_upload(folder, REPO).question()
    assert REPO in question and "private" in question and "MB" in question
    assert "notes.pdf stay here" in question
    assert ".secret" not in question
    assert "PUBLIC" in plan_upload(folder, REPO, private=False).question()


def test_public_has_to_be_asked_for(hub: StandIn, folder: Path) -> None:
    upload(plan_upload(folder, REPO, private=False), confirm=None)
    assert hub.created["visibility"] == "public"


def test_no_means_no_call_at_all(hub: StandIn, folder: Path) -> None:
    with pytest.raises(UsageError, match=r"not uploaded; .* stays as it is"):
        upload(plan_upload(folder, REPO), confirm=lambda _: False)
    assert hub.steps == []


def test_a_repository_that_exists_is_written_to(hub: StandIn, folder: Path) -> None:
    hub.exists = True
    assert upload(plan_upload(folder, REPO), confirm=None).commit == COMMIT


@pytest.mark.parametrize(
    ("step", "status", "says"),
    [
        ("create", 401, "does not know who is uploading"),
        ("create", 403, "may not write to"),
        ("create", 404, "no owner somebody"),
        ("create", 500, "failed on somebody/FastVLM-tiny-4bit (status 500)"),
        ("preupload", 403, "may not write to"),
        ("preupload", 404, "the hub has no somebody/FastVLM-tiny-4bit"),
        ("preupload", 429, "asks to slow down"),
        ("batch", 413, "too large"),
        ("put", 403, "may not write to"),
        ("put", 503, "status 503"),
        ("verify", 400, "refuses the upload"),
        ("commit", 409, "changed by someone else meanwhile"),
        ("commit", 412, "changed by someone else meanwhile"),
        ("commit", 400, "refuses the upload"),
    ],
)
def test_what_the_hub_objects_to_is_one_line(
    hub: StandIn, folder: Path, step: str, status: int, says: str
) -> None:
    hub.fail[step] = status
    with pytest.raises(HubError) as caught:
        upload(plan_upload(folder, REPO), confirm=None)
    text = line(caught.value)
    assert says in text
    assert TOKEN not in text
    assert hub.files == {}  # what is not committed is not there


@pytest.mark.parametrize("step", ["create", "put", "commit"])
def test_a_cut_connection_and_going_on(hub: StandIn, folder: Path, step: str) -> None:
    hub.fail[step] = "drop"
    with pytest.raises(HubError, match="was cut off") as caught:
        upload(plan_upload(folder, REPO), confirm=None)
    assert "the same command goes on" in line(caught.value)
    assert hub.files == {}
    hub.fail.clear()
    sent = len(hub.blobs)
    hub.steps.clear()
    upload(plan_upload(folder, REPO), confirm=None)
    assert hub.files.keys() == plan_upload(folder, REPO).files.keys()
    assert ("put" in hub.steps) == (sent == 0)  # what has arrived is not sent again


def test_nobody_answers(hub: StandIn, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants, hf_api

    for module in (constants, hf_api):
        if hasattr(module, "ENDPOINT"):
            monkeypatch.setattr(module, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="was cut off"):
        upload(plan_upload(folder, REPO), confirm=None)


def test_offline_is_respected_unless_it_was_our_own(
    hub: StandIn, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE forbids it"):
        upload(plan_upload(folder, REPO), confirm=None)
    assert hub.steps == []
    upload(plan_upload(folder, REPO), confirm=None, ignore_offline=True)
    assert hub.steps[-1] == "commit"
    assert constants.HF_HUB_OFFLINE is True


def test_an_interruption_leaves_nothing(
    hub: StandIn, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import HfApi

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(HfApi, "upload_folder", interrupt)
    with pytest.raises(KeyboardInterrupt):
        upload(plan_upload(folder, REPO), confirm=None)
    assert hub.files == {}


def test_what_is_no_hub_is_said_to_be_none(hub: StandIn, folder: Path) -> None:
    hub.fail["preupload"] = 200  # an answer of the wrong shape
    with pytest.raises(HubError, match="did not answer as a hub does"):
        upload(plan_upload(folder, REPO), confirm=None)


@pytest.mark.parametrize(
    "name",
    ["FastVLM", "a/b/c", "a b/c", "-a/b", "a/b-", "a/..", "a/x--y", "a/b.git", "", "a/" * 60],
)
def test_wrong_names_are_refused_before_anything(name: str) -> None:
    with pytest.raises(UsageError, match="OWNER/NAME"):
        check_repo(name)


def test_half_a_model_is_not_sent(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "model", shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(HubError, match=r"no complete model, model-00002-of-00002\.safetensors"):
        plan_upload(folder, REPO)
    with pytest.raises(UsageError, match="there is no folder"):
        plan_upload(tmp_path / "nowhere", REPO)


def test_the_clock_of_the_tests_is_the_real_one() -> None:
    """Guards the fixture above: nothing stays patched."""
    began = time.monotonic()
    time.sleep(0.01)
    assert time.monotonic() - began >= 0.009
