"""Every published name finds its place, and what is not FastVLM is refused."""

from __future__ import annotations

from typing import Any

import pytest
import tiny

from fastvlm_mlx.config import FASTVITHD, MCI2, VisionConfig
from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.weights.folding import expected_shapes
from fastvlm_mlx.weights.layouts import (
    LANGUAGE,
    VISION,
    apple_network_index,
    network_slots,
    recognise,
    translate,
)

FULL = tiny.encoder(tiny.FASTVITHD)


def apple_mlx_name(apple: str) -> str:
    return "vision_tower.vision_model." + apple.replace("patch_embed.", "patch_embed.blocks.")


NAMES = {
    "llava": [tiny.APPLE_TOWER + entry.apple for entry in FULL],
    "mlx": [apple_mlx_name(entry.apple) for entry in FULL],
    "transformers": [tiny.TIMM_TOWER + entry.timm for entry in FULL],
}


@pytest.mark.parametrize("layout", NAMES)
def test_fastvithd_is_complete(layout: str) -> None:
    """Released names, one for one, in the order and with the shapes that folding expects."""
    names = translate(NAMES[layout], FASTVITHD)
    expected = expected_shapes(FASTVITHD)
    assert names.layout.name == layout
    assert names.unknown == []
    assert sorted(names.canonical.values()) == sorted(VISION + name for name in expected)
    ignored = {name.rpartition(".")[2] for name in names.ignored}
    assert ignored <= {"num_batches_tracked", "proj", "weight"}
    for source, entry in zip(NAMES[layout], FULL, strict=True):
        if source not in names.canonical:
            continue
        shape = entry.shape
        if len(shape) == 4:
            shape = (shape[0], *shape[2:], shape[1])
        elif "layer_scale" in source:
            shape = shape[:1]
        assert expected[names.canonical[source].removeprefix(VISION)] == shape, source


@pytest.mark.parametrize("layout", NAMES)
def test_two_names_never_meet(layout: str) -> None:
    canonical = translate(NAMES[layout], FASTVITHD).canonical
    assert len(set(canonical.values())) == len(canonical)


def test_training_names_are_the_same_in_both_spellings() -> None:
    vision = VisionConfig(
        **{
            **FASTVITHD.__dict__,
            "depths": tiny.TINY.depths,
            "embed_dims": tiny.TINY.dims,
        }
    )
    entries = tiny.encoder(training=True)
    apple = translate([tiny.APPLE_TOWER + e.apple for e in entries], vision)
    timm = translate([tiny.TIMM_TOWER + e.timm for e in entries], vision)
    assert apple.unknown == timm.unknown == []
    for entry in entries:
        ours = apple.canonical.get(tiny.APPLE_TOWER + entry.apple)
        assert ours == timm.canonical.get(tiny.TIMM_TOWER + entry.timm)


@pytest.mark.parametrize("layout", ["llava", "mlx", "transformers", "apple-mlx"])
@pytest.mark.parametrize("tied", [True, False])
def test_language_model_and_projector(layout: str, tied: bool) -> None:
    tensors = tiny.llava(tied=tied)
    convert: dict[str, Any] = {
        "llava": dict,
        "mlx": tiny.as_mlx,
        "transformers": tiny.as_transformers,
        "apple-mlx": tiny.as_apple_mlx,
    }
    names = translate(convert[layout](tensors), FASTVITHD)
    found = [n for n in names.canonical.values() if not n.startswith(VISION)]
    expected = [LANGUAGE + name for name in tiny.language(tied=tied)]
    expected += [name.removeprefix("model.") for name in tiny.projector()]
    assert names.unknown == []
    assert sorted(found) == sorted(expected)


def test_transformers_older_names() -> None:
    """transformers 4 kept `model` out of the names, and a whole language model inside."""
    names = translate(
        [
            "vision_tower.timm_model.stem.0.reparam_conv.weight",
            "multi_modal_projector.linear_2.bias",
            "language_model.model.layers.3.mlp.up_proj.weight",
            "language_model.lm_head.weight",
        ],
        FASTVITHD,
    )
    assert list(names.canonical.values()) == [
        "vision_tower.stem.0.reparam_conv.weight",
        "mm_projector.2.bias",
        "language_model.model.layers.3.mlp.up_proj.weight",
        "language_model.lm_head.weight",
    ]


@pytest.mark.parametrize(
    ("name", "tower"),
    [("model.mm_projector.weight", "llava"), ("mm_projector.weight", "mlx")],
)
def test_a_linear_projector_has_no_index(name: str, tower: str) -> None:
    names = translate([NAMES[tower][0], name], FASTVITHD)
    assert names.canonical[name] == "mm_projector.0.weight"


def test_quantised_parts_keep_their_endings() -> None:
    names = translate(
        ["multi_modal_projector.linear_0.scales", "language_model.model.embed_tokens.biases"],
        FASTVITHD,
    )
    assert names.canonical == {
        "multi_modal_projector.linear_0.scales": "mm_projector.0.scales",
        "language_model.model.embed_tokens.biases": "language_model.model.embed_tokens.biases",
    }


def test_what_plays_no_part_is_ignored() -> None:
    names = translate(
        [
            NAMES["llava"][0],
            "model.vision_tower.vision_tower.model.head.proj",
            "model.layers.0.self_attn.rotary_emb.inv_freq",
            "model.image_newline",
        ],
        FASTVITHD,
    )
    assert len(names.ignored) == 3 and len(names.canonical) == 1 and not names.unknown


def test_strangers_are_listed_by_their_own_names() -> None:
    strange = [
        "model.layer.0.weight",
        "optimizer.step",
        tiny.APPLE_TOWER + "network.99.0.layer_scale",
    ]
    names = translate([NAMES["llava"][0], *strange], FASTVITHD)
    assert names.unknown == strange


def test_text_only_models_are_refused() -> None:
    with pytest.raises(CheckpointError, match="language model alone"):
        recognise(tiny.language())


def test_bunny_is_refused() -> None:
    """Bunny (`llava-qwen2`) has SigLIP where FastVLM has its encoder."""
    siglip = "model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
    with pytest.raises(CheckpointError, match="no vision tower of FastVLM"):
        recognise([siglip, "model.mm_projector.0.weight", *tiny.language()])


@pytest.mark.parametrize("names", [[], ["a"], ["transformer.h.0.attn.c_attn.weight"]])
def test_other_models_are_refused(names: list[str]) -> None:
    with pytest.raises(CheckpointError, match="any FastVLM checkpoint"):
        recognise(names)


def test_the_flat_list_of_apples_code() -> None:
    """Stages, down-samplings and position encodings share one numbering."""
    index = apple_network_index(FASTVITHD)
    assert index["stages.0.blocks."] == 0
    assert index["stages.1.downsample."] == 1
    assert index["stages.3.pos_emb."] == 6
    assert index["stages.4.blocks."] == 10
    assert list(index) == list(network_slots(FASTVITHD))
    assert "stages.3.pos_emb." in apple_network_index(MCI2)
