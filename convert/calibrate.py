"""Quantisation that looks at pictures: mlx-lm's DWQ with visual tokens among the words.

DWQ (mlx_lm/quant/dwq.py) keeps the packed weights and trains their scales and biases until the
quantised model's next-token distribution is that of the whole one. mlx-lm's command feeds it text.
Its function, however, takes any model that maps ids to logits: here each visual token of the
calibration pictures has an id of its own, beyond the vocabulary, and a wrapper puts the projected
features in its place. What the whole model answers about each picture is what both are run on.

Unlike a plain conversion this holds both models in memory, and a training step's activations.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.quant.dwq import dwq_quantize
from mlx_lm.tuner.losses import kl_div_loss

from fastvlm_mlx import device
from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.errors import UsageError
from fastvlm_mlx.loading import cast, quantise_like
from fastvlm_mlx.models.fastvlm import build_language_model
from fastvlm_mlx.weights.files import open_tensors
from fastvlm_mlx.weights.layouts import LANGUAGE

from .joined import load_source
from .options import ConvertOptions
from .plan import stored_bytes
from .source import Source

PROMPTS = (
    "Describe the picture.",
    "What is in this picture?",
    "What is written in this picture?",
)
_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".heic")
_ANSWER = 64  # tokens
_HELD_OUT = 8  # one sample in so many is for judging, not for training
_SEED = 123
_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}

Sample = tuple[list[int], int]  # (ids, 0): the pair that mlx-lm's batches are made from


class PictureLM(nn.Module):
    """A language model that takes ids beyond its vocabulary as rows of `visual` (R, hidden)."""

    def __init__(self, language_model: nn.Module, visual: mx.array, words: int):
        super().__init__()
        self.language_model = language_model
        self._visual = visual
        self._words = words

    @property
    def layers(self) -> list[nn.Module]:
        return self.language_model.layers

    def __call__(self, ids: mx.array) -> mx.array:
        """(B, L) -> logits (B, L, vocabulary)."""
        is_picture = ids >= self._words
        embeddings = self.language_model.model.embed_tokens(mx.where(is_picture, 0, ids))
        rows = self._visual[mx.where(is_picture, ids - self._words, 0)].astype(embeddings.dtype)
        embeddings = mx.where(is_picture[..., None], rows, embeddings)
        return self.language_model(ids, input_embeddings=embeddings)


def find_pictures(folder: str | Path) -> list[Path]:
    """The pictures in a folder. Raises UsageError where there are none."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UsageError(f"--dwq {folder}: there is no such folder of pictures")
    found = sorted(f for f in folder.iterdir() if f.suffix.lower() in _PICTURES)
    if not found:
        raise UsageError(f"--dwq {folder}: there are no pictures in it")
    return found


def calibrate(
    source: Source, config: ModelConfig, folder: Path, dtype: str, options: ConvertOptions
) -> str:
    """Train the scales and biases of the quantised model in `folder`, and write them in place.

    Kept only if the held-out samples come closer to the whole model. Returns a line on that.
    """
    assert options.dwq is not None
    pictures = find_pictures(options.dwq)
    compute = device.default_dtype(_DTYPES[dtype])
    whole, processor = load_source(source, config)
    cast(whole, compute)
    samples, visual = _samples(whole, processor, pictures)
    words = whole.config.text["vocab_size"]
    teacher = PictureLM(whole.language_model, visual, words)
    student = PictureLM(_quantised(config, folder, compute), visual, words)
    del whole, processor
    held_out = samples[::_HELD_OUT]
    training = [s for i, s in enumerate(samples) if i % _HELD_OUT] or samples
    before = divergence(student, teacher, held_out)
    with _quiet():
        student.freeze()
        dwq_quantize(
            student,
            lambda batch, _index, split: teacher(batch),
            optimizers.Adam(learning_rate=options.dwq_rate, bias_correction=True),
            training * options.dwq_passes,
            held_out,
            batch_size=1,  # samples differ in length, and padding would be learnt from
            max_seq_length=config.max_length,
            seed=_SEED,
            dtype=compute,
        )
    student.eval()
    after = divergence(student, teacher, held_out)
    said = f"{len(pictures)} pictures: divergence from the whole model {before:.4g} -> {after:.4g}"
    if not after < before:
        return f"DWQ on {said}, no better, so the plain quantisation was kept"
    _write_back(student.language_model, folder)
    return f"DWQ on {said} (on samples it was not trained on)"


def divergence(student: PictureLM, teacher: PictureLM, samples: list[Sample]) -> float:
    """Mean Kullback-Leibler divergence a token, in nats."""
    total, count = 0.0, 0
    for ids, _ in samples:
        batch = mx.array([ids[:-1]])
        found, wanted = student(batch), teacher(batch)
        losses = kl_div_loss(found.astype(mx.float32), wanted.astype(mx.float32))
        total, count = total + float(losses.sum().item()), count + losses.size
    return total / count


def _samples(model: Any, processor: Any, pictures: list[Path]) -> tuple[list[Sample], mx.array]:
    """Conversations about each picture with the model's own answers, and all visual tokens."""
    words = model.config.text["vocab_size"]
    image = model.config.image_token_id
    samples: list[Sample] = []
    tables: list[mx.array] = []
    first = 0
    for picture in pictures:
        pixels = mx.array(processor.pixels([picture])[0])
        rows = model.project(model.vision_features([pixels]))[0]
        mx.eval(rows)
        count = rows.shape[0]
        for prompt in PROMPTS:
            ids = processor.prompt(prompt, [count]).token_ids
            embeddings = model.embed_inputs(mx.array(ids), visual_tokens=[rows])
            known = mx.minimum(mx.array(ids), words - 1)
            steps = generate_step(known, model, max_tokens=_ANSWER, input_embeddings=embeddings)
            answer = []
            for token, _ in steps:
                answer.append(int(token))
                if answer[-1] in processor.tokenizer.eos_token_ids:
                    break
            places = iter(range(words + first, words + first + count))
            samples.append(([next(places) if i == image else i for i in ids] + answer, 0))
        tables.append(rows)
        first += count
    return samples, mx.concatenate(tables)


def _quantised(config: ModelConfig, folder: Path, dtype: mx.Dtype) -> nn.Module:
    """The quantised language model of a converted folder."""
    model: Any = build_language_model(config.text)
    with open_tensors(folder) as tensors:
        parameters = {
            name.removeprefix(LANGUAGE): tensor.read()
            for name, tensor in tensors.items()
            if name.startswith(LANGUAGE)
        }
    quantise_like(model, parameters)
    model.load_weights(
        [(n, p.astype(dtype) if mx.issubdtype(p.dtype, mx.floating) else p)
         for n, p in parameters.items()]
    )  # fmt: skip
    model.eval()
    return model


def _write_back(model: nn.Module, folder: Path) -> None:
    """Overwrite scales and biases where they lie in the shards: same names, types, sizes."""
    own: dict[str, mx.array] = tree_flatten(model.parameters(), destination={})  # type: ignore[assignment]
    with open_tensors(folder) as tensors:
        places = {n: tensors[LANGUAGE + n] for n in own if n.endswith((".scales", ".biases"))}
    for name, place in places.items():
        if place.dtype == "U8":
            continue
        data = stored_bytes(own[name], place.dtype, place)
        with open(place.file, "r+b") as file:
            file.seek(place.offset)
            file.write(data)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """mlx-lm's bars and lines: on a terminal's standard error, and nowhere else."""
    with contextlib.ExitStack() as stack:
        shown: Any = sys.stderr
        if not sys.stderr.isatty():
            shown = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stderr(shown))
        stack.enter_context(contextlib.redirect_stdout(shown))
        yield
