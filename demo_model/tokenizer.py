"""The demo model's tokenizer: byte-level BPE in Qwen2's manner, with about a thousand tokens.

No text in capitals is in the corpus that the merges are learned from, so a word in capitals is
spelled letter by letter, and reading a word means naming its letters. Digits are single tokens.
"""

from __future__ import annotations

import itertools

import numpy as np
import questions
import vocabulary
from scenes import Item, Scene
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")
VOCAB_SIZE = 1024
SYSTEM = "You are a helpful assistant."
_MAX_LENGTH = 2048
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _corpus(sentences: int = 5000) -> itertools.chain[str]:
    """Questions and answers about made-up scenes, and the fixed words often enough to be merged."""
    rng = np.random.default_rng(0)
    names = [*vocabulary.OBJECTS, *vocabulary.SHAPES]
    colours = list(vocabulary.COLOURS)
    lines = []
    for _ in range(sentences):
        scene = Scene(background=str(rng.choice(colours)) if rng.random() < 0.7 else None)
        name = str(rng.choice(names))
        shape = name in vocabulary.SHAPES
        for _ in range(int(rng.integers(1, 4))):
            x, y = rng.random(2)
            scene.items.append(Item(name, shape, str(rng.choice(colours)), x, y, 0.3))
        for kind in ("name", "colour", "count", "where", "yesno", "describe", "read"):
            turn = questions.ask(rng, scene, kind)
            if turn is not None:
                lines.append(f"{questions.restyle(rng, turn.question)}\n{turn.answer}")
        talk = questions.small_talk(rng)
        lines.append(f"{talk.question}\n{talk.answer}")
    fixed = [f"system\n{SYSTEM}", "user\n", "assistant\n"] * 500
    return itertools.chain(lines, fixed)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Learn the merges and return the tokenizer with its chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL),
        min_frequency=5,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>", "<image>"],
        model_max_length=_MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Ids of the special tokens."""
    return {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}


def prompt(question: str, images: int = 1) -> str:
    """The first turn's prompt, ending where the answer begins."""
    pictures = "<image>\n" * images
    return (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
        f"<|im_start|>user\n{pictures}{question}<|im_end|>\n<|im_start|>assistant\n"
    )


def follow_up(question: str) -> str:
    """A later turn's prompt; it comes after the answer's `<|im_end|>`."""
    return f"\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def encode(tokenizer: PreTrainedTokenizerFast, text: str, per_image: int) -> list[int]:
    """Token ids; each side of `<image>` is tokenised on its own and the mark is repeated."""
    image = tokenizer.convert_tokens_to_ids("<image>")
    ids: list[int] = []
    for i, part in enumerate(text.split("<image>")):
        if i:
            ids += [image] * per_image
        ids += tokenizer.encode(part, add_special_tokens=False)
    return ids
