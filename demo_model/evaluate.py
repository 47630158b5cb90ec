"""Measure an exported model with transformers' own `generate`, on pictures it never saw.

    python evaluate.py EXPORTED --number 400

Pictures come from a seed that training does not use and every word from the held-out part of the
dictionary. `unseen drawing` shows known nouns in renditions (by other artists) that were held out
of training. An answer is right if its text equals the expected one, whatever the letter case;
words must match in case, too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from model import STRIDE
from questions import Turn, ask
from scenes import Scene, SceneMaker
from sprites import load_sprites
from tokenizer import encode, prompt
from transformers import AutoTokenizer, FastVlmForConditionalGeneration

SEED = 987_654_321
Sample = tuple[np.ndarray, Turn]


class Answerer:
    """Answers questions about pictures in batches, greedily."""

    def __init__(self, folder: Path) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = FastVlmForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        self.model.eval().to(self.device)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        settings = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        self.size = settings["crop_size"]["height"]

    @torch.no_grad()
    def answer(self, samples: list[Sample], batch: int = 32) -> list[str]:
        """The model's answers, in the order of `samples`."""
        texts: list[str] = []
        pad = self.tokenizer.pad_token_id
        for start in range(0, len(samples), batch):
            part = samples[start : start + batch]
            rows = [
                encode(self.tokenizer, prompt(turn.question), (self.size // STRIDE) ** 2)
                for _, turn in part
            ]
            longest = max(map(len, rows))
            ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
            pixels = torch.from_numpy(np.stack([picture for picture, _ in part]))
            pixels = pixels.permute(0, 3, 1, 2).float() / 255
            out = self.model.generate(
                input_ids=ids.to(self.device),
                attention_mask=mask.to(self.device),
                pixel_values=pixels.to(self.device),
                max_new_tokens=40,
                do_sample=False,
            )
            texts += self.tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
        return [text.strip() for text in texts]


def collect(
    make: Callable[[], tuple[np.ndarray, Scene]],
    kind: str,
    number: int,
    rng: np.random.Generator,
    accept: Callable[[Scene, Turn], bool] = lambda scene, turn: True,
) -> list[Sample]:
    """`number` samples of one kind of question, in the plain wordings of `questions.py`."""
    samples: list[Sample] = []
    while len(samples) < number:
        picture, scene = make()
        turn = ask(rng, scene, kind)
        if turn is not None and accept(scene, turn):
            samples.append((picture, turn))
    return samples


def same(expected: str, answer: str) -> bool:
    """Text in capitals must match exactly, sentences whatever their letter case."""
    return answer == expected if expected.isupper() else answer.lower() == expected.lower()


@dataclass(frozen=True)
class Test:
    """One row of the report: which scenes, which kind of question, and which of those count."""

    title: str
    scenes: str | None  # kind of scene; None is the mixture that training uses
    kind: str
    text_share: float = 0.3
    accept: Callable[[Scene, Turn], bool] = lambda scene, turn: True
    held_out: bool = False


def _is_large(scene: Scene) -> bool:
    return scene.items[0].size > 0.6


def _is_word(scene: Scene, turn: Turn) -> bool:
    return scene.text is not None and not scene.text.isdigit()


def _is_number(scene: Scene, turn: Turn) -> bool:
    return scene.text is not None and scene.text.isdigit()


TESTS: tuple[Test, ...] = (
    Test("name an object", "object", "name"),
    Test("name a large object", "object", "name", 0.3, lambda scene, turn: _is_large(scene)),
    Test("name a shape and its colour", "shape", "name"),
    Test("colour of a shape, its ground or text", "shape", "colour"),
    Test("colour, any scene", None, "colour"),
    Test("count, one to five", "count", "count", 0.3, lambda scene, turn: turn.answer != "None."),
    Test("count, any scene", None, "count"),
    Test("where", "object", "where"),
    Test("read a held-out word", "word", "read", 0.3, _is_word),
    Test("read a number", "word", "read", 0.3, _is_number),
    Test("read a held-out word beside a thing", "object", "read", 1.0, _is_word),
    Test("yes or no", None, "yesno"),
    Test("left, right, top, bottom", "pair", "relation"),
    Test("name both of two", "pair", "name"),
    Test("describe", None, "describe"),
    Test("name an unseen drawing", "object", "name", 0.3, held_out=True),
)


class Sampler:
    """Makes the samples of each test from a seed of its own."""

    def __init__(self, sprites_path: Path, size: int) -> None:
        sprites = load_sprites(sprites_path)
        self.makers = {
            False: SceneMaker(sprites, size, held_out_words=True),
            True: SceneMaker(sprites, size, held_out=True),
        }

    def samples(self, test: Test, number: int) -> list[Sample]:
        """`number` samples of one test."""
        rng = np.random.default_rng((SEED, TESTS.index(test)))
        maker = self.makers[test.held_out]

        def make() -> tuple[np.ndarray, Scene]:
            return maker.make(rng, test.scenes, text_share=test.text_share)

        return collect(make, test.kind, number, rng, test.accept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sprites", type=Path, default=Path("runs/sprites.npz"))
    parser.add_argument("--number", type=int, default=400, help="questions of each kind")
    parser.add_argument("--mistakes", type=int, default=0, help="show so many mistakes of each")
    parser.add_argument("--only", default="", help="only the tests with this in their title")
    parser.add_argument("--parts", type=int, default=1, help="share the tests among so many runs")
    parser.add_argument("--part", type=int, default=0, help="which share this run does")
    parser.add_argument("--threads", type=int, help="of the processor; default: all")
    parser.add_argument("--json", type=Path, help="also write the table here")
    options = parser.parse_args()
    answerer = Answerer(options.folder)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    sampler = Sampler(options.sprites, answerer.size)
    results = {}
    print("| question | right | asked | accuracy |\n| --- | --- | --- | --- |")
    for index, test in enumerate(TESTS):
        if options.only not in test.title or index % options.parts != options.part:
            continue
        title, samples = test.title, sampler.samples(test, options.number)
        answers = answerer.answer(samples)
        wrong = [
            (turn, answer)
            for (_, turn), answer in zip(samples, answers, strict=True)
            if not same(turn.answer, answer)
        ]
        right = len(samples) - len(wrong)
        results[title] = {"right": right, "asked": len(samples)}
        print(
            f"| {title} | {right} | {len(samples)} | {100 * right / len(samples):.1f} % |",
            flush=True,
        )
        for turn, answer in wrong[: options.mistakes]:
            print(f"    {turn.question!r}: {turn.answer!r}, said {answer!r}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
