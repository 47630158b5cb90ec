"""One question, one answer: the road from pictures and words to text.

open_picture -> pixels -> vision_tower -> mm_projector -> embeddings -> mlx-lm -> text
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from ..errors import UsageError
from ..models.fastvlm import FastVLM
from ..processing.processor import Processor
from ..processing.prompt import Message
from .stats import Stats


@dataclass
class Response:
    """One step of an answer. `text` never ends within a character; `stats` comes with the last."""

    text: str
    token: int
    finish_reason: str | None = None  # None, "stop" or "length"
    stats: Stats | None = None


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Temperature 0 takes the likeliest."""

    temperature: float = 0.0
    top_p: float = 0.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        checks = {
            "temperature": self.temperature >= 0,
            "top_p": 0 <= self.top_p <= 1,
            "top_k": self.top_k >= 0,
            "min_p": 0 <= self.min_p <= 1,
            "repetition_penalty": self.repetition_penalty is None or self.repetition_penalty > 0,
            "seed": self.seed is None or 0 <= self.seed < 2**64,
        }
        for name, fine in checks.items():
            if not fine:
                raise UsageError(f"{name} {getattr(self, name)} is out of range")


def stream_generate(
    model: FastVLM,
    processor: Processor,
    prompt: str | Sequence[Message],
    images: Sequence[Any] | None = None,
    *,
    system: str | None = None,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 0.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float | None = None,
    seed: int | None = None,
    **mlx_lm_options: Any,
) -> Iterator[Response]:
    """Answer a prompt about pictures, piece by piece.

    Args:
        prompt: a question, or messages with roles and contents. `<image>` marks in it are where
            the pictures go, in order; without any they come before the first question.
        images: anything `open_picture` takes: paths, URLs, bytes, PIL pictures, arrays.
        system: replaces the model's usual system message; "" leaves it empty.
        mlx_lm_options: passed on to `mlx_lm.generate.generate_step` (`prompt_cache`,
            `max_kv_size`, `kv_bits`, `prefill_step_size`, ...).

    Raises:
        PictureError, PromptError, UsageError: before any token is made.
    """
    sampling = Sampling(temperature, top_p, top_k, min_p, repetition_penalty, seed)
    if max_tokens < 1:
        raise UsageError(f"max_tokens {max_tokens} is out of range; it must be 1 or more")
    stats = Stats()
    with _timed(stats, "preprocess_s"):
        pixels = [mx.array(picture) for picture in processor.pixels(images or [])]
    tokens = processor.prompt(
        prompt, [processor.visual_tokens(picture) for picture in pixels], system=system
    )
    with _timed(stats, "encode_s"):
        features = model.vision_features(pixels)
        mx.eval(features)
    with _timed(stats, "project_s"):
        visual_tokens = model.project(features)
        mx.eval(visual_tokens)
    stats.prompt_tokens, stats.visual_tokens = len(tokens.token_ids), tokens.visual_tokens
    yield from _decode(
        model,
        processor,
        tokens.token_ids,
        visual_tokens,
        sampling,
        max_tokens,
        stats,
        mlx_lm_options,
    )


def generate(
    model: FastVLM,
    processor: Processor,
    prompt: str | Sequence[Message],
    images: Sequence[Any] | None = None,
    **options: Any,
) -> str:
    """The whole answer as text. Options are those of `stream_generate`."""
    return "".join(r.text for r in stream_generate(model, processor, prompt, images, **options))


def _decode(
    model: FastVLM,
    processor: Processor,
    token_ids: list[int],
    visual_tokens: Sequence[mx.array],
    sampling: Sampling,
    max_tokens: int,
    stats: Stats,
    options: dict[str, Any],
) -> Iterator[Response]:
    """Hand the embedded prompt to mlx-lm, and count."""
    start = time.perf_counter()
    ids = mx.array(token_ids)
    embeddings = model.embed_inputs(ids, visual_tokens=visual_tokens)
    mx.eval(embeddings)  # mlx-lm prefills on a stream of its own
    if sampling.seed is not None:
        mx.random.seed(sampling.seed)
    # mlx-lm looks the prompt's ids up for penalties only; a picture's id may lie past the table.
    ids = mx.minimum(ids, model.config.text["vocab_size"] - 1)
    first: float | None = None
    steps = mlx_lm.stream_generate(
        model,
        processor.tokenizer,
        ids,
        max_tokens=max_tokens,
        sampler=make_sampler(
            temp=sampling.temperature,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            # mlx-lm refuses to choose among as many as there are, which is no choice.
            top_k=sampling.top_k if sampling.top_k < model.config.text["vocab_size"] else 0,
        ),
        logits_processors=make_logits_processors(repetition_penalty=sampling.repetition_penalty),
        input_embeddings=embeddings,
        **options,
    )
    for step in steps:
        now = time.perf_counter()
        if first is None:
            first = now
            stats.prefill_s = first - start
        # Cut off within a character: its first bytes come out as a replacement mark.
        text = step.text.rstrip("\ufffd") if step.finish_reason == "length" else step.text
        response = Response(text, step.token, step.finish_reason)
        if step.finish_reason is not None:
            stats.generated_tokens = step.generation_tokens
            if step.generation_tokens > 1:
                stats.decode_tokens_per_s = (step.generation_tokens - 1) / max(now - first, 1e-9)
            stats.peak_memory_bytes = mx.get_peak_memory()
            response.stats = stats
        yield response


@contextmanager
def _timed(stats: Stats, name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    setattr(stats, name, time.perf_counter() - start)
