"""Write a demo checkpoint as a folder in transformers' layout.

    python export.py runs/joint/joint.pt EXPORTED --dtype float16

The folder holds config.json, model.safetensors, the tokenizer with its chat template,
generation_config.json and the picture processor's settings (in both files that tools read).
The picture's size is `crop_size` / `size` in preprocessor_config.json and `image_size` in the
vision part of config.json; `image_aspect_ratio: pad` says that pictures are padded to a square.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from model import (
    IMAGE_SIZE,
    STRIDE,
    add_norms,
    add_projector_norm,
    build_config,
    build_model,
    encoder_of,
    fold_norms,
    fold_projector_norm,
)
from scenes import SceneMaker
from sprites import load_sprites
from tokenizer import VOCAB_SIZE, special_ids, train_tokenizer
from torch import nn
from train_vision import to_pixels
from transformers import FastVlmForConditionalGeneration, GenerationConfig, PreTrainedTokenizerFast

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def preprocessor() -> dict:
    """Settings of the picture processor: square of `IMAGE_SIZE`, values in 0..1, nothing else."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": IMAGE_SIZE},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.0, 0.0, 0.0],
        "image_std": [1.0, 1.0, 1.0],
    }


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def export(
    model: FastVlmForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    dtype: torch.dtype,
) -> None:
    """Write the folder. The model itself is left as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = special_ids(tokenizer)
    model.generation_config = GenerationConfig(
        bos_token_id=ids["<|endoftext|>"],
        pad_token_id=ids["<|endoftext|>"],
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]],
        do_sample=False,
    )
    state = {
        name: tensor.detach()
        .to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)
        .contiguous()
        for name, tensor in model.state_dict().items()
    }
    model.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "Qwen2Tokenizer"
    settings["chat_template"] = tokenizer.chat_template
    write_json(folder / "tokenizer_config.json", settings)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    for part in (config["vision_config"], config["text_config"]):
        part.pop("label_names", None)
        if "dtype" in part:
            part["dtype"] = config["dtype"]
    config["image_aspect_ratio"] = "pad"
    write_json(folder / "config.json", config)
    write_json(folder / "preprocessor_config.json", preprocessor())
    write_json(
        folder / "processor_config.json",
        {
            "processor_class": "LlavaProcessor",
            "image_token": "<image>",
            "patch_size": STRIDE,
            "num_additional_image_tokens": 0,
            "vision_feature_select_strategy": "full",
            "image_processor": preprocessor(),
        },
    )


def load_checkpoint(
    path: Path | None, sprites: Path, which: str = "average"
) -> FastVlmForConditionalGeneration:
    """Build the model and fill it from a checkpoint of `train.py` (averaged weights), if given."""
    tokenizer = train_tokenizer()
    model = build_model(build_config(VOCAB_SIZE, special_ids(tokenizer)))
    if path is not None:
        state = torch.load(path, map_location="cpu")
        add_norms(encoder_of(model))
        add_projector_norm(model)
        model.load_state_dict(state[which])
        model.tie_weights()
        calibrate(model, sprites)
        fold_norms(encoder_of(model))
        fold_projector_norm(model)
    return model.eval()


@torch.no_grad()
def calibrate(
    model: FastVlmForConditionalGeneration, sprites: Path, batches: int = 60, batch: int = 48
) -> None:
    """Measure the norms' statistics anew, over many pictures, for the very weights exported.

    Those kept while training are of few pictures and of other weights than the averaged ones.
    """
    encoder = encoder_of(model).to(memory_format=torch.channels_last)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
    model.train()
    maker = SceneMaker(load_sprites(sprites), IMAGE_SIZE)
    rng = np.random.default_rng(31)
    for _ in range(batches):
        pictures = np.stack([maker.make(rng, text_share=0.5)[0] for _ in range(batch)])
        features = encoder.forward_features(
            to_pixels(torch.from_numpy(pictures), torch.device("cpu"))
        )
        model.model.multi_modal_projector(features.flatten(2).transpose(1, 2))
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, nargs="?", help="omit for random weights")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--sprites", type=Path, default=Path("runs/sprites.npz"))
    parser.add_argument("--weights", choices=("average", "model"), default="average")
    options = parser.parse_args()
    export(
        load_checkpoint(options.checkpoint, options.sprites, options.weights),
        train_tokenizer(),
        options.folder,
        DTYPES[options.dtype],
    )
    size = (options.folder / "model.safetensors").stat().st_size
    print(f"{options.folder}: {size / 1e6:.2f} MB of weights, {options.dtype}")


if __name__ == "__main__":
    main()
