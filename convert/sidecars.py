"""The small files beside the weights, fit for fastvlm-mlx, mlx-vlm and mlx-swift-lm alike.

What each of the three insists on (mlx-vlm 0.7.10, mlx-swift-lm 1441444):

- The picture's token is -200 in mlx-vlm's and mlx-swift-lm's processors, which split the prompt at
  the text `<image>` and never look it up. So config.json says -200, the tokenizer stays as it came,
  and fastvlm-mlx gives `<image>` an id of its own at load.
- mlx-swift-lm reads `eos_token_id` of config.json as one number. The whole set is in
  generation_config.json, which all three read.
- mlx-swift-lm finds the language model's settings at the root of config.json, the others in
  `text_config`: they are in both. It wants every field of `vision_config`, a processor class in
  preprocessor_config.json, and a chat template that takes a message as a list of parts.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastvlm_mlx.config import (
    ARCHITECTURES,
    FASTVITHD,
    LLAVA_IMAGE_TOKEN_INDEX,
    ModelConfig,
    VisionConfig,
    picture_config,
    read_config,
    read_json,
)
from fastvlm_mlx.processing.processor import picture_processor
from fastvlm_mlx.processing.prompt import IMAGE_MARK, as_messages, chat_style

from .plan import Plan
from .source import Source

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_TERMS = re.compile(r"(licen[cs]e|notice|acknowledg|use_policy)", re.IGNORECASE)

# Of a published configuration: what names a place on its author's machine, code, or what is
# written anew.
_DROPPED = {
    "_name_or_path",
    "auto_map",
    "architectures",
    "dtype",
    "model_type",
    "quantization",
    "quantization_config",
    "rope_parameters",
    "text_config",
    "torch_dtype",
    "transformers_version",
    "vision_config",
    "image_token_id",
    "image_token_index",
}
# Of the flat settings, those that are not the language model's.
_NOT_TEXT = re.compile(r"^(mm_|image_|vision_|tune_|freeze_|unfreeze_|use_mm|tokenizer_|has_)")

# ChatML with Qwen2's default system message; a part of type image becomes `<image>` and a line.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if loop.first and message['role'] != 'system' %}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{%- endif %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['content'] is string %}"
    "{{- message['content'] }}"
    "{%- else %}"
    "{%- for part in message['content'] %}"
    "{%- if part['type'] in ['image', 'image_url', 'input_image'] %}{{- '<image>\\n' }}"
    "{%- elif 'text' in part %}{{- part['text'] }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- endif %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def write_sidecars(
    folder: Path,
    source: Source,
    config: ModelConfig,
    plan: Plan,
    tokenizer: Any,
    repairs: list[str],
) -> None:
    """Write everything but weights and model card. `tokenizer` is as mlx-lm loaded it from the
    source, unchanged. What had to be put right is added to `repairs`."""
    _copy_texts(folder, source)
    stops = stop_tokens(config, tokenizer, repairs)
    _write_tokenizer(folder, source, config, tokenizer, repairs)
    write_json(folder / "config.json", config_json(config, plan, stops))
    write_json(folder / "preprocessor_config.json", preprocessor_json(source, config))
    generation_file = source.find("generation_config.json")
    generation = read_json(generation_file) if generation_file else {}
    generation.pop("transformers_version", None)
    generation["eos_token_id"] = stops if len(stops) > 1 else stops[0] if stops else None
    write_json(folder / "generation_config.json", generation)


def write_json(path: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")


def stop_tokens(config: ModelConfig, tokenizer: Any, repairs: list[str]) -> list[int]:
    """Every id that ends an answer, the one that ends a turn first."""
    stops = {int(i) for i in config.eos_token_ids}
    before = set(stops)
    stops |= {int(i) for i in tokenizer.eos_token_ids}
    turn = tokenizer.get_vocab().get("<|im_end|>")
    if config.text["model_type"] == "qwen2" and turn is not None:
        stops.add(turn)
    if missing := stops - before:
        listed = ", ".join(map(str, sorted(missing)))
        repairs.append(f"eos_token_id: the configuration lacked {listed}, which ends an answer too")
    return sorted(stops, key=lambda i: (i != turn, i))


def config_json(config: ModelConfig, plan: Plan, stops: list[int]) -> dict[str, Any]:
    """config.json of the converted folder."""
    kind = config.text["model_type"]
    text = {
        name: value
        for name, value in config.text.items()
        if not _NOT_TEXT.match(name) and name not in _DROPPED - {"rope_parameters"}
    }
    text |= {"model_type": kind}
    flat = {} if config.model_type == "fast_vlm" else config.raw
    others = {n: v for n, v in flat.items() if n not in _DROPPED and n not in text}
    if isinstance(tower := others.get("mm_vision_tower"), str):
        others["mm_vision_tower"] = tower.rstrip("/").rpartition("/")[2]  # no path of its author
    written = {
        "tokenizer_padding_side": "right",
        **others,
        **{name: value for name, value in text.items() if name != "model_type"},
        "architectures": ["LlavaQwen2ForCausalLM"] if kind == "qwen2" else None,
        "model_type": f"llava_{kind}" if kind in ("qwen2", "llama", "mistral") else "fastvlm",
        "image_token_index": LLAVA_IMAGE_TOKEN_INDEX,
        "mm_hidden_size": config.vision.feature_dim,
        "mm_projector_type": config.projector.kind,
        "tokenizer_model_max_length": config.max_length,
        "eos_token_id": stops[0] if stops else None,
        "torch_dtype": plan.dtype,
        "text_config": text,
        "vision_config": vision_json(config.vision, plan.head_width),
    }
    if config.aspect == "pad":
        written["image_aspect_ratio"] = "pad"
    text["eos_token_id"] = written["eos_token_id"]
    if plan.quantization is not None:
        written["quantization"] = plan.quantization
        written["quantization_config"] = plan.quantization  # the hub's model tree looks here
    return {name: value for name, value in written.items() if value is not None}


def vision_json(vision: VisionConfig, head_width: int) -> dict[str, Any]:
    """`vision_config`, with every field that mlx-swift-lm insists on and those that depart from the
    named architecture. `downsamples` is in Apple's sense: after the stage."""
    architecture = _architecture(vision)
    fields: dict[str, Any] = {
        "model_type": "llava_qwen2",  # mlx-vlm takes this or "fastvlm"
        "architecture": architecture,
        "cls_ratio": vision.expansion,
        "down_patch_size": vision.downsample_kernel,
        "down_stride": 2,
        "downsamples": [*vision.downsamples[1:], True],
        "embed_dims": list(vision.embed_dims),
        "hidden_size": 1024,
        "image_size": vision.image_size,
        "intermediate_size": vision.feature_dim,
        "layer_scale_init_value": 1e-5,
        "layers": list(vision.depths),
        "mlp_ratios": [int(r) if r == int(r) else r for r in vision.mlp_ratios],
        "num_classes": 1000,
        "patch_size": vision.patch_size,
        "pos_embs_shapes": [[k, k] if k else None for k in vision.pos_emb_kernels],
        "projection_dim": head_width,
        "repmixer_kernel_size": vision.repmixer_kernel,
        "token_mixers": list(vision.token_mixers),
    }
    base = ARCHITECTURES[architecture]
    if vision.se_downsamples != base.se_downsamples:
        fields["se_downsamples"] = list(vision.se_downsamples)
    if vision.downsample_act != base.downsample_act:
        fields["lkc_use_act"] = vision.downsample_act
    return fields


def _architecture(vision: VisionConfig) -> str:
    """The named architecture that `vision` is, or is a variant of."""
    best = "fastvit_mci3"
    for name, base in ARCHITECTURES.items():
        same = replace(base, image_size=vision.image_size)
        if same == vision:
            return name
        if (len(base.depths), base.attention_norm) == (len(vision.depths), vision.attention_norm):
            best = best if len(ARCHITECTURES[best].depths) == len(vision.depths) else name
    return best


def is_fastvithd(vision: VisionConfig) -> bool:
    """Whether mlx-vlm and mlx-swift-lm can run this encoder: mlx-vlm builds no other."""
    return replace(vision, image_size=FASTVITHD.image_size) == FASTVITHD


def preprocessor_json(source: Source, config: ModelConfig) -> dict[str, Any]:
    """The picture processor's settings, in the one form that all readers share."""
    settings = next((s for f in source.folders if (s := picture_config(f))), {})
    pictures = picture_processor(config, settings)
    height, width = pictures.size
    crop_height, crop_width = pictures.output_size
    square = height == width
    return {
        "crop_size": {"height": crop_height, "width": crop_width},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": pictures.normalize,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(pictures.mean),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(pictures.std),
        "processor_class": "FastVLMProcessor",
        "resample": int(pictures.resample),
        "rescale_factor": pictures.rescale_factor,
        "size": {"shortest_edge": height} if square else {"height": height, "width": width},
    }


def source_config(source: Source) -> ModelConfig:
    """The source's configuration with the end-of-answer ids of every file that names some."""
    config = source.config
    stops = set(config.eos_token_ids)
    for folder in source.folders:
        if (folder / "generation_config.json").is_file():
            value = read_json(folder / "generation_config.json").get("eos_token_id")
            stops |= {value} if isinstance(value, int) else set(value or ())
    return replace(config, eos_token_ids=tuple(sorted(stops)))


def tokenizer_folder(source: Source) -> Path:
    """The folder whose tokenizer is the model's."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json")
    having = [f for f in source.folders if any((f / name).is_file() for name in names)]
    return having[0] if having else source.folders[0]


# Inside ---------------------------------------------------------------------------------------


def _copy_texts(folder: Path, source: Source) -> None:
    home = tokenizer_folder(source)
    for name in TOKENIZER_FILES:
        if (home / name).is_file():
            shutil.copyfile(home / name, folder / name)
    for place in source.folders:
        for file in sorted(place.iterdir()):
            plain = file.is_file() and file.suffix.lower() in ("", ".txt", ".md", ".pdf")
            if plain and _TERMS.search(file.name) and not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)


def _write_tokenizer(
    folder: Path, source: Source, config: ModelConfig, tokenizer: Any, repairs: list[str]
) -> None:
    """Make sure of tokenizer.json, which Swift needs, and of a template that places pictures."""
    if not (folder / "tokenizer.json").exists():
        backend = getattr(tokenizer._tokenizer, "backend_tokenizer", None)
        if backend is not None:
            backend.save(str(folder / "tokenizer.json"))
            repairs.append("tokenizer.json was missing: made from the tokenizer's other files")
    if config.text["model_type"] != "qwen2" or template_is_right(config, tokenizer):
        return
    settings_file = folder / "tokenizer_config.json"
    settings = read_json(settings_file) if settings_file.exists() else {}
    settings["chat_template"] = CHAT_TEMPLATE
    write_json(settings_file, settings)
    (folder / "chat_template.jinja").unlink(missing_ok=True)  # it would come before the other
    repairs.append("chat_template: missing, or with no place for pictures; replaced")


def template_is_right(config: ModelConfig, tokenizer: Any) -> bool:
    """Whether the tokenizer's own template makes the prompt that the model was trained on, from a
    message in plain text and from one in parts."""
    question = "What is this?"
    style = chat_style(config.text["model_type"])
    wanted = style.render(as_messages(question, 1, None, style))
    parts = [{"type": "image"}, {"type": "text", "text": question}]
    for content in (f"{IMAGE_MARK}\n{question}", parts):
        try:
            made = tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
        except Exception:  # whatever Jinja makes of it, it is no template for us
            return False
        if made != wanted:
            return False
    return True


__all__ = ["CHAT_TEMPLATE", "read_config", "write_sidecars"]
