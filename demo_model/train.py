"""Second phase: train encoder, projector and language model together on conversations.

    python train.py --encoder runs/vision/vision.pt --output runs/joint --steps 5000

The classification heads of the first phase go along with a small weight, so that the encoder
keeps its direct supervision. `joint.pt` is written atomically every few hundred steps and holds
the weights, their running average (which is what gets exported) and the optimiser's state;
`--resume` goes on from it, and `export.py` may read it at any moment.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from conversations import IGNORE, RowMaker
from model import (
    IMAGE_SIZE,
    STRIDE,
    add_norms,
    add_projector_norm,
    build_config,
    build_model,
    encoder_of,
    parameter_groups,
)
from ranks import average_gradients, run, sum_over_ranks
from scenes import SceneMaker
from sprites import load_sprites
from tokenizer import VOCAB_SIZE, special_ids, train_tokenizer
from torch import nn
from torch.nn import functional as F
from train_vision import (
    Heads,
    Targets,
    Tile,
    accuracies,
    forward_maps,
    losses,
    save,
    to_pixels,
)

_SAVE_EVERY = 100
_REPORT_EVERY = 50


def learning_rate(step: int, progress: float, rate: float) -> float:
    """Warm-up over 200 steps, then a cosine over `progress` (0 to 1) down to 2 %."""
    warm = min(1.0, (step + 1) / 200)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return rate * warm * (0.02 + 0.98 * cosine)


@torch.no_grad()
def update_average(average: dict[str, torch.Tensor], model: nn.Module, decay: float) -> None:
    """Running mean of the weights; counters and the like are copied."""
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            average[name].lerp_(value, 1 - decay)
        else:
            average[name].copy_(value)


def train(rank: int, ranks: int, options: argparse.Namespace) -> None:
    """The training loop of one process; `options.batch` is shared out among the processes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(options.seed)
    checkpoint = options.output / "joint.pt"
    tokenizer = train_tokenizer()
    model = build_model(build_config(VOCAB_SIZE, special_ids(tokenizer)))
    encoder, heads = encoder_of(model), Heads()
    add_norms(encoder)
    add_projector_norm(model)
    step, state = 0, None
    if options.resume and checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu")
        model.load_state_dict(state["model"])
        heads.load_state_dict(state["heads"])
        step = state["step"]
    elif options.encoder:
        nn.ModuleList([encoder, heads]).load_state_dict(
            torch.load(options.encoder, map_location="cpu")["both"]
        )
        norm = model.model.multi_modal_projector.linear_1.norm
        norm.running_mean.copy_(heads.final_norm.running_mean)
        norm.running_var.copy_(heads.final_norm.running_var)
    model.to(device).train()
    encoder.to(memory_format=torch.channels_last)
    heads.to(device)
    groups = []
    for part, scale in (
        (encoder, options.encoder_rate),
        (heads, 1.0),
        (model.model.multi_modal_projector, 1.0),
        (model.model.language_model, 1.0),
    ):
        groups += [{**group, "scale": scale} for group in parameter_groups(part, 0.03)]
    parameters = [p for group in groups for p in group["params"]]
    optimiser = torch.optim.AdamW(groups, lr=options.rate, betas=(0.9, 0.98), fused=True)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    if state is not None:
        optimiser.load_state_dict(state["optimiser"])
        average = {name: value.to(device) for name, value in state["average"].items()}
    share = options.batch // ranks
    maker = SceneMaker(load_sprites(options.sprites), options.size)
    rows = RowMaker(maker, tokenizer, (options.size // STRIDE) ** 2)
    rng = np.random.default_rng((options.seed, 7, step, rank))
    started, sums, tally = time.time(), [0.0, 0.0, 0.0, 0.0], {}
    first, began = step / options.steps, time.time()
    progress = first
    while progress < 1:
        rate = learning_rate(step, progress, options.rate)
        for group in optimiser.param_groups:
            group["lr"] = rate * group["scale"]
        batch = rows.batch(rng, share)
        ids, labels = batch.ids.to(device), batch.labels.to(device)
        middle, features = forward_maps(encoder, to_pixels(batch.pictures, device))
        seen = model.model.multi_modal_projector(features.flatten(2).transpose(1, 2))
        embedded = model.get_input_embeddings()(ids)
        mask = (ids == model.config.image_token_index).unsqueeze(-1)
        embedded = embedded.masked_scatter(mask, seen)
        hidden = model.model.language_model(inputs_embeds=embedded, use_cache=False)
        learned = labels[:, 1:] != IGNORE
        logits = model.lm_head(hidden.last_hidden_state[:, :-1][learned])
        answers = labels[:, 1:][learned]
        loss = F.cross_entropy(logits, answers)
        total = loss
        if options.auxiliary:
            facts = [[Tile(0, 0, options.size, scene)] for scene in batch.scenes]
            targets = Targets.of(facts, options.size, device)
            outputs, maps = heads(middle, features)
            total = loss + options.auxiliary * losses(outputs, maps, targets)
            for name, (right, asked) in accuracies(outputs, maps, targets).items():
                entry = tally.setdefault(name, [0, 0])
                entry[0] += right
                entry[1] += asked
        optimiser.zero_grad(set_to_none=True)
        total.backward()
        average_gradients(parameters, ranks)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        step += 1
        progress = step / options.steps
        if options.minutes:
            spent = (time.time() - began) / (60 * options.minutes)
            progress = max(progress, first + (1 - first) * spent)
        # The clocks of the processes differ, the decision to stop must not.
        progress = sum_over_ranks([progress], ranks)[0] / ranks
        sums[0] += float(loss.detach())
        sums[1] += float(total.detach())
        sums[2] += float((logits.argmax(-1) == answers).float().mean())
        if rank == 0:
            update_average(average, model, min(options.decay, step / (step + 10)))
        if rank == 0 and step % _REPORT_EVERY == 0:
            speed = _REPORT_EVERY * options.batch / (time.time() - started)
            scores = " ".join(f"{n} {100 * r / max(1, a):.0f}" for n, (r, a) in tally.items())
            answer, both, right = (value / _REPORT_EVERY for value in sums[:3])
            print(
                f"{step} answers {answer:.4f} all {both:.3f} tokens {100 * right:.1f}% "
                f"{speed:.0f}/s | {scores}",
                flush=True,
            )
            started, sums, tally = time.time(), [0.0, 0.0, 0.0, 0.0], {}
        if rank == 0 and (step % _SAVE_EVERY == 0 or progress >= 1):
            save(
                checkpoint,
                {
                    "model": model.state_dict(),
                    "heads": heads.state_dict(),
                    "average": average,
                    "optimiser": optimiser.state_dict(),
                    "step": step,
                },
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", type=Path, help="checkpoint of train_vision.py")
    parser.add_argument("--output", type=Path, default=Path("runs/joint"))
    parser.add_argument("--sprites", type=Path, default=Path("runs/sprites.npz"))
    parser.add_argument("--size", type=int, default=IMAGE_SIZE, help="side of the pictures, pixels")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--minutes", type=float, help="end after so long, whatever the step")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--encoder-rate", type=float, default=0.7, help="factor of the rate")
    parser.add_argument("--auxiliary", type=float, default=0.15, help="weight of the heads' loss")
    parser.add_argument("--decay", type=float, default=0.998, help="of the running average")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--ranks", type=int, help="processes; default: one per core, one on a GPU")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    load_sprites(options.sprites)  # build the cache once, before the processes start
    ranks = options.ranks or (1 if torch.cuda.is_available() else os.cpu_count() or 1)
    run(train, ranks, options)


if __name__ == "__main__":
    main()
