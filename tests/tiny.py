"""A whole FastVLM of a quarter of a million weights, in every layout that checkpoints come in.

Five stages as in FastViTHD, two layers of Qwen2, a tokenizer of bytes. The names of each layout are
written out here from the published checkpoints and not taken from `fastvlm_mlx.weights.layouts`,
which the tests check against them. Values are drawn from a seed by the tensor's LLaVA name, so the
same model can be written in any layout.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]

BN = ("weight", "bias", "running_mean", "running_var")
APPLE_TOWER = "model.vision_tower.vision_tower.model."
TIMM_TOWER = "model.vision_tower.timm_model."

# The encoder -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arch:
    """The sizes of an encoder of FastViTHD's kind: attention in the last two of five stages."""

    depths: tuple[int, ...] = (1, 2, 1, 1, 1)
    dims: tuple[int, ...] = (8, 16, 32, 64, 128)
    head_dim: int = 768  # of the pooled head that plays no part
    stem_scale: bool = False


TINY = Arch(head_dim=24)
FASTVITHD = Arch((2, 12, 24, 4, 2), (96, 192, 384, 768, 1536))
IMAGE_SIZE = 128
GRID = IMAGE_SIZE // 64
PICTURE_TOKENS = GRID * GRID


class Entry(NamedTuple):
    """One tensor of the encoder: its name in Apple's code, in timm, and its PyTorch shape."""

    apple: str
    timm: str
    shape: Shape


def encoder(arch: Arch = TINY, *, training: bool = False) -> list[Entry]:
    """Every tensor of the encoder; with its parallel branches, or as released, fused."""
    entries: list[Entry] = []

    def put(apple: str, timm: str, *shape: int) -> None:
        entries.append(Entry(apple, timm, shape))

    def conv(apple: str, timm: str, out: int, inner: int, kernel: int, bias: bool = True) -> None:
        put(f"{apple}.weight", f"{timm}.weight", out, inner, kernel, kernel)
        if bias:
            put(f"{apple}.bias", f"{timm}.bias", out)

    def norm(apple: str, timm: str, dim: int) -> None:
        for part in BN:
            put(f"{apple}.{part}", f"{timm}.{part}", dim)
        put(f"{apple}.num_batches_tracked", f"{timm}.num_batches_tracked")

    def branch(apple: str, timm: str, out: int, inner: int, kernel: int) -> None:
        conv(f"{apple}.conv", f"{timm}.conv", out, inner, kernel, bias=False)
        norm(f"{apple}.bn", f"{timm}.bn", out)

    def mobileone(
        apple: str, timm: str, out: int, inner: int, kernel: int, *, skip: bool, scale: bool
    ) -> None:
        if not training:
            conv(f"{apple}.reparam_conv", f"{timm}.reparam_conv", out, inner, kernel)
            return
        branch(f"{apple}.rbr_conv.0", f"{timm}.conv_kxk.0", out, inner, kernel)
        if scale:
            branch(f"{apple}.rbr_scale", f"{timm}.conv_scale", out, inner, 1)
        if skip:
            norm(f"{apple}.rbr_skip", f"{timm}.identity", out)

    def ffn(apple: str, timm: str, dim: int) -> None:
        branch(f"{apple}.convffn.conv", f"{timm}.mlp.conv", dim, 1, 7)
        conv(f"{apple}.convffn.fc1", f"{timm}.mlp.fc1", 4 * dim, dim, 1)
        conv(f"{apple}.convffn.fc2", f"{timm}.mlp.fc2", dim, 4 * dim, 1)

    def layer_scale(apple: str, timm: str, dim: int) -> None:
        entries.append(Entry(apple, f"{timm}.gamma", (dim, 1, 1)))

    first = arch.dims[0]
    for i, (inner, kernel) in enumerate(((3, 3), (1, 3), (first, 1))):
        scale = arch.stem_scale and kernel > 1
        mobileone(f"patch_embed.{i}", f"stem.{i}", first, inner, kernel, skip=i == 2, scale=scale)

    slot = 0  # Apple keeps stages, down-samplings and position encodings in one list
    for stage, (depth, dim) in enumerate(zip(arch.depths, arch.dims, strict=True)):
        if stage:
            apple, timm = f"network.{slot}.proj", f"stages.{stage}.downsample.proj"
            if training:
                branch(f"{apple}.0.lkb_origin", f"{timm}.0.large_conv", dim, 1, 7)
                branch(f"{apple}.0.small_conv", f"{timm}.0.small_conv", dim, 1, 3)
            else:
                conv(f"{apple}.0.lkb_reparam", f"{timm}.0.reparam_conv", dim, 1, 7)
            mobileone(f"{apple}.1", f"{timm}.1", dim, dim, 1, skip=True, scale=False)
            slot += 1
        if stage >= 3:
            own, theirs = ("pe", "pos_enc") if training else ("reparam_conv", "reparam_conv")
            conv(f"network.{slot}.{own}", f"stages.{stage}.pos_emb.{theirs}", dim, 1, 7)
            slot += 1
        for block in range(depth):
            apple, timm = f"network.{slot}.{block}", f"stages.{stage}.blocks.{block}"
            if stage >= 3:
                put(f"{apple}.norm.weight", f"{timm}.norm.weight", dim)
                put(f"{apple}.norm.bias", f"{timm}.norm.bias", dim)
                own, theirs = f"{apple}.token_mixer", f"{timm}.token_mixer"
                put(f"{own}.qkv.weight", f"{theirs}.qkv.weight", 3 * dim, dim)
                put(f"{own}.proj.weight", f"{theirs}.proj.weight", dim, dim)
                put(f"{own}.proj.bias", f"{theirs}.proj.bias", dim)
                layer_scale(f"{apple}.layer_scale_1", f"{timm}.layer_scale_1", dim)
                ffn(apple, timm, dim)
                layer_scale(f"{apple}.layer_scale_2", f"{timm}.layer_scale_2", dim)
                continue
            own, theirs = f"{apple}.token_mixer", f"{timm}.token_mixer"
            if training:
                norm(f"{own}.norm.rbr_skip", f"{theirs}.norm.identity", dim)
                mobileone(f"{own}.mixer", f"{theirs}.mixer", dim, 1, 3, skip=True, scale=True)
                layer_scale(f"{own}.layer_scale", f"{theirs}.layer_scale", dim)
            else:
                conv(f"{own}.reparam_conv", f"{theirs}.reparam_conv", dim, 1, 3)
            ffn(apple, timm, dim)
            layer_scale(f"{apple}.layer_scale", f"{timm}.layer_scale", dim)
        slot += 1

    last, wide = arch.dims[-1], 2 * arch.dims[-1]
    mobileone("conv_exp", "final_conv", wide, 1, 3, skip=False, scale=True)
    assert last * 2 == wide
    conv("conv_exp.se.reduce", "final_conv.se.fc1", wide // 16, wide, 1)
    conv("conv_exp.se.expand", "final_conv.se.fc2", wide, wide // 16, 1)
    put("head.proj", "head.fc.weight", wide, arch.head_dim)
    return entries


# The language model and the projector -------------------------------------------------------------

HIDDEN, LAYERS, HEADS, KV_HEADS, INTERMEDIATE = 64, 2, 4, 2, 128
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = (("\u010a", "\u010a"), ("a", "t"), ("c", "at"), (">", "\u010a"))  # \u010a is a line feed
TEXT_TOKENS = 256 + len(MERGES)
ENDOFTEXT, IM_START, IM_END = range(TEXT_TOKENS, TEXT_TOKENS + 3)
VOCABULARY = TEXT_TOKENS + 8  # a few rows more than the tokenizer has, as Qwen2's

TEXT_CONFIG: dict[str, Any] = {
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "max_position_embeddings": 4096,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV_HEADS,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "vocab_size": VOCABULARY,
}


def language(*, tied: bool = True, biases: bool = True) -> dict[str, Shape]:
    """Names and shapes of the language model, as Hugging Face has them (`model.layers...`)."""
    narrow = HIDDEN * KV_HEADS // HEADS
    out: dict[str, Shape] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        for part, rows in (("q", HIDDEN), ("k", narrow), ("v", narrow)):
            out[f"{layer}.self_attn.{part}_proj.weight"] = (rows, HIDDEN)
            if biases:
                out[f"{layer}.self_attn.{part}_proj.bias"] = (rows,)
        out[f"{layer}.self_attn.o_proj.weight"] = (HIDDEN, HIDDEN)
        out[f"{layer}.mlp.gate_proj.weight"] = (INTERMEDIATE, HIDDEN)
        out[f"{layer}.mlp.up_proj.weight"] = (INTERMEDIATE, HIDDEN)
        out[f"{layer}.mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
        out[f"{layer}.input_layernorm.weight"] = (HIDDEN,)
        out[f"{layer}.post_attention_layernorm.weight"] = (HIDDEN,)
    out["model.norm.weight"] = (HIDDEN,)
    if not tied:
        out["lm_head.weight"] = (VOCABULARY, HIDDEN)
    return out


def projector(arch: Arch = TINY) -> dict[str, Shape]:
    wide = 2 * arch.dims[-1]
    return {
        "model.mm_projector.0.weight": (HIDDEN, wide),
        "model.mm_projector.0.bias": (HIDDEN,),
        "model.mm_projector.2.weight": (HIDDEN, HIDDEN),
        "model.mm_projector.2.bias": (HIDDEN,),
    }


# Values -------------------------------------------------------------------------------------------


def value(name: str, shape: Shape, seed: int = 0) -> Array:
    """The tensor of this name: sized so that every part of the network has something to say."""
    if name.endswith("num_batches_tracked"):
        return np.array(7, np.int64)
    rng = np.random.default_rng([zlib.crc32(name.encode()), seed])
    noise = rng.standard_normal(shape, dtype=np.float32)
    if name.endswith("running_var"):
        return 1 + 0.5 * np.tanh(noise)
    if "layer_scale" in name:
        return 0.4 + 0.1 * noise
    if len(shape) == 1:
        return 1 + 0.2 * noise if name.endswith(".weight") else 0.1 * noise
    if any(
        part in name for part in ("patch_embed", ".proj.0", ".proj.1", "conv_exp", "projector.0")
    ):
        noise *= 2.2  # each GELU halves what is small: without this the picture would fade out
    return noise / np.sqrt(np.prod(shape[1:], dtype=np.float32))


def llava(*, training: bool = False, tied: bool = True, seed: int = 0) -> dict[str, Array]:
    """The whole model under the names of Apple's PyTorch checkpoints."""
    shapes = {APPLE_TOWER + e.apple: e.shape for e in encoder(training=training)}
    shapes |= projector() | language(tied=tied)
    return {name: value(name, shape, seed) for name, shape in shapes.items()}


# The other layouts, from LLaVA's ------------------------------------------------------------------


def as_mlx(tensors: Mapping[str, Array]) -> dict[str, Array]:
    """mlx-vlm's: convolutions (out, k, k, in), layer scales (1, 1, C), the stem in `blocks`."""
    out = {}
    for name, tensor in tensors.items():
        if name.startswith(APPLE_TOWER):
            if name.endswith("num_batches_tracked"):
                continue
            name = "vision_tower.vision_model." + name.removeprefix(APPLE_TOWER)
            name = name.replace(".patch_embed.", ".patch_embed.blocks.")
            if "layer_scale" in name:
                tensor = tensor.transpose(1, 2, 0)
            elif tensor.ndim == 4:
                tensor = tensor.transpose(0, 2, 3, 1)
        elif name.startswith("model.mm_projector."):
            name = name.removeprefix("model.")
        else:
            name = "language_model." + name
        out[name] = np.ascontiguousarray(tensor)
    return out


def as_transformers(tensors: Mapping[str, Array], *, training: bool = False) -> dict[str, Array]:
    """What `FastVlmForConditionalGeneration.save_pretrained` writes, encoder in timm's names."""
    timm = {APPLE_TOWER + e.apple: TIMM_TOWER + e.timm for e in encoder(training=training)}
    out = {}
    for name, tensor in tensors.items():
        if name in timm:
            name = timm[name]
            if name.endswith("head.fc.weight"):
                continue  # transformers builds the tower without a head
        elif name.startswith("model.mm_projector."):
            name = name.replace("mm_projector.0", "multi_modal_projector.linear_1")
            name = name.replace("mm_projector.2", "multi_modal_projector.linear_2")
        elif name.startswith("model."):
            name = "model.language_model." + name.removeprefix("model.")
        out[name] = tensor.reshape(-1) if name.endswith(".gamma") else tensor
    return out


def as_apple_mlx(tensors: Mapping[str, Array]) -> dict[str, Array]:
    """Apple's MLX export: language model and projector, the encoder being elsewhere."""
    out = {}
    for name, tensor in tensors.items():
        if name.startswith(APPLE_TOWER):
            continue
        if name.startswith("model.mm_projector."):
            name = name.replace("model.mm_projector.", "multi_modal_projector.linear_")
        else:
            name = "language_model." + name
        out[name] = tensor
    return out


# Configurations -----------------------------------------------------------------------------------

VISION_CONFIG: dict[str, Any] = {
    "architecture": "fastvit_mci3",
    "model_args": {"layers": list(TINY.depths), "embed_dims": list(TINY.dims)},
    "image_size": IMAGE_SIZE,
}


def llava_config() -> dict[str, Any]:
    return {
        **TEXT_CONFIG,
        "architectures": ["LlavaQwen2ForCausalLM"],
        "bos_token_id": ENDOFTEXT,
        "eos_token_id": IM_END,
        "image_aspect_ratio": "pad",
        "mm_hidden_size": 2 * TINY.dims[-1],
        "mm_patch_merge_type": "flat",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": f"mobileclip_l_{IMAGE_SIZE}",
        "model_type": "llava_qwen2",
        "tie_word_embeddings": True,
        "tokenizer_model_max_length": 512,
        "unfreeze_mm_vision_tower": True,
        "vision_config": VISION_CONFIG,
    }


def mlx_config() -> dict[str, Any]:
    """mlx-vlm's fields; its `downsamples` says what follows a stage; the last means nothing."""
    config = llava_config()
    config["model_type"] = "fastvlm"
    config["image_token_index"] = -200
    config["text_config"] = {**TEXT_CONFIG, "model_type": "fastvlm", "tie_word_embeddings": True}
    config["vision_config"] = {
        "model_type": "fastvlm",
        "cls_ratio": 2.0,
        "down_patch_size": 7,
        "down_stride": 2,
        "downsamples": [True] * 5,
        "embed_dims": list(TINY.dims),
        "image_size": IMAGE_SIZE,
        "layers": list(TINY.depths),
        "mlp_ratios": [4] * 5,
        "patch_size": 64,
        "pos_embs_shapes": [None, None, None, [7, 7], [7, 7]],
        "projection_dim": TINY.head_dim,
        "repmixer_kernel_size": 3,
        "token_mixers": ["repmixer"] * 3 + ["attention"] * 2,
    }
    return config


def transformers_config() -> dict[str, Any]:
    text = {k: v for k, v in TEXT_CONFIG.items() if k != "rope_theta"}
    return {
        "architectures": ["FastVlmForConditionalGeneration"],
        "image_token_index": IM_END + 1,
        "image_seq_length": PICTURE_TOKENS,
        "model_type": "fast_vlm",
        "projector_hidden_act": "gelu",
        "text_config": {
            **text,
            "eos_token_id": IM_END,
            "model_type": "qwen2",
            "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
            "tie_word_embeddings": True,
        },
        "tie_word_embeddings": True,
        "vision_config": {
            "architecture": "fastvit_mci3",
            "do_pooling": True,
            "global_pool": "avg",
            "hidden_size": 2 * TINY.dims[-1],
            "initializer_range": 0.02,
            "model_args": {**VISION_CONFIG["model_args"], "inference_mode": True},
            "model_type": "timm_wrapper",
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }


def apple_mlx_config() -> dict[str, Any]:
    return {**llava_config(), "image_token_index": IM_END + 1}


# MLX's side ---------------------------------------------------------------------------------------


def parameters(module: nn.Module) -> dict[str, mx.array]:
    """A module's parameters by their whole names."""
    flat: Any = tree_flatten(module.parameters())
    return dict(flat)


def read(folder: Path) -> dict[str, mx.array]:
    """The tensors of a folder with one file, as MLX reads them."""
    tensors: Any = mx.load(str(folder / "model.safetensors"))
    return dict(tensors)


# Folders ------------------------------------------------------------------------------------------

# Qwen2's template, with parts where a content is a list: a picture is `<image>` on its own line.
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if loop.first and m['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<image>\n{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(*, image_mark: bool = False) -> Tokenizer:
    """Bytes and four merges; the special tokens of Qwen2's conversations, perhaps `<image>`."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(hidden))]
    vocabulary = {letter: i for i, letter in enumerate([*letters, *("".join(m) for m in MERGES)])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=list(MERGES)))
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    marks = [*SPECIAL, "<image>"] if image_mark else SPECIAL
    made.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    return made


def write_tokenizer(folder: Path, *, image_mark: bool = False) -> None:
    tokenizer(image_mark=image_mark).save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "eos_token": "<|im_end|>",
        "model_max_length": 512,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_tensors(folder: Path, tensors: Mapping[str, Array], shards: int = 1) -> None:
    """As safetensors, in one file or, listed by an index, in several."""
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return
    listed: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in list(tensors)[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        listed |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": listed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write(
    folder: Path,
    layout: str = "llava",
    *,
    tensors: Mapping[str, Array] | None = None,
    config: Mapping[str, Any] | None = None,
    training: bool = False,
    shards: int = 1,
    seed: int = 0,
) -> Path:
    """A checkpoint folder in `layout`: llava, mlx, transformers or apple-mlx.

    Args:
        tensors: written as they are, in the place of the layout's own.
        config: entries that replace those of config.json; None takes one out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = llava(training=training, seed=seed)
    configs: dict[str, Callable[[], dict[str, Any]]] = {
        "llava": llava_config,
        "mlx": mlx_config,
        "transformers": transformers_config,
        "apple-mlx": apple_mlx_config,
    }
    if layout == "mlx":
        made = as_mlx(made)
    elif layout == "transformers":
        made = as_transformers(made, training=training)
    elif layout == "apple-mlx":
        made = as_apple_mlx(made)
    write_tensors(folder, made if tensors is None else tensors, shards)
    written = {**configs[layout](), **(config or {})}
    written = {k: v for k, v in written.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(written))
    ends = {"eos_token_id": [IM_END, ENDOFTEXT]}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    if layout == "transformers":
        size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        settings = {
            "crop_size": size,
            "do_center_crop": True,
            "do_pad": True,
            "image_mean": [0.0, 0.0, 0.0],
            "image_std": [1.0, 1.0, 1.0],
            "size": {"shortest_edge": IMAGE_SIZE},
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    write_tokenizer(folder, image_mark=layout in ("transformers", "apple-mlx"))
    return folder


def pictures(count: int = 1, size: int = IMAGE_SIZE, seed: int = 0) -> Array:
    """(count, size, size, 3) float32 in [0, 1]: squares of 16 pixels in random colours."""
    rng = np.random.default_rng([count, size, seed])
    squares = rng.random((count, size // 16, size // 16, 3), dtype=np.float32)
    return np.repeat(np.repeat(squares, 16, axis=1), 16, axis=2)
