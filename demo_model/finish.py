"""Third phase: go on with projector and language model only, on an exported folder.

    python finish.py EXPORTED FINISHED --minutes 3

The encoder stays as it was exported, so a step costs a third. Most questions ask what is there,
which the language model learns last.
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
from export import export
from model import IMAGE_SIZE, STRIDE, encoder_of, parameter_groups
from questions import conversation
from ranks import average_gradients, run, sum_over_ranks
from scenes import SceneMaker
from sprites import load_sprites
from torch import nn
from torch.nn import functional as F
from train_vision import to_pixels
from transformers import FastVlmForConditionalGeneration, PreTrainedTokenizerFast

WEIGHTS = {
    "name": 5.0, "colour": 0.8, "count": 0.8, "where": 0.6, "read": 1.2, "yesno": 0.8,
    "relation": 2.0, "describe": 0.8,
}  # fmt: skip


def finish(rank: int, ranks: int, options: argparse.Namespace) -> None:
    """The training loop of one process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.folder)
    model = FastVlmForConditionalGeneration.from_pretrained(options.folder, dtype=torch.float32)
    model.to(device).eval()
    encoder = encoder_of(model).to(memory_format=torch.channels_last)
    groups = [
        group
        for part in (model.model.multi_modal_projector, model.model.language_model)
        for group in parameter_groups(part, 0.01)
    ]
    parameters = [p for group in groups for p in group["params"]]
    optimiser = torch.optim.AdamW(groups, lr=options.rate, betas=(0.9, 0.98), fused=True)
    maker = SceneMaker(load_sprites(options.sprites), IMAGE_SIZE)
    rows = RowMaker(maker, tokenizer, (IMAGE_SIZE // STRIDE) ** 2)
    rng = np.random.default_rng((options.seed, 11, rank))
    began, step, progress = time.time(), 0, 0.0
    while progress < 1:
        for group in optimiser.param_groups:
            cosine = 0.5 * (1 + math.cos(math.pi * progress))
            group["lr"] = options.rate * min(1.0, (step + 1) / 20) * (0.02 + 0.98 * cosine)
        made = [maker.make(rng, text_share=0.35) for _ in range(options.batch // ranks)]
        tokens = [rows.tokens(conversation(rng, scene, WEIGHTS, 2), 1) for _, scene in made]
        longest = max(len(row) for row, _ in tokens)
        ids = torch.tensor([row + [rows.pad] * (longest - len(row)) for row, _ in tokens])
        labels = torch.tensor([row + [IGNORE] * (longest - len(row)) for _, row in tokens])
        ids, labels = ids.to(device), labels.to(device)
        pictures = torch.from_numpy(np.stack([picture for picture, _ in made]))
        with torch.no_grad():
            features = encoder.forward_features(to_pixels(pictures, device))
        seen = model.model.multi_modal_projector(features.flatten(2).transpose(1, 2))
        mask = (ids == model.config.image_token_index).unsqueeze(-1)
        embedded = model.get_input_embeddings()(ids).masked_scatter(mask, seen)
        hidden = model.model.language_model(inputs_embeds=embedded, use_cache=False)
        learned = labels[:, 1:] != IGNORE
        logits = model.lm_head(hidden.last_hidden_state[:, :-1][learned])
        loss = F.cross_entropy(logits, labels[:, 1:][learned])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(parameters, ranks)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        step += 1
        spent = (time.time() - began) / (60 * options.minutes)
        # The clocks of the processes differ, the decision to stop must not.
        progress = sum_over_ranks([spent], ranks)[0] / ranks
        if rank == 0 and step % 20 == 0:
            print(f"{step} loss {float(loss.detach()):.4f} at {progress:.0%}", flush=True)
    if rank == 0:
        export(model, tokenizer, options.output, torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="written by export.py")
    parser.add_argument("output", type=Path)
    parser.add_argument("--sprites", type=Path, default=Path("runs/sprites.npz"))
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--ranks", type=int, help="processes; default: one per core, one on a GPU")
    options = parser.parse_args()
    ranks = options.ranks or (1 if torch.cuda.is_available() else os.cpu_count() or 1)
    run(finish, ranks, options)


if __name__ == "__main__":
    main()
