"""What a model is made of, read from any configuration a FastVLM checkpoint is published with.

One frozen dataclass a part. The tensors have the last word: where a published configuration is
known to lie (`tie_word_embeddings`, a missing `vision_config`), the loader corrects it from the
weights and says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .errors import ConfigError

# The id that LLaVA code puts where a picture belongs; never a row of the embedding table.
LLAVA_IMAGE_TOKEN_INDEX = -200


@dataclass(frozen=True)
class VisionConfig:
    """A FastViT-family encoder. Tuples run over the stages, from the finest to the coarsest.

    The first stage works at 1/4 of the picture's side (the stem has stride 4); every stage with
    `downsamples` halves it again. Sources: arXiv 2303.14189 (FastViT), 2311.17049 (MobileCLIP),
    2412.13303 (FastVLM).
    """

    depths: tuple[int, ...]
    embed_dims: tuple[int, ...]
    mlp_ratios: tuple[float, ...]
    token_mixers: tuple[str, ...]  # "repmixer" or "attention"
    pos_emb_kernels: tuple[int, ...]  # depthwise positional encoding before a stage; 0 = none
    downsamples: tuple[bool, ...]
    se_downsamples: tuple[bool, ...]  # squeeze-and-excite inside the down-sampling
    downsample_act: bool = True  # GELU after the large-kernel convolution
    attention_norm: str = "layer"  # "layer" (over channels) or "batch"
    head_dim: int = 32
    repmixer_kernel: int = 3
    downsample_kernel: int = 7
    expansion: float = 2.0  # width of the last convolution over that of the last stage
    image_size: int = 1024

    def __post_init__(self) -> None:
        lengths = {
            len(v)
            for v in (
                self.depths,
                self.embed_dims,
                self.mlp_ratios,
                self.token_mixers,
                self.pos_emb_kernels,
                self.downsamples,
                self.se_downsamples,
            )
        }
        if len(lengths) != 1:
            raise ConfigError("vision_config: every per-stage list must have one entry per stage")
        for what, values, most in (
            ("a depth", self.depths, 1_000),
            ("a width", self.embed_dims, 1 << 16),
            ("an MLP ratio", self.mlp_ratios, 64),
            ("image_size", (self.image_size,), 1 << 14),
        ):
            for value in values:
                if not 1 <= value <= most:
                    raise ConfigError(f"vision_config: {what} of {value} is out of range")
        unknown = set(self.token_mixers) - {"repmixer", "attention"}
        if unknown:
            raise ConfigError(f"vision_config: unknown token mixer {sorted(unknown)[0]!r}")
        if self.downsamples[:1] == (True,):
            raise ConfigError("vision_config: nothing comes before the first stage to down-sample")
        for narrow, wide, down in zip(
            self.embed_dims, self.embed_dims[1:], self.downsamples[1:], strict=False
        ):
            if wide % narrow if down else wide != narrow:
                raise ConfigError(
                    f"vision_config: no way from a stage of width {narrow} to one of {wide}"
                )
        for dim, mixer in zip(self.embed_dims, self.token_mixers, strict=True):
            if mixer == "attention" and dim % self.head_dim:
                raise ConfigError(
                    f"vision_config: width {dim} is not a multiple of the head size {self.head_dim}"
                )

    @property
    def patch_size(self) -> int:
        """Pixels of the picture's side behind one visual token (64 for FastViTHD)."""
        return 4 * 2 ** sum(self.downsamples)

    @property
    def feature_dim(self) -> int:
        """Channels of the feature map (3072 for FastViTHD)."""
        return int(self.embed_dims[-1] * self.expansion)

    @property
    def se_dim(self) -> int:
        """Bottleneck of the final squeeze-and-excite (ratio 1/16)."""
        return self.feature_dim // 16

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of visual tokens for a picture of `height` x `width` pixels."""
        return height // self.patch_size, width // self.patch_size


FASTVITHD = VisionConfig(
    depths=(2, 12, 24, 4, 2),
    embed_dims=(96, 192, 384, 768, 1536),
    mlp_ratios=(4, 4, 4, 4, 4),
    token_mixers=("repmixer", "repmixer", "repmixer", "attention", "attention"),
    pos_emb_kernels=(0, 0, 0, 7, 7),
    downsamples=(False, True, True, True, True),
    se_downsamples=(False,) * 5,
)

MCI2 = VisionConfig(
    depths=(4, 12, 24, 4),
    embed_dims=(80, 160, 320, 640),
    mlp_ratios=(3, 3, 3, 3),
    token_mixers=("repmixer", "repmixer", "repmixer", "attention"),
    pos_emb_kernels=(0, 0, 0, 7),
    downsamples=(False, True, True, True),
    se_downsamples=(False, False, True, True),
    attention_norm="batch",
    image_size=256,
)

# timm's names of the architectures (`vision_config.architecture` in transformers).
ARCHITECTURES: dict[str, VisionConfig] = {
    "fastvit_mci0": replace(MCI2, depths=(2, 6, 10, 2), embed_dims=(64, 128, 256, 512)),
    "fastvit_mci1": replace(MCI2, depths=(4, 12, 20, 4), embed_dims=(64, 128, 256, 512)),
    "fastvit_mci2": MCI2,
    "fastvit_mci3": FASTVITHD,
    "fastvit_mci4": replace(
        FASTVITHD, depths=(2, 12, 24, 4, 4), embed_dims=(128, 256, 512, 1024, 2048)
    ),
}

# How timm spells the fields that a `model_args` may override.
_TIMM_FIELDS = {
    "layers": "depths",
    "embed_dims": "embed_dims",
    "mlp_ratios": "mlp_ratios",
    "token_mixers": "token_mixers",
    "downsamples": "downsamples",
    "se_downsamples": "se_downsamples",
    "lkc_use_act": "downsample_act",
    "repmixer_kernel_size": "repmixer_kernel",
    "down_patch_size": "downsample_kernel",
    "cls_ratio": "expansion",
}


@dataclass(frozen=True)
class ProjectorConfig:
    """`mm_projector`: `linear`, `identity` or `mlpNx_gelu` (N linear layers, exact GELU)."""

    kind: str
    input_dim: int
    output_dim: int

    @property
    def depth(self) -> int:
        """Number of linear layers."""
        if self.kind == "identity":
            return 0
        if self.kind == "linear":
            return 1
        match = re.fullmatch(r"mlp(\d+)x_gelu", self.kind)
        if not match or not 1 <= int(match[1]) <= 16:
            raise ConfigError(
                f"mm_projector_type {self.kind!r} is unknown; "
                "expected linear, identity or mlpNx_gelu with N from 1 to 16"
            )
        return int(match[1])


@dataclass(frozen=True)
class ModelConfig:
    """A whole model: encoder, projector, language model, and how pictures and words meet.

    `text` is the language model's own configuration as mlx-lm reads it (with `model_type`).
    """

    vision: VisionConfig
    projector: ProjectorConfig
    text: dict[str, Any]
    model_type: str
    image_token_id: int = LLAVA_IMAGE_TOKEN_INDEX
    aspect: str = "pad"  # "pad", "crop" or "anyres": how a picture is made square
    eos_token_ids: tuple[int, ...] = ()
    max_length: int = 8192  # tokens, pictures expanded
    quantization: dict[str, Any] | None = None
    raw: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Read any published configuration (Apple's, mlx-vlm's, transformers', ours).

        Raises:
            ConfigError: a part is missing or describes something unsupported.
        """
        config = dict(config)
        model_type = config.get("model_type")
        if model_type == "llava-qwen2":
            raise ConfigError("model_type 'llava-qwen2' is Bunny, another model; not FastVLM")
        if model_type not in _TEXT_TYPES and "text_config" not in config:
            raise ConfigError(
                f"config.json: model_type {model_type!r} is not a FastVLM "
                f"(expected one of {', '.join(_TEXT_TYPES)})"
            )
        text = _text_config(config)
        vision = _vision_config(config)
        projector = ProjectorConfig(
            kind=config.get("mm_projector_type", "mlp2x_gelu"),
            input_dim=vision.feature_dim,
            output_dim=int(text["hidden_size"]),
        )
        _ = projector.depth  # an unknown kind is an error here, not at load
        image_token = config.get("image_token_index", config.get("image_token_id"))
        is_transformers = config.get("model_type") == "fast_vlm"
        return cls(
            vision=vision,
            projector=projector,
            text=text,
            model_type=str(model_type),
            image_token_id=LLAVA_IMAGE_TOKEN_INDEX if image_token is None else int(image_token),
            # transformers keeps the picture's treatment in the processor, which pads for FastVLM.
            aspect=_aspect(config.get("image_aspect_ratio", "pad" if is_transformers else None)),
            eos_token_ids=_ids(config.get("eos_token_id", text.get("eos_token_id"))),
            max_length=_max_length(config, text),
            quantization=config.get("quantization") or config.get("quantization_config"),
            raw=config,
        )

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary of the parsed parts, for `--json`."""
        parts = asdict(self)
        parts.pop("raw")
        return parts


# FastVLM's model types, and the mlx-lm architecture each has where nothing names one.
_TEXT_TYPES = {
    "llava_qwen2": "qwen2",
    "fastvlm": "qwen2",
    "fast_vlm": "qwen2",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava": "llama",
}

# Sizes that every language model states. Beyond these, building the model alone would never end.
_TEXT_LIMITS = {
    "hidden_size": 1 << 17,
    "num_hidden_layers": 1_000,
    "vocab_size": 1 << 24,
    "intermediate_size": 1 << 20,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
}

# What belongs to the picture's side of a flat LLaVA configuration, not to the language model.
_NOT_TEXT = re.compile(
    r"^(mm_|image_|vision_|tune_|freeze_|unfreeze_|use_mm|quantization|model_type)"
)


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object.

    Raises:
        ConfigError: missing, not UTF-8, not JSON, not an object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


def read_config(folder: Path) -> ModelConfig:
    """The configuration of the model in `folder`, with every file that has a say in it.

    `config.json` first; end-of-answer ids are the union with `generation_config.json`
    (the tokenizer adds its own at load); the picture size of a transformers folder comes from
    its processor files.
    """
    config = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    size = _processor_size(folder)
    try:
        eos = set(_ids(config.get("eos_token_id")))
        if isinstance(config.get("text_config"), dict):
            eos |= set(_ids(config["text_config"].get("eos_token_id")))
        if size and config.get("model_type") == "fast_vlm":
            config["vision_config"] = {**(config.get("vision_config") or {}), "image_size": size}
        parsed = ModelConfig.from_dict(config)
    except ConfigError as error:
        raise ConfigError(f"{folder / 'config.json'}: {error}") from None
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"{folder / 'config.json'}: malformed ({error!r})") from None
    if generation.exists():
        try:
            eos |= set(_ids(read_json(generation).get("eos_token_id")))
        except (TypeError, ValueError):
            raise ConfigError(f"{generation}: eos_token_id is not a number or a list") from None
    return replace(parsed, eos_token_ids=tuple(sorted(eos)))


def picture_config(folder: Path) -> dict[str, Any]:
    """The picture processor's settings, from whichever file holds them, or {}."""
    path = folder / "preprocessor_config.json"
    if path.exists():
        return read_json(path)
    path = folder / "processor_config.json"
    if path.exists():
        nested = read_json(path).get("image_processor", {})
        return nested if isinstance(nested, dict) else {}
    return {}


def _processor_size(folder: Path) -> int | None:
    settings = picture_config(folder)
    for key in ("crop_size", "size"):
        value = settings.get(key)
        if isinstance(value, Mapping):
            value = value.get("height") or value.get("shortest_edge") or value.get("longest_edge")
        if isinstance(value, int) and value > 0:
            return value
    return None


def _max_length(config: Mapping[str, Any], text: Mapping[str, Any]) -> int:
    """The lowest limit that is stated; 8192, the released models', where none is."""
    limits = (config.get("tokenizer_model_max_length"), text.get("max_position_embeddings"))
    return min((int(limit) for limit in limits if limit), default=8192)


def _aspect(value: Any) -> str:
    if value == "pad":
        return "pad"
    if isinstance(value, str) and value.startswith("anyres"):
        return "anyres"
    return "crop"  # LLaVA: without the setting, short side resized and the centre cut out


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(int(v) for v in value) if isinstance(value, list) else (int(value),)


def _text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's configuration: nested under `text_config`, or flat at the root."""
    flat = {k: v for k, v in config.items() if not _NOT_TEXT.match(k)}
    flat.pop("text_config", None)
    nested = config.get("text_config") or {}
    if not isinstance(nested, Mapping):
        raise ConfigError("text_config is not an object")
    text = {**flat, **nested} if config.get("model_type") != "fast_vlm" else dict(nested)
    text_type = nested.get("model_type") or _TEXT_TYPES.get(str(config.get("model_type")), "qwen2")
    # mlx-vlm copies the outer model type into the text configuration.
    text["model_type"] = _TEXT_TYPES.get(text_type, text_type)
    text.setdefault("num_key_value_heads", text.get("num_attention_heads"))
    for name, most in _TEXT_LIMITS.items():
        value = text.get(name)
        if value is None:
            raise ConfigError(f"the language model's {name} is missing")
        if type(value) is not int or not 1 <= value <= most:
            raise ConfigError(f"the language model's {name} is {value!r}, not from 1 to {most}")
    if text["num_attention_heads"] % text["num_key_value_heads"]:
        raise ConfigError("num_key_value_heads does not divide num_attention_heads")
    tied = nested.get("tie_word_embeddings", config.get("tie_word_embeddings"))
    if tied is not None:
        text["tie_word_embeddings"] = bool(tied)
    rope = text.get("rope_parameters")  # transformers 5 moved rope_theta in here
    if isinstance(rope, Mapping):
        text.setdefault("rope_theta", rope.get("rope_theta"))
        if rope.get("rope_type", "default") == "default":
            text.pop("rope_parameters")
    text.setdefault("rms_norm_eps", 1e-6)
    return {k: v for k, v in text.items() if v is not None}


def _vision_config(config: Mapping[str, Any]) -> VisionConfig:
    """The encoder: a named architecture, with the fields that the configuration overrides."""
    nested = config.get("vision_config") or {}
    if not isinstance(nested, Mapping):
        raise ConfigError("vision_config is not an object")
    architecture = nested.get("architecture", "fastvit_mci3")
    if architecture not in ARCHITECTURES:
        raise ConfigError(
            f"vision_config.architecture {architecture!r} is not supported "
            f"(known: {', '.join(ARCHITECTURES)})"
        )
    base = ARCHITECTURES[architecture]
    overrides: dict[str, Any] = {}
    for source in (nested.get("model_args") or {}, nested):
        for timm_name, name in _TIMM_FIELDS.items():
            if timm_name in source:
                value = source[timm_name]
                overrides[name] = tuple(value) if isinstance(value, list) else value
    if "pos_embs_shapes" in nested or overrides.get("downsamples", (False,))[0]:
        overrides |= _apple_stage_fields(nested)  # mlx-vlm's and mlx-swift-lm's own form
    size = nested.get("image_size") or _tower_size(config) or base.image_size
    stages = len(overrides.get("depths", base.depths))
    if stages != len(base.depths):
        raise ConfigError(f"vision_config: {architecture} has {len(base.depths)} stages")
    return replace(base, **overrides, image_size=int(size))


def _apple_stage_fields(nested: Mapping[str, Any]) -> dict[str, Any]:
    """The two lists that Apple's code counts otherwise than timm does.

    There `downsamples[i]` says whether stage i is *followed* by a down-sampling, the last one
    meaning nothing; a positional encoding is given by its kernel, [7, 7] or null.
    """
    fields: dict[str, Any] = {}
    if isinstance(kernels := nested.get("pos_embs_shapes"), list):
        fields["pos_emb_kernels"] = tuple(shape[0] if shape else 0 for shape in kernels)
    if isinstance(after := nested.get("downsamples"), list):
        fields["downsamples"] = (False, *map(bool, after[:-1]))
    return fields


def _tower_size(config: Mapping[str, Any]) -> int | None:
    """LLaVA names the tower with its picture size: `mobileclip_l_1024`."""
    match = re.search(r"_(\d+)$", str(config.get("mm_vision_tower", "")))
    return int(match[1]) if match else None
