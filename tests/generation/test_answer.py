"""Answers: what streams out, when it ends, what it costs, what it refuses."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny
from PIL import Image

from fastvlm_mlx import load
from fastvlm_mlx.errors import FastVLMError, PictureError, PromptError, UsageError
from fastvlm_mlx.generation import Response, Stats, generate, stream_generate
from fastvlm_mlx.models.fastvlm import FastVLM
from fastvlm_mlx.processing.processor import Processor

Loaded = tuple[FastVLM, Processor]
N = tiny.PICTURE_TOKENS


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load(tiny.write(tmp_path_factory.mktemp("tiny")))


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray((tiny.pictures(1, 96, seed)[0] * 255).astype(np.uint8))


@pytest.fixture
def says(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have the language model say certain tokens, one after the other."""

    def script(tokens: Sequence[int]) -> None:
        def steps(*_: Any, **options: Any) -> Iterator[tuple[int, mx.array]]:
            for token in tokens[: options["max_tokens"]]:
                yield token, mx.zeros(tiny.VOCABULARY)

        # The package's attribute of this name is a function; the module is meant.
        monkeypatch.setattr(sys.modules["mlx_lm.generate"], "generate_step", steps)

    return script


def stream(
    loaded: Loaded, prompt: Any = "Hi", images: Any = None, **options: Any
) -> list[Response]:
    return list(stream_generate(*loaded, prompt, images, **options))


# The stream ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pictures", [0, 1, 2])
def test_the_whole_is_the_sum_of_the_pieces(loaded: Loaded, pictures: int) -> None:
    images = [picture(i) for i in range(pictures)]
    responses = stream(loaded, images=images, max_tokens=8)
    whole = generate(*loaded, "Hi", images, max_tokens=8)
    assert "".join(r.text for r in responses) == whole
    tokens = [r.token for r in responses]
    assert loaded[1].tokenizer.decode(tokens).rstrip("\ufffd").strip() == whole.strip()
    assert [r.finish_reason for r in responses[:-1]] == [None] * (len(responses) - 1)
    assert responses[-1].finish_reason == "length" and len(responses) == 8


def test_the_picture_is_looked_at(loaded: Loaded) -> None:
    answers = {
        tuple(r.token for r in stream(loaded, images=[picture(seed)], max_tokens=8))
        for seed in range(6)
    }
    assert len(answers) > 1


def test_order_of_pictures(loaded: Loaded) -> None:
    """Which picture is first matters, and the prompt says where each goes."""
    model, processor = loaded
    prompts = [processor.prompt("<image> or <image>?", [N, N]).token_ids] * 2
    orders = [[picture(1), picture(2)], [picture(2), picture(1)]]
    rows = []
    for ids, images in zip(prompts, orders, strict=True):
        pixels = [mx.array(p) for p in processor.pixels(images)]
        rows.append(np.array(model(mx.array([ids]), pixel_values=pixels)[0, -1]))
    assert np.abs(rows[0] - rows[1]).max() > 1e-4


@pytest.mark.parametrize("text", ["é", "日本", "🐈 cat", "a\u0301", "naïve 🇨🇭"])
def test_characters_come_whole(loaded: Loaded, says: Any, text: str) -> None:
    """A token here is a byte: nothing may come out before a character's last one."""
    says([*loaded[1].tokenizer.encode(text, add_special_tokens=False), tiny.IM_END])
    pieces = [r.text for r in stream(loaded)]
    assert "".join(pieces) == loaded[1].tokenizer.decode(
        loaded[1].tokenizer.encode(text, add_special_tokens=False)
    )
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > len([piece for piece in pieces if piece])


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_an_answer_cut_off_within_a_character(loaded: Loaded, says: Any, cut: int) -> None:
    cat = loaded[1].tokenizer.encode("ok🐈", add_special_tokens=False)
    says([*cat, tiny.IM_END])
    responses = stream(loaded, max_tokens=len(cat) - cut)
    assert "".join(r.text for r in responses) == "ok"
    assert responses[-1].finish_reason == "length"


def test_a_line_feed_and_blanks_are_kept(loaded: Loaded, says: Any) -> None:
    text = "a  b\n\n c \n"
    says([*loaded[1].tokenizer.encode(text, add_special_tokens=False), tiny.IM_END])
    assert generate(*loaded, "Hi") == text


# Ends ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [tiny.IM_END, tiny.ENDOFTEXT])
def test_every_end_stops(loaded: Loaded, says: Any, end: int) -> None:
    """config.json and the tokenizer say one, generation_config.json the other."""
    says([65, 66, end, 67, 68])
    responses = stream(loaded)
    assert [r.token for r in responses] == [65, 66, end]
    assert [r.finish_reason for r in responses] == [None, None, "stop"]
    assert "<|" not in "".join(r.text for r in responses)


def test_an_end_at_once(loaded: Loaded, says: Any) -> None:
    says([tiny.IM_END])
    (only,) = stream(loaded)
    assert only.text == "" and only.finish_reason == "stop" and only.stats is not None


def test_an_end_on_the_last_token(loaded: Loaded, says: Any) -> None:
    says([65, tiny.IM_END])
    assert stream(loaded, max_tokens=2)[-1].finish_reason == "stop"


# Costs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pictures", [0, 2])
def test_stats(loaded: Loaded, pictures: int) -> None:
    responses = stream(loaded, images=[picture(i) for i in range(pictures)], max_tokens=5)
    assert all(r.stats is None for r in responses[:-1])
    stats = responses[-1].stats
    assert isinstance(stats, Stats)
    assert stats.visual_tokens == pictures * N
    assert stats.generated_tokens == len(responses) == 5
    ids = loaded[1].prompt("Hi", [N] * pictures).token_ids
    assert stats.prompt_tokens == len(ids)
    parts = (stats.preprocess_s, stats.encode_s, stats.project_s, stats.prefill_s)
    assert all(part >= 0 for part in parts) and stats.prefill_s > 0
    assert stats.ttft_s == pytest.approx(sum(parts))
    assert (stats.encode_s > 1e-4) == bool(pictures)
    assert stats.decode_tokens_per_s > 0 and math.isfinite(stats.decode_tokens_per_s)
    assert stats.peak_memory_bytes > 0
    assert stats.load_s == 0
    assert stats.to_dict()["ttft_s"] == stats.ttft_s
    assert set(stats.to_dict()) == {*vars(stats), "ttft_s"}


def test_stats_of_one_token(loaded: Loaded) -> None:
    """There is no rate of decoding where only the prompt's own token came."""
    stats = stream(loaded, max_tokens=1)[-1].stats
    assert stats is not None and stats.decode_tokens_per_s == 0 and stats.generated_tokens == 1


def test_a_picture_is_encoded_once(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = loaded
    calls: list[tuple[int, ...]] = []
    tower = type(model.vision_tower)
    original = tower.__call__

    def counted(self: Any, pixels: mx.array) -> Any:
        calls.append(pixels.shape)
        return original(self, pixels)

    monkeypatch.setattr(tower, "__call__", counted)
    stream(loaded, images=[picture(1), picture(2)], max_tokens=4)
    assert calls == [(2, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, 3)]
    stream(loaded, max_tokens=4)
    assert len(calls) == 1


# Options ------------------------------------------------------------------------------------------


def tokens(loaded: Loaded, **options: Any) -> list[int]:
    return [r.token for r in stream(loaded, max_tokens=16, **options)]


def test_seeds(loaded: Loaded) -> None:
    one = tokens(loaded, temperature=1.0, seed=1)
    assert tokens(loaded, temperature=1.0, seed=1) == one
    assert tokens(loaded, temperature=1.0, seed=2) != one


def test_greedy_needs_no_seed(loaded: Loaded) -> None:
    assert tokens(loaded) == tokens(loaded, seed=1)


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_choices_narrowed_to_one_are_greedy(loaded: Loaded, options: dict[str, Any]) -> None:
    assert tokens(loaded, temperature=0.7, seed=3, **options) == tokens(loaded)


@pytest.mark.parametrize("top_k", [tiny.VOCABULARY - 1, tiny.VOCABULARY, 10**6])
def test_a_choice_among_more_than_there_are(loaded: Loaded, top_k: int) -> None:
    free = tokens(loaded, temperature=1.0, seed=1)
    assert (tokens(loaded, temperature=1.0, seed=1, top_k=top_k) == free) or top_k < tiny.VOCABULARY


def test_repetition_penalty(loaded: Loaded) -> None:
    assert len(set(tokens(loaded, repetition_penalty=5.0))) > len(set(tokens(loaded)))


def test_system(loaded: Loaded) -> None:
    plain = stream(loaded, max_tokens=1)[-1].stats
    short = stream(loaded, max_tokens=1, system="")[-1].stats
    assert plain is not None and short is not None
    difference = plain.prompt_tokens - short.prompt_tokens
    text = "You are a helpful assistant."
    assert difference == len(loaded[1].tokenizer.encode(text, add_special_tokens=False))


def test_options_of_mlx_lm(loaded: Loaded) -> None:
    cache = loaded[0].make_cache()
    expected = tokens(loaded)
    assert tokens(loaded, prompt_cache=cache, prefill_step_size=3) == expected
    assert cache[0].offset > len(loaded[1].prompt("Hi").token_ids)


NOT_POSSIBLE: list[dict[str, Any]] = [
    {"temperature": -0.1},
    {"temperature": math.nan},
    {"top_p": -0.1},
    {"top_p": 1.1},
    {"top_p": math.nan},
    {"top_k": -1},
    {"min_p": -0.1},
    {"min_p": 2},
    {"repetition_penalty": 0},
    {"repetition_penalty": -1.0},
    {"seed": -1},
    {"seed": 2**64},
    {"max_tokens": 0},
    {"max_tokens": -1},
]


@pytest.mark.parametrize("options", NOT_POSSIBLE)
def test_options_out_of_range(loaded: Loaded, options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(UsageError, match=f"{name} .* out of range"):
        next(stream_generate(*loaded, "Hi", **options))


@pytest.mark.parametrize(
    ("prompt", "images", "kind"),
    [
        ("Hi", ["no such file.png"], PictureError),
        ("Hi", [b"no picture"], PictureError),
        ("<image>", [], PromptError),
        ("<image>", ["picture", "picture"], PromptError),
        ([], [], PromptError),
        ("x" * 1000, [], PromptError),
    ],
)
def test_refused_before_any_token(
    loaded: Loaded, prompt: Any, images: list[Any], kind: type[FastVLMError]
) -> None:
    images = [picture() if image == "picture" else image for image in images]
    with pytest.raises(kind):
        next(stream_generate(*loaded, prompt, images))


def test_messages(loaded: Loaded) -> None:
    """A conversation with a picture in it, as parts and as a mark, is the same prompt."""
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    images = [picture()]
    expected = generate(*loaded, "What?", images, max_tokens=6)
    for content in (parts, "<image>\nWhat?", "What?"):
        turns = [{"role": "user", "content": content}]
        assert generate(*loaded, turns, images, max_tokens=6) == expected


def test_images_may_be_any_sequence(loaded: Loaded) -> None:
    expected = generate(*loaded, "Hi", [picture()], max_tokens=4)
    assert generate(*loaded, "Hi", (np.asarray(picture()),), max_tokens=4) == expected
