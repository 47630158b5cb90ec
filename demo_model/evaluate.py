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
_SCENES = {
    "name": "object",
    "count": "count",
    "where": "object",
    "read": "word",
    "relation": "pair",
}
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


def test_sets(sprites_path: Path, size: int, number: int) -> dict[str, list[Sample]]:
    """All the sets of samples that are reported, by title."""
    sprites = load_sprites(sprites_path)
    rng = np.random.default_rng(SEED)
    seen = SceneMaker(sprites, size, held_out_words=True)
    unseen = SceneMaker(sprites, size, held_out=True)
    known = set(seen.names)
    unseen.names = [name for name in unseen.names if name in known]

    def of(maker: SceneMaker, kind: str | None, text: float = 0.3) -> Callable:
        return lambda: maker.make(rng, kind, text_share=text)

    def is_word(scene: Scene, turn: Turn) -> bool:
        return bool(scene.text) and not scene.text.isdigit()

    def is_number(scene: Scene, turn: Turn) -> bool:
        return bool(scene.text) and scene.text.isdigit()

    return {
        "name an object": collect(of(seen, "object"), "name", number, rng),
        "name a shape and its colour": collect(of(seen, "shape"), "name", number // 2, rng),
        "colour": collect(of(seen, "shape"), "colour", number, rng),
        "colour, any scene": collect(of(seen, None), "colour", number, rng),
        "count, one to five": collect(
            of(seen, "count"), "count", number, rng, lambda s, t: t.answer != "None."
        ),
        "count, any scene": collect(of(seen, None), "count", number, rng),
        "where": collect(of(seen, "object"), "where", number, rng),
        "read a held-out word": collect(of(seen, "word"), "read", number, rng, is_word),
        "read a number": collect(of(seen, "word"), "read", number // 2, rng, is_number),
        "read a held-out word beside a thing": collect(
            of(seen, "object", 1.0), "read", number, rng, is_word
        ),
        "yes or no": collect(of(seen, None), "yesno", number, rng),
        "left, right, top, bottom": collect(of(seen, "pair"), "relation", number, rng),
        "name both of two": collect(of(seen, "pair"), "name", number, rng),
        "describe": collect(of(seen, None), "describe", number, rng),
        "name an unseen drawing": collect(of(unseen, "object"), "name", number, rng),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sprites", type=Path, default=Path("runs/sprites.npz"))
    parser.add_argument("--number", type=int, default=400, help="questions of each kind")
    parser.add_argument("--mistakes", type=int, default=0, help="show so many mistakes of each")
    parser.add_argument("--json", type=Path, help="also write the table here")
    options = parser.parse_args()
    answerer = Answerer(options.folder)
    results = {}
    print("| question | right | asked | accuracy |\n| --- | --- | --- | --- |")
    for title, samples in test_sets(options.sprites, answerer.size, options.number).items():
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
