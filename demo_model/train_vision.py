"""First phase: teach the encoder alone to see, with throw-away classification heads.

    python train_vision.py --output runs/vision --steps 9000

The heads read the encoder's feature map through a handful of learned queries, one per question
(each letter of the text, the first and second thing, number, place, colours). They are dropped
afterwards; `train.py --encoder` starts the joint phase from the encoder. A checkpoint is written
atomically every few hundred steps, and `--resume` goes on from it.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import vocabulary
from model import (
    EMBED_DIMS,
    FEATURES,
    add_norms,
    build_config,
    build_model,
    encoder_of,
    parameter_groups,
)
from questions import place_of
from ranks import average_gradients, run
from scenes import LETTERS, Mosaics, Scene, SceneMaker
from sprites import load_sprites
from torch import nn
from torch.nn import functional as F

SLOTS = 6
TILE = 64  # pixels of a mosaic's tiles
MIDDLE = EMBED_DIMS[3]
THINGS = (*vocabulary.OBJECTS, *vocabulary.SHAPES)
COLOURS = tuple(vocabulary.COLOURS)
IGNORE = -100
# target -> number of classes
TARGETS: dict[str, int] = {
    **{f"letter{i}": len(LETTERS) + 1 for i in range(SLOTS)},
    "thing1": len(THINGS) + 1,
    "thing2": len(THINGS) + 1,
    "count": 6,
    "place": 9,
    "colour": len(COLOURS),
    "background": len(COLOURS) + 1,
    "text_colour": len(COLOURS),
}


def targets_of(scene: Scene) -> list[int]:
    """Class indices for `TARGETS`, `IGNORE` where a question has no answer."""
    text = scene.text or ""
    row = [LETTERS.index(text[i]) + 1 if i < len(text) else 0 for i in range(SLOTS)]
    groups = scene.groups()
    for i in range(2):
        row.append(THINGS.index(groups[i][0].name) + 1 if i < len(groups) else 0)
    first = groups[0] if groups else []
    row.append(len(first))
    place = place_of(first[0].x, first[0].y) if len(first) == 1 else None
    row.append(IGNORE if place is None else place)
    colour = first[0].colour if first else None
    row.append(IGNORE if colour is None else COLOURS.index(colour))
    row.append(len(COLOURS) if scene.background is None else COLOURS.index(scene.background))
    row.append(IGNORE if scene.text_colour is None else COLOURS.index(scene.text_colour))
    return row


def batches(
    maker: SceneMaker,
    mosaics: Mosaics,
    rng: np.random.Generator,
    batch: int,
    first: int,
    plain: int,
) -> Iterator[tuple[torch.Tensor, list[list[Tile]]]]:
    """Endless pictures uint8 (B, s, s, 3) with their facts, beginning with batch `first`.

    They are all mosaics up to batch `plain`; from twice as many on, one batch in five is.
    """
    for done in itertools.count(first):
        tiled = rng.random() < max(0.2, min(1.0, 2 - done / plain))
        pictures, facts = [], []
        for _ in range(batch):
            if tiled:
                picture, tiles = mosaics.make(rng)
                facts.append([Tile(x, y, TILE, scene) for x, y, scene in tiles])
            else:
                picture, scene = maker.make(rng, text_share=0.6)
                facts.append([Tile(0, 0, maker.size, scene)])
            pictures.append(picture)
        yield torch.from_numpy(np.stack(pictures)), facts


def to_pixels(pictures: torch.Tensor, device: torch.device) -> torch.Tensor:
    """uint8 (B, h, w, 3) -> float (B, 3, h, w) in 0..1, channels last."""
    return pictures.to(device).permute(0, 3, 1, 2).float().div_(255)


@dataclass(frozen=True)
class Tile:
    """A scene that fills the square at (x, y) of a picture; sizes in pixels."""

    x: int
    y: int
    side: int
    scene: Scene


@dataclass
class Targets:
    """`answers` (B, T) int64; `letters` (B, s/16, s/16), `things` and `colours` (B, s/32, s/32).

    In `letters` and `things` 0 is none; in `colours` an unnamed colour is `IGNORE`.
    """

    answers: torch.Tensor
    letters: torch.Tensor
    things: torch.Tensor
    colours: torch.Tensor

    @staticmethod
    def of(pictures: list[list[Tile]], size: int, device: torch.device) -> Targets:
        """Targets of a batch of pictures of `size` pixels, each of one or more tiles.

        Questions about the whole picture are asked only of a picture of one tile.
        """
        letters = np.zeros((len(pictures), size // 16, size // 16), dtype=np.int64)
        things = np.zeros((len(pictures), size // 32, size // 32), dtype=np.int64)
        colours = np.full((len(pictures), size // 32, size // 32), IGNORE, dtype=np.int64)
        answers = np.full((len(pictures), len(TARGETS)), IGNORE, dtype=np.int64)
        for i, tiles in enumerate(pictures):
            if len(tiles) == 1:
                answers[i] = targets_of(tiles[0].scene)
            for tile in tiles:
                scene, scale = tile.scene, tile.side / size
                if scene.background:
                    edge = slice(round(tile.y / 32), round((tile.y + tile.side) / 32))
                    span = slice(round(tile.x / 32), round((tile.x + tile.side) / 32))
                    colours[i, edge, span] = COLOURS.index(scene.background)
                for item in scene.items:
                    x, y = tile.x / size + scale * item.x, tile.y / size + scale * item.y
                    reach = 0.3 * item.size * scale
                    _fill(things[i], x, y, reach, THINGS.index(item.name) + 1)
                    known = COLOURS.index(item.colour) if item.colour else IGNORE
                    _fill(colours[i], x, y, 1.6 * reach, IGNORE)
                    _fill(colours[i], x, y, reach, known)
                for letter in scene.letters:
                    x, y = tile.x / size + scale * letter.x, tile.y / size + scale * letter.y
                    reach = 0.33 * letter.width * scale
                    _fill(letters[i], x, y, reach, LETTERS.index(letter.letter) + 1)
                    _fill(colours[i], x, y, reach, COLOURS.index(scene.text_colour))
        return Targets(
            *(torch.from_numpy(a).to(device) for a in (answers, letters, things, colours))
        )


def _fill(grid: np.ndarray, x: float, y: float, reach: float, value: int) -> None:
    """Mark the cell at (x, y) and those whose centres lie within `reach` of it."""
    cells = len(grid)
    centres = (np.arange(cells) + 0.5) / cells
    near_x, near_y = np.abs(centres - x) < reach, np.abs(centres - y) < reach
    near_x[min(cells - 1, max(0, int(x * cells)))] = True
    near_y[min(cells - 1, max(0, int(y * cells)))] = True
    grid[np.ix_(near_y, near_x)] = value


class Heads(nn.Module):
    """Classifiers on the encoder's maps, for training only.

    Learned queries attend over the final map, one per question. Besides, linear classifiers say
    what letter is in each cell of 16 pixels (from the final map and from the fourth stage) and
    what thing is in each cell of 32 pixels: local answers are learned much faster than global.
    """

    def __init__(self, features: int = FEATURES, middle: int = MIDDLE, width: int = 256) -> None:
        super().__init__()
        letters, things = len(LETTERS) + 1, len(THINGS) + 1
        # Most of a feature is the same in every picture; BatchNorm leaves what differs.
        self.final_norm = nn.BatchNorm2d(features)
        self.middle_norm = nn.BatchNorm2d(middle)
        self.final_letters = nn.Linear(features, 16 * letters)
        self.middle_letters = nn.Linear(middle, 4 * letters)
        self.middle_things = nn.Conv2d(middle, things, 1)
        self.middle_colours = nn.Conv2d(middle, len(COLOURS), 1)
        self.final_things = nn.Linear(features, 4 * things)
        self.final_colours = nn.Linear(features, 4 * len(COLOURS))
        self.queries = nn.Parameter(torch.randn(len(TARGETS), width) * 0.5)
        self.token = nn.Linear(features, width)
        self.places = nn.Parameter(torch.randn(1, width, 4, 4) * 0.1)
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 8, batch_first=True)
        self.after = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.outputs = nn.ModuleList(nn.Linear(width, n) for n in TARGETS.values())

    def forward(
        self, middle: torch.Tensor, final: torch.Tensor
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """middle (B, M, 2h, 2w), final (B, C, h, w) -> answers, one (B, classes) per target, and
        maps: two of letters (B, classes, 4h, 4w), two each of things and colours (B, classes,
        2h, 2w), from the final map and from the middle one."""
        normed = self.final_norm(final).permute(0, 2, 3, 1)
        middle = self.middle_norm(middle)
        between = middle.permute(0, 2, 3, 1)
        maps = [
            F.pixel_shuffle(layer(x).permute(0, 3, 1, 2), scale)
            for layer, x, scale in (
                (self.final_letters, normed, 4),
                (self.middle_letters, between, 2),
                (self.final_things, normed, 2),
                (self.final_colours, normed, 2),
            )
        ]
        places = F.interpolate(self.places, final.shape[2:], mode="bilinear", align_corners=True)
        maps += [self.middle_things(middle), self.middle_colours(middle)]
        tokens = self.token(normed) + places.permute(0, 2, 3, 1)
        tokens = self.norm(tokens.flatten(1, 2))
        queries = self.queries.expand(len(tokens), -1, -1)
        seen = queries + self.attention(queries, tokens, tokens, need_weights=False)[0]
        seen = seen + self.mlp(self.after(seen))
        return [head(seen[:, i]) for i, head in enumerate(self.outputs)], maps


def forward_maps(encoder: nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """pixels (B, 3, s, s) -> the fourth stage's map and the final map, stride 32 and 64."""
    x = encoder.stem(pixels)
    for stage in encoder.stages[:4]:
        x = stage(x)
    return x, encoder.final_conv(encoder.stages[4](x))


def losses(answers: list[torch.Tensor], maps: list[torch.Tensor], targets: Targets) -> torch.Tensor:
    """Weighted sum of the cross entropies; letters count for as much as they are hard."""
    total = torch.zeros((), device=targets.answers.device)
    for i, name in enumerate(TARGETS):
        column = targets.answers[:, i]
        if not bool((column != IGNORE).any()):
            continue
        weight = 0.6 if name.startswith("letter") else 0.3 if "colour" in name else 0.5
        total = total + weight * F.cross_entropy(answers[i], column, ignore_index=IGNORE)
    for scores, grid in (
        (maps[0], targets.letters),
        (maps[1], targets.letters),
        (maps[2], targets.things),
        (maps[4], targets.things),
    ):
        weight = torch.ones(scores.shape[1], device=scores.device)
        weight[0] = 0.1
        total = total + F.cross_entropy(scores, grid, weight)
    for scores in (maps[3], maps[5]):
        total = total + 0.4 * F.cross_entropy(scores, targets.colours, ignore_index=IGNORE)
    return total


@torch.no_grad()
def accuracies(
    outputs: list[torch.Tensor], maps: list[torch.Tensor], grids: Targets
) -> dict[str, list[int]]:
    """Right and asked, by kind of question."""
    targets = grids.answers
    guesses = torch.stack([o.argmax(-1) for o in outputs], dim=1)
    right = guesses == targets
    has_text = targets[:, 0] > 0
    result = {"read": [int(right[has_text, :SLOTS].all(1).sum()), int(has_text.sum())]}
    for name, scores, grid in (
        ("letter16", maps[0], grids.letters),
        ("letter32", maps[1], grids.letters),
        ("thing32", maps[2], grids.things),
    ):
        there = grid > 0
        result[name] = [int((scores.argmax(1) == grid)[there].sum()), int(there.sum())]
    there = grids.colours != IGNORE
    right_colours = (maps[3].argmax(1) == grids.colours)[there]
    result["colour32"] = [int(right_colours.sum()), int(there.sum())]
    asked = targets[:, :SLOTS] > 0
    result["letter"] = [int(right[:, :SLOTS][asked].sum()), int(asked.sum())]
    for i, name in enumerate(TARGETS):
        if i >= SLOTS:
            known = targets[:, i] != IGNORE
            if name in ("thing1", "thing2", "count"):
                known &= targets[:, i] > 0
            result[name] = [int(right[known, i].sum()), int(known.sum())]
    return result


def save(path: Path, state: dict) -> None:
    """Write atomically."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def learning_rate(step: int, options: argparse.Namespace) -> float:
    """Warm-up, then a cosine down to 3 %."""
    warm = min(1.0, (step + 1) / 100)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / options.steps)))
    return options.rate * warm * (0.03 + 0.97 * cosine)


def train(rank: int, ranks: int, options: argparse.Namespace) -> None:
    """The training loop of one process; `options.batch` is shared out among the processes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(options.seed)
    checkpoint = options.output / "vision.pt"
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")
    model = build_model(build_config(32, {name: i for i, name in enumerate(names)}))
    encoder = encoder_of(model)
    add_norms(encoder)
    encoder.to(device, memory_format=torch.channels_last).train()
    heads = Heads().to(device)
    both = nn.ModuleList([encoder, heads])
    parameters = list(both.parameters())
    optimiser = torch.optim.AdamW(
        parameter_groups(both, 0.03), lr=options.rate, betas=(0.9, 0.98), fused=True
    )
    step = 0
    if options.resume and checkpoint.exists():
        state = torch.load(checkpoint, map_location=device)
        both.load_state_dict(state["both"])
        if state["optimiser"] is not None:
            optimiser.load_state_dict(state["optimiser"])
        step = state["step"]
    share = options.batch // ranks
    maker = SceneMaker(load_sprites(options.sprites), options.size)
    rng = np.random.default_rng((options.seed, step, rank))
    mosaics = Mosaics(load_sprites(options.sprites), options.size, options.size // TILE, rng)
    stream = batches(maker, mosaics, rng, share, step, options.mosaics)
    forward = torch.compile(forward_maps) if options.compile else forward_maps
    tally: dict[str, list[int]] = {}
    started, loss_sum, every = time.time(), 0.0, 100
    for pictures, facts in stream:
        if step >= options.steps:
            break
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, options)
        targets = Targets.of(facts, options.size, device)
        answers, maps = heads(*forward(encoder, to_pixels(pictures, device)))
        loss = losses(answers, maps, targets)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(parameters, ranks)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        step += 1
        loss_sum += float(loss.detach())
        for name, (right, asked) in accuracies(answers, maps, targets).items():
            entry = tally.setdefault(name, [0, 0])
            entry[0] += right
            entry[1] += asked
        if rank == 0 and step % every == 0:
            scores = " ".join(f"{n} {100 * r / max(1, a):.0f}" for n, (r, a) in tally.items())
            speed = every * options.batch / (time.time() - started)
            print(f"{step} loss {loss_sum / every:.3f} {speed:.0f}/s {scores}", flush=True)
            tally, started, loss_sum = {}, time.time(), 0.0
        if rank == 0 and (step % 250 == 0 or step == options.steps):
            save(
                checkpoint,
                {
                    "both": both.state_dict(),
                    "encoder": encoder.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "step": step,
                },
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/vision"))
    parser.add_argument("--sprites", type=Path, default=Path("runs/sprites.npz"))
    parser.add_argument("--size", type=int, default=192, help="side of the pictures, pixels")
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1.2e-3)
    parser.add_argument("--mosaics", type=int, default=1500, help="steps of mosaics only")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ranks", type=int, help="processes; default: one per core, one on a GPU")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    load_sprites(options.sprites)  # build the cache once, before the processes start
    ranks = options.ranks or (1 if torch.cuda.is_available() else os.cpu_count() or 1)
    run(train, ranks, options)


if __name__ == "__main__":
    main()
