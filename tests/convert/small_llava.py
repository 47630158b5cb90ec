"""A whole FastVLM of some 300,000 weights in the published PyTorch layout, written in milliseconds.

`write(folder)` makes an honest checkpoint; tests then damage it or leave parts out. Everything in
it is drawn from a seed, so two of one seed are byte for byte the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

Array = np.ndarray[Any, Any]
Shapes = dict[str, tuple[int, ...]]

DIMS = (8, 16, 32, 64, 64)
FEATURES, GATE = 2 * DIMS[-1], 2 * DIMS[-1] // 16
HIDDEN, LAYERS, HEADS, KV_HEADS, MLP = 64, 2, 4, 2, 128
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 256 + len(SPECIAL) + 5  # a few rows more than the tokenizer has, as Qwen2
END = 258

CONFIG: dict[str, Any] = {
    "architectures": ["LlavaQwen2ForCausalLM"],
    "model_type": "llava_qwen2",
    "eos_token_id": END,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "image_aspect_ratio": "pad",
    "intermediate_size": MLP,
    "max_position_embeddings": 1024,
    "mm_hidden_size": FEATURES,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_tower": "mobileclip_l_128",
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV_HEADS,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "tokenizer_model_max_length": 512,
    "vocab_size": VOCABULARY,
    "vision_config": {
        "architecture": "fastvit_mci3",
        "layers": [1, 1, 1, 1, 1],
        "embed_dims": list(DIMS),
    },
}


def vision_shapes() -> Shapes:
    """The released (fused) encoder, names after `model.vision_tower.vision_tower.model.`."""
    shapes: Shapes = {}

    def conv(name: str, out: int, per_group: int, kernel: int) -> None:
        shapes[f"{name}.weight"] = (out, per_group, kernel, kernel)
        shapes[f"{name}.bias"] = (out,)

    conv("patch_embed.0.reparam_conv", DIMS[0], 3, 3)
    conv("patch_embed.1.reparam_conv", DIMS[0], 1, 3)
    conv("patch_embed.2.reparam_conv", DIMS[0], DIMS[0], 1)
    slot = 0
    for stage, dim in enumerate(DIMS):
        if stage:
            conv(f"network.{slot}.proj.0.lkb_reparam", dim, 1, 7)
            conv(f"network.{slot}.proj.1.reparam_conv", dim, dim, 1)
            slot += 1
        if stage >= 3:
            conv(f"network.{slot}.reparam_conv", dim, 1, 7)
            slot += 1
        block = f"network.{slot}.0"
        slot += 1
        shapes[f"{block}.convffn.conv.conv.weight"] = (dim, 1, 7, 7)
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{block}.convffn.conv.bn.{part}"] = (dim,)
        conv(f"{block}.convffn.fc1", 4 * dim, dim, 1)
        conv(f"{block}.convffn.fc2", dim, 4 * dim, 1)
        if stage < 3:
            shapes[f"{block}.layer_scale"] = (dim, 1, 1)
            conv(f"{block}.token_mixer.reparam_conv", dim, 1, 3)
            continue
        shapes[f"{block}.layer_scale_1"] = shapes[f"{block}.layer_scale_2"] = (dim, 1, 1)
        shapes[f"{block}.norm.weight"] = shapes[f"{block}.norm.bias"] = (dim,)
        shapes[f"{block}.token_mixer.qkv.weight"] = (3 * dim, dim)
        shapes[f"{block}.token_mixer.proj.weight"] = (dim, dim)
        shapes[f"{block}.token_mixer.proj.bias"] = (dim,)
    conv("conv_exp.reparam_conv", FEATURES, 1, 3)
    conv("conv_exp.se.reduce", GATE, FEATURES, 1)
    conv("conv_exp.se.expand", FEATURES, GATE, 1)
    shapes["head.proj"] = (FEATURES, 16)
    return shapes


def shapes() -> Shapes:
    """Every tensor of the checkpoint, as published."""
    tower = "model.vision_tower.vision_tower.model."
    named = {tower + name: shape for name, shape in vision_shapes().items()}
    named["model.mm_projector.0.weight"] = (HIDDEN, FEATURES)
    named["model.mm_projector.2.weight"] = (HIDDEN, HIDDEN)
    named["model.mm_projector.0.bias"] = named["model.mm_projector.2.bias"] = (HIDDEN,)
    named["model.embed_tokens.weight"] = (VOCABULARY, HIDDEN)
    named["model.norm.weight"] = (HIDDEN,)
    narrow = HIDDEN * KV_HEADS // HEADS
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        for letter, rows in (("q", HIDDEN), ("k", narrow), ("v", narrow)):
            named[f"{layer}self_attn.{letter}_proj.weight"] = (rows, HIDDEN)
            named[f"{layer}self_attn.{letter}_proj.bias"] = (rows,)
        named[f"{layer}self_attn.o_proj.weight"] = (HIDDEN, HIDDEN)
        named[f"{layer}mlp.gate_proj.weight"] = named[f"{layer}mlp.up_proj.weight"] = (MLP, HIDDEN)
        named[f"{layer}mlp.down_proj.weight"] = (HIDDEN, MLP)
        named[f"{layer}input_layernorm.weight"] = (HIDDEN,)
        named[f"{layer}post_attention_layernorm.weight"] = (HIDDEN,)
    return named


def tensors(seed: int = 0, dtype: str = "float32") -> dict[str, Array]:
    """Values by name; scaled so that every stage has something to say."""
    random = np.random.default_rng(seed)
    values = {}
    for name, shape in shapes().items():
        noise = random.standard_normal(shape, np.float32)
        if name.endswith("running_var"):
            value = np.abs(noise) + 0.5
        elif len(shape) == 1 and name.endswith(".weight"):
            value = 1 + 0.1 * noise
        elif "layer_scale" in name:
            value = 0.5 + 0.1 * noise
        else:
            fan_in = int(np.prod(shape[1:])) or 1
            value = noise / np.sqrt(fan_in) if len(shape) > 1 else 0.1 * noise
        values[name] = value.astype(dtype)
    return values


def write(
    folder: Path,
    *,
    seed: int = 0,
    dtype: str = "float32",
    shards: int = 1,
    config: Mapping[str, Any] | None = None,
    change: Callable[[dict[str, Array]], None] | None = None,
) -> Path:
    """A checkpoint folder. `change` edits the dictionary of tensors before it is written."""
    folder.mkdir(parents=True, exist_ok=True)
    values = tensors(seed, dtype)
    if change is not None:
        change(values)
    names = list(values)
    files = (
        ["model.safetensors"]
        if shards == 1
        else [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    )
    listed = {}
    for i, file in enumerate(files):
        part = {name: values[name] for name in names[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        listed |= dict.fromkeys(part, file)
    if shards > 1:
        index = {"metadata": {}, "weight_map": listed}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}, indent=1))
    ends = {"eos_token_id": [END, 256]}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Bytes, and the three special tokens of Qwen2's conversations."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    characters = printable + [256 + i for i in range(len(rest))]
    vocabulary = {chr(character): i for i, character in enumerate(characters)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    flags |= {"normalized": False, "special": True}
    added = [{"id": 256 + i, "content": text, **flags} for i, text in enumerate(SPECIAL)]
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False}
    by_bytes |= {"trim_offsets": False, "use_regex": False}
    model = {"type": "BPE", "vocab": vocabulary, "merges": [], "dropout": None, "unk_token": None}
    model |= {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    model |= {"fuse_unk": False, "byte_fallback": False}
    tokenizer = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    tokenizer |= {"normalizer": None, "pre_tokenizer": by_bytes, "post_processor": None}
    tokenizer |= {"decoder": by_bytes, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": SPECIAL[2]}
    settings |= {"pad_token": SPECIAL[0], "bos_token": None, "unk_token": None}
    settings |= {"model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
