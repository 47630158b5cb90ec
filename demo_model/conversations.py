"""Training rows: pictures with a conversation about them, as token ids and labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from questions import Turn, conversation, small_talk, two_pictures
from scenes import Scene, SceneMaker
from tokenizer import encode, follow_up, prompt
from transformers import PreTrainedTokenizerFast

IGNORE = -100
# How likely each kind of question is to be drawn, also as the first turn.
WEIGHTS = {
    "name": 1.6,
    "colour": 1.0,
    "count": 1.1,
    "where": 0.9,
    "read": 1.8,
    "yesno": 1.0,
    "relation": 1.2,
    "describe": 0.8,
}
_TEXT_ONLY, _TWO_PICTURES = 0.03, 0.03


@dataclass
class Batch:
    """`ids`, `labels` (B, L) int64; `pictures` uint8 (N, s, s, 3) in the order of the marks."""

    ids: torch.Tensor
    labels: torch.Tensor
    pictures: torch.Tensor
    scenes: list[Scene]


class RowMaker:
    """Composes rows from one seeded generator."""

    def __init__(
        self, maker: SceneMaker, tokenizer: PreTrainedTokenizerFast, per_image: int
    ) -> None:
        self.maker, self.tokenizer, self.per_image = maker, tokenizer, per_image
        self.pad = tokenizer.pad_token_id
        self.end = tokenizer.convert_tokens_to_ids("<|im_end|>")

    def row(
        self, rng: np.random.Generator
    ) -> tuple[list[int], list[int], list[np.ndarray], list[Scene]]:
        """One row: ids, labels, pictures, scenes."""
        choice = rng.random()
        if choice < _TEXT_ONLY:
            made, turns = [], [small_talk(rng)]
        elif choice < _TEXT_ONLY + _TWO_PICTURES:
            made = [self.maker.make(rng), self.maker.make(rng)]
            turns = [two_pictures(rng, made[0][1], made[1][1])]
        else:
            made = [self.maker.make(rng, text_share=0.5)]
            turns = conversation(rng, made[0][1], WEIGHTS)
        ids, labels = self.tokens(turns, len(made))
        return ids, labels, [picture for picture, _ in made], [scene for _, scene in made]

    def tokens(self, turns: list[Turn], images: int) -> tuple[list[int], list[int]]:
        """Only answers and the `<|im_end|>` after them are learned."""
        ids: list[int] = []
        labels: list[int] = []
        for i, turn in enumerate(turns):
            text = follow_up(turn.question) if i else prompt(turn.question, images)
            asked = encode(self.tokenizer, text, self.per_image)
            answer = [*self.tokenizer.encode(turn.answer, add_special_tokens=False), self.end]
            ids += asked + answer
            labels += [IGNORE] * len(asked) + answer
        return ids, labels

    def batch(self, rng: np.random.Generator, size: int) -> Batch:
        """`size` rows, padded on the right, where causal attention never looks."""
        rows = [self.row(rng) for _ in range(size)]
        longest = max(len(row[0]) for row in rows)
        ids = torch.full((size, longest), self.pad)
        labels = torch.full((size, longest), IGNORE)
        for i, (tokens, targets, _, _) in enumerate(rows):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            labels[i, : len(targets)] = torch.tensor(targets)
        pictures = [picture for row in rows for picture in row[2]]
        return Batch(
            ids, labels, torch.from_numpy(np.stack(pictures)), [s for row in rows for s in row[3]]
        )
