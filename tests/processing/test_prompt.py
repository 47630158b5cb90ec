"""The text of a prompt, letter for letter as the model was trained on it."""

from __future__ import annotations

from typing import Any

import pytest

from fastvlm_mlx.errors import PromptError
from fastvlm_mlx.processing.prompt import CHAT_STYLES, as_messages, chat_style

QWEN2 = chat_style("qwen2")


def text(prompt: Any, pictures: int = 0, system: str | None = None, style: str = "qwen2") -> str:
    chosen = chat_style(style)
    return chosen.render(as_messages(prompt, pictures, system, chosen))


# ChatML, as `conv_qwen_2` of apple/ml-fastvlm (llava/conversation.py) prints it -------------------


def test_one_picture() -> None:
    assert text("What is this?", 1) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<image>\nWhat is this?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_no_picture() -> None:
    assert text("Hello") == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_several_pictures_come_first() -> None:
    assert "user\n<image>\n<image>\nCompare.<|im_end|>" in text("Compare.", 2)


def test_marks_stay_where_they_are() -> None:
    assert "user\nThis <image> and <image>?<|im_end|>" in text("This <image> and <image>?", 2)
    assert "user\n<image>A<|im_end|>" in text("<image>A", 1)


@pytest.mark.parametrize("system", ["Be brief.", "", "Two\nlines"])
def test_system(system: str) -> None:
    assert text("Hello", system=system) == (
        f"<|im_start|>system\n{system}<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )


CONVERSATION = [
    {"role": "user", "content": "What is this?"},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "What colour?"},
]


def test_conversation() -> None:
    """Pictures go before the first question, not the last."""
    assert text(CONVERSATION, 1) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<image>\nWhat is this?<|im_end|>\n"
        "<|im_start|>assistant\nA cat.<|im_end|>\n"
        "<|im_start|>user\nWhat colour?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_marks_in_two_turns() -> None:
    turns = [
        {"role": "user", "content": "<image>\nFirst."},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "And <image>?"},
    ]
    assert text(turns, 2).count("<image>") == 2


def test_the_conversations_own_system_message() -> None:
    turns = [{"role": "system", "content": "Speak French."}, *CONVERSATION]
    assert text(turns).startswith("<|im_start|>system\nSpeak French.<|im_end|>\n<|im_start|>user")
    replaced = text(turns, system="Speak Latin.")
    assert "French" not in replaced and replaced.count("<|im_start|>system") == 1


def test_the_callers_messages_are_left_alone() -> None:
    turns = [dict(turn) for turn in CONVERSATION]
    text(turns, 2, system="Be brief.")
    assert turns == CONVERSATION


# Parts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "image",
    [
        {"type": "image"},
        {"type": "image_url", "image_url": {"url": "data:..."}},
        {"type": "input_image", "image_url": "data:..."},
    ],
)
def test_parts(image: dict[str, Any]) -> None:
    content = [{"type": "text", "text": "This: "}, image, {"type": "text", "text": "What is it?"}]
    made = text([{"role": "user", "content": content}], 1)
    assert "user\nThis: <image>\nWhat is it?<|im_end|>" in made


def test_parts_of_text_alone() -> None:
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert "user\nab<|im_end|>" in text([{"role": "user", "content": content}])


# Other language models, as `conv_vicuna_v1` and `conv_mistral_instruct` print them ----------------

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


def test_vicuna() -> None:
    assert text("What is this?", 1, style="llama") == (
        VICUNA + "USER: <image>\nWhat is this? ASSISTANT:"
    )
    assert text(CONVERSATION, style="llama") == (
        VICUNA + "USER: What is this? ASSISTANT: A cat.</s>USER: What colour? ASSISTANT:"
    )
    assert text("Hi", system="", style="llama") == " USER: Hi ASSISTANT:"


def test_mistral() -> None:
    assert text("What is this?", 1, style="mistral") == "[INST] <image>\nWhat is this? [/INST]"
    assert text(CONVERSATION, style="mistral") == (
        "[INST] What is this? [/INST] A cat. </s>[INST] What colour? [/INST]"
    )
    assert text("Hi", system="Be brief.", style="mistral") == (
        "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]"
    )


def test_an_unknown_family_speaks_chatml() -> None:
    assert chat_style("some_new_model") is CHAT_STYLES["qwen2"]


# Errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "pictures", "message"),
    [
        ("<image>", 0, "1 <image> mark for 0 pictures"),
        ("<image>", 2, "1 <image> mark for 2 pictures"),
        ("<image> <image>", 1, "2 <image> marks for 1 picture;"),
    ],
)
def test_marks_and_pictures_differ(prompt: str, pictures: int, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        as_messages(prompt, pictures, None, QWEN2)


@pytest.mark.parametrize(
    "prompt",
    [
        [],
        [{"role": "assistant", "content": "Hello"}],
        [{"role": "system", "content": "Hello"}],
        [{"role": "tool", "content": "Hello"}],
        [{"content": "Hello"}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": 7}],
        [{"role": "user", "content": ["Hello"]}],
        [{"role": "user", "content": [{"type": "audio"}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        ["Hello"],
        [None],
    ],
)
def test_malformed_conversations(prompt: Any) -> None:
    with pytest.raises(PromptError):
        as_messages(prompt, 0, None, QWEN2)
