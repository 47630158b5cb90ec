"""From a question or a conversation to the text of a prompt, with `<image>` where pictures belong.

The text is what the model was trained on, to the letter (LLaVA's `qwen_2` conversation in
apple/ml-fastvlm, llava/conversation.py, for the released models).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import PromptError

IMAGE_MARK = "<image>"

Message = dict[str, Any]  # {"role": "system" | "user" | "assistant", "content": str | parts}


@dataclass(frozen=True)
class ChatStyle:
    """The words around the turns of a conversation, for one family of language models."""

    system: str  # used where the conversation has no system message
    end: str  # the token that ends an answer
    render: Callable[[Sequence[Message]], str]


def _chatml(messages: Sequence[Message]) -> str:
    turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
    return "".join(turns) + "<|im_start|>assistant\n"


def _vicuna(messages: Sequence[Message]) -> str:
    names = {"user": "USER: {} ", "assistant": "ASSISTANT: {}</s>", "system": "{} "}
    return "".join(names[m["role"]].format(m["content"]) for m in messages) + "ASSISTANT:"


def _mistral(messages: Sequence[Message]) -> str:
    system, text = "", ""
    for message in messages:
        if message["role"] == "system":
            words = message["content"]
            system = f"<<SYS>>\n{words}\n<</SYS>>\n\n" if words else ""
        elif message["role"] == "user":
            text += f"[INST] {system}{message['content']} [/INST]"
            system = ""
        else:
            text += f" {message['content']} </s>"
    return text


# By mlx-lm's name of the language model.
CHAT_STYLES = {
    "qwen2": ChatStyle("You are a helpful assistant.", "<|im_end|>", _chatml),
    "llama": ChatStyle(
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        "</s>",
        _vicuna,
    ),
    "mistral": ChatStyle("", "</s>", _mistral),
}


def chat_style(text_model_type: str) -> ChatStyle:
    """The style of a language model; ChatML where the family is not known."""
    return CHAT_STYLES.get(text_model_type, CHAT_STYLES["qwen2"])


def as_messages(
    prompt: str | Sequence[Message], pictures: int, system: str | None, style: ChatStyle
) -> list[Message]:
    """A whole conversation with plain-text contents and exactly `pictures` picture marks.

    Marks that the text has stay where they are. With no mark at all, the pictures come before the
    first user turn's text, one a line, as in LLaVA.

    Raises:
        PromptError: nothing to say, malformed messages, or marks and pictures differ in number.
    """
    if isinstance(prompt, str):
        messages: list[Message] = [{"role": "user", "content": prompt}]
    else:
        messages = [_plain(message) for message in prompt]
    if not any(message["role"] == "user" for message in messages):
        raise PromptError("the conversation has no user message")
    if system is not None:
        messages = [m for m in messages if m["role"] != "system"]
        messages.insert(0, {"role": "system", "content": system})
    elif messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": style.system})
    marks = sum(message["content"].count(IMAGE_MARK) for message in messages)
    if marks == 0 and pictures:
        first = next(m for m in messages if m["role"] == "user")
        first["content"] = f"{IMAGE_MARK}\n" * pictures + first["content"]
    elif marks != pictures:
        raise PromptError(
            f"the prompt has {marks} {IMAGE_MARK} mark{'s' * (marks != 1)} for {pictures} "
            f"picture{'s' * (pictures != 1)}; give one mark a picture, or none at all"
        )
    return messages


def _plain(message: Any) -> Message:
    """One message with its parts (`{"type": "text" | "image"}`) joined to text with marks."""
    if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
        raise PromptError("each message needs a role of system, user or assistant, and a content")
    content = message.get("content")
    if isinstance(content, str):
        return {"role": message["role"], "content": content}
    if not isinstance(content, Sequence):
        raise PromptError(f"the content of a {message['role']} message is neither text nor parts")
    text = ""
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            text += part["text"]
        elif kind in ("image", "image_url", "input_image"):
            text += f"{IMAGE_MARK}\n"
        else:
            raise PromptError("a message part must be text or an image")
    return {"role": message["role"], "content": text}
