"""First phase: teach the encoder alone to see, with throw-away classification heads.

    python train_vision.py --output runs/vision --minutes 40

The heads read the encoder's feature map through a handful of learned queries, one per question
(each letter of the text, the first and second thing, number, place, colours). They are dropped
afterwards; `train.py --encoder` starts the joint phase from the encoder. A checkpoint is written
atomically every few hundred steps, and `--resume` goes on from it.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

import vocabulary
from model import FEATURES, build_config, build_model, encoder_of, parameter_groups
from questions import place_of
from scenes import Scene, SceneMaker
from sprites import load_sprites

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
SLOTS = 6
THINGS = (*vocabulary.OBJECTS, *vocabulary.SHAPES)
COLOURS = tuple(vocabulary.COLOURS)
IGNORE = -100
# target -> number of classes
TARGETS: dict[str, int] = {
    **{f"letter{i}": len(LETTERS) + 1 for i in range(SLOTS)},
    "thing1": len(THINGS) + 1, "thing2": len(THINGS) + 1, "count": 6, "place": 9,
    "colour": len(COLOURS), "background": len(COLOURS) + 1, "text_colour": len(COLOURS),
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


class SceneStream(IterableDataset):
    """An endless stream of batches: pictures uint8 (B, s, s, 3) and targets int64 (B, T)."""

    def __init__(
        self, sprites: Path, size: int, batch: int, seed: int, ramp: int, held_out_words: bool
    ) -> None:
        self.sprites, self.size, self.batch, self.seed = sprites, size, batch, seed
        self.ramp, self.held_out_words = ramp, held_out_words

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        rng = np.random.default_rng((self.seed, info.id if info else 0))
        maker = SceneMaker(
            load_sprites(self.sprites), self.size, held_out_words=self.held_out_words
        )
        done = 0
        while True:
            difficulty = min(1.0, done / self.ramp) if self.ramp else 1.0
            pairs = [maker.make(rng, None, difficulty, 0.6) for _ in range(self.batch)]
            done += 1
            yield (
                torch.from_numpy(np.stack([p for p, _ in pairs])),
                torch.tensor([targets_of(s) for _, s in pairs]),
            )


def to_pixels(pictures: torch.Tensor, device: torch.device) -> torch.Tensor:
    """uint8 (B, h, w, 3) -> float (B, 3, h, w) in 0..1, channels last."""
    return pictures.to(device).permute(0, 3, 1, 2).float().div_(255)


class Heads(nn.Module):
    """Learned queries that attend over the feature map; one linear classifier each."""

    def __init__(self, features: int = FEATURES, width: int = 256) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(TARGETS), width) * 0.5)
        self.token = nn.Linear(features, width)
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 8, batch_first=True)
        self.after = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.outputs = nn.ModuleList(nn.Linear(width, n) for n in TARGETS.values())

    def forward(self, features: torch.Tensor) -> list[torch.Tensor]:
        """features (B, C, h, w) -> one (B, classes) per target."""
        tokens = self.norm(self.token(features.flatten(2).transpose(1, 2)))
        queries = self.queries.expand(len(tokens), -1, -1)
        seen = queries + self.attention(queries, tokens, tokens, need_weights=False)[0]
        seen = seen + self.mlp(self.after(seen))
        return [head(seen[:, i]) for i, head in enumerate(self.outputs)]


def losses(outputs: list[torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
    """Weighted sum of the cross entropies; letters count for as much as they are hard."""
    total = torch.zeros((), device=targets.device)
    for i, name in enumerate(TARGETS):
        column = targets[:, i]
        if not bool((column != IGNORE).any()):
            continue
        weight = 0.6 if name.startswith("letter") else 0.3 if "colour" in name else 0.5
        total = total + weight * F.cross_entropy(outputs[i], column, ignore_index=IGNORE)
    return total


@torch.no_grad()
def accuracies(outputs: list[torch.Tensor], targets: torch.Tensor) -> dict[str, list[int]]:
    """Right and asked, by kind of question."""
    guesses = torch.stack([o.argmax(-1) for o in outputs], dim=1)
    right = guesses == targets
    has_text = targets[:, 0] > 0
    result = {"read": [int(right[has_text, :SLOTS].all(1).sum()), int(has_text.sum())]}
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/vision"))
    parser.add_argument("--sprites", type=Path, default=Path("runs/sprites.npz"))
    parser.add_argument("--size", type=int, default=192, help="side of the pictures, pixels")
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    checkpoint = options.output / "vision.pt"

    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")
    model = build_model(build_config(32, {name: i for i, name in enumerate(names)}))
    encoder = encoder_of(model).to(device, memory_format=torch.channels_last).train()
    heads = Heads().to(device)
    both = nn.ModuleList([encoder, heads])
    optimiser = torch.optim.AdamW(parameter_groups(both, 0.03), lr=options.rate, betas=(0.9, 0.98))
    step = 0
    if options.resume and checkpoint.exists():
        state = torch.load(checkpoint, map_location=device)
        both.load_state_dict(state["both"])
        optimiser.load_state_dict(state["optimiser"])
        step = state["step"]
    load_sprites(options.sprites)  # build the cache once, before the workers start
    ramp = 1500 if step == 0 else 0
    stream = SceneStream(
        options.sprites, options.size, options.batch, options.seed + 1000 * step, ramp, False
    )
    workers = max(1, min(8, (os.cpu_count() or 2) - 1))
    batches = iter(DataLoader(stream, batch_size=None, num_workers=workers, prefetch_factor=4))
    features = encoder.forward_features
    if options.compile:
        features = torch.compile(features)
    tally: dict[str, list[int]] = {}
    started, loss_sum, every = time.time(), 0.0, 50
    while step < options.steps:
        warm = min(1.0, (step + 1) / 200)
        rate = options.rate * warm * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * step / options.steps)))
        for group in optimiser.param_groups:
            group["lr"] = rate
        pictures, targets = next(batches)
        targets = targets.to(device)
        outputs = heads(features(to_pixels(pictures, device)))
        loss = losses(outputs, targets)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimiser.step()
        step += 1
        loss_sum += float(loss.detach())
        for name, (right, asked) in accuracies(outputs, targets).items():
            entry = tally.setdefault(name, [0, 0])
            entry[0] += right
            entry[1] += asked
        if step % every == 0:
            scores = " ".join(f"{n} {100 * r / max(1, a):.0f}" for n, (r, a) in tally.items())
            speed = every * options.batch / (time.time() - started)
            print(f"{step} loss {loss_sum / every:.3f} {speed:.0f}/s {scores}", flush=True)
            tally, started, loss_sum = {}, time.time(), 0.0
        if step % 250 == 0 or step == options.steps:
            state = {"both": both.state_dict(), "encoder": encoder.state_dict(),
                     "optimiser": optimiser.state_dict(), "step": step}
            save(checkpoint, state)


if __name__ == "__main__":
    main()
