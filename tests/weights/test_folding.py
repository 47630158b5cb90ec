"""What folds must compute the same: against the unfolded network in plain NumPy (`naive`)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import naive
import numpy as np
import pytest
import tiny

from fastvlm_mlx.config import MCI2, ModelConfig
from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.models.fastvit import FastViT
from fastvlm_mlx.weights.assemble import assemble
from fastvlm_mlx.weights.folding import (
    expected_shapes,
    fold,
    fuse_branches,
    fused_convs,
)

Array = np.ndarray[Any, Any]
CONFIG = ModelConfig.from_dict(tiny.llava_config())
VISION = CONFIG.vision


def apple(*, training: bool, seed: int = 0) -> dict[str, Array]:
    """The encoder's tensors without their prefix."""
    tensors = tiny.llava(training=training, seed=seed)
    tower = tiny.APPLE_TOWER
    return {n.removeprefix(tower): t for n, t in tensors.items() if n.startswith(tower)}


def ours(tensors: dict[str, Array]) -> FastViT:
    """The running encoder from tensors by Apple's names."""
    named = {tiny.APPLE_TOWER + name: mx.array(t) for name, t in tensors.items()}
    made = assemble(CONFIG, named)
    tower = FastViT(VISION)
    tower.load_weights([(n.removeprefix("vision_tower."), t) for n, t in made.items()])
    return tower


def close(found: mx.array | Array, expected: Array, tolerance: float = 2e-5) -> None:
    found = np.array(found)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


# Whole --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", [(64, 64), (128, 192)])
def test_encoder(training: bool, size: tuple[int, int]) -> None:
    tensors = apple(training=training)
    pixels = np.random.default_rng(0).random((*size, 3), dtype=np.float32)
    expected = naive.encode(pixels, tensors, tiny.TINY.depths)
    assert expected.std() > 0.01
    close(ours(tensors)(mx.array(pixels)[None])[0], expected, 1e-4)


def test_no_batch_norm_scale_or_branch_is_left() -> None:
    names = set(tiny.parameters(ours(apple(training=True))))
    forbidden = ("bn", "gamma", "running", "rbr", "conv_kxk", "identity", "reparam", "layer_scale")
    assert not [name for name in names if any(word in name for word in forbidden)]


def test_folding_fits_the_model_to_the_name() -> None:
    """For every family member: all that the model wants, no more, of the right shape."""
    for vision in (VISION, replace(MCI2, depths=(1, 1, 1, 1), embed_dims=(16, 32, 64, 128))):
        folded = fold(vision, {n: mx.zeros(s) for n, s in expected_shapes(vision).items()})
        wanted = tiny.parameters(FastViT(vision))
        assert {n: t.shape for n, t in folded.items()} == {n: t.shape for n, t in wanted.items()}


# Part by part -------------------------------------------------------------------------------------


# Our name of a convolution, Apple's, how it is drawn, its stride.
PARTS = [
    ("stem.0", "patch_embed.0", naive.mobileone, 2),
    ("stem.1", "patch_embed.1", naive.mobileone, 2),
    ("stem.2", "patch_embed.2", naive.mobileone, 1),
    ("stages.0.blocks.0.token_mixer", "network.0.0.token_mixer", naive.repmixer, 1),
    ("stages.1.downsample.proj.0", "network.1.proj.0", naive.large_kernel, 2),
    ("stages.1.downsample.proj.1", "network.1.proj.1", naive.mobileone, 1),
    ("stages.3.pos_emb", "network.6", naive.position, 1),
    ("final_conv", "conv_exp", naive.mobileone, 1),
]


def canonical(tensors: dict[str, Array], entries: list[tiny.Entry]) -> dict[str, mx.array]:
    """By timm's names, channels last, as folding takes them."""
    timm = {entry.apple: entry.timm for entry in entries}
    out = {}
    for name, tensor in tensors.items():
        if name.endswith(("num_batches_tracked", "head.proj")):
            continue
        if tensor.ndim == 4:
            tensor = tensor.transpose(0, 2, 3, 1)
        out[timm[name]] = mx.array(tensor.reshape(-1) if "layer_scale" in name else tensor)
    return out


@pytest.mark.parametrize(("ours", "theirs", "draw", "stride"), PARTS)
def test_fused_convolution(ours: str, theirs: str, draw: Any, stride: int) -> None:
    """One convolution with its bias does what the drawn branches do, borders included."""
    tensors = apple(training=True, seed=1)
    named = canonical(tensors, tiny.encoder(training=True))
    conv = next(conv for conv in fused_convs(VISION) if conv.name == ours)
    assert fuse_branches(VISION, named) == len(list(fused_convs(VISION)))
    assert set(named) == set(expected_shapes(VISION))

    groups = 3 if ours == "stem.0" else conv.in_per_group
    inputs = groups if conv.in_per_group > 1 else conv.out_dim
    if conv.kind == "large" or ours == "final_conv":
        inputs = conv.out_dim // 2
    x = np.random.default_rng(2).standard_normal((inputs, 10, 12))
    arguments = (x, tensors, theirs, stride) if draw is naive.mobileone else (x, tensors, theirs)
    weight = np.array(named[f"{ours}.reparam_conv.weight"]).transpose(0, 3, 1, 2)
    bias = np.array(named[f"{ours}.reparam_conv.bias"])
    close(naive.conv(x, weight, bias, stride), draw(*arguments), 1e-6)


def test_many_branches() -> None:
    """MobileOne may train several k x k branches, not only one."""
    tensors = apple(training=True)
    entries = tiny.encoder(training=True)
    extra = [e for e in entries if e.apple.startswith("patch_embed.0.rbr_conv.0.")]
    for entry in extra:
        name = entry.apple.replace("rbr_conv.0", "rbr_conv.1")
        entries.append(entry._replace(apple=name, timm=entry.timm.replace("kxk.0", "kxk.1")))
        tensors[name] = tiny.value(name, entry.shape)
    pixels = np.random.default_rng(0).random((64, 64, 3), dtype=np.float32)
    close(
        ours(tensors)(mx.array(pixels)[None])[0],
        naive.encode(pixels, tensors, tiny.TINY.depths),
        1e-4,
    )


def test_some_convolutions_fused_already() -> None:
    """A checkpoint may mix both forms, down to the parts of a RepMixer."""
    mixed = apple(training=True)
    released = apple(training=False)
    for name in [n for n in mixed if n.startswith("network.1.proj.1.")]:
        del mixed[name]
    for part in ("weight", "bias"):
        name = f"network.1.proj.1.reparam_conv.{part}"
        mixed[name] = released[name]
    pixels = np.random.default_rng(0).random((64, 64, 3), dtype=np.float32)
    expected = naive.encode(pixels, mixed, tiny.TINY.depths)
    close(ours(mixed)(mx.array(pixels)[None])[0], expected, 1e-4)


def test_layer_scale_and_norms_are_folded() -> None:
    """The values themselves, for one block of each kind."""
    tensors = apple(training=False)
    tower = tiny.parameters(ours(tensors))
    scale = tensors["network.0.0.layer_scale"].reshape(-1)
    fc2 = tensors["network.0.0.convffn.fc2.weight"][:, :, 0, 0]
    close(tower["stages.0.blocks.0.mlp.fc2.weight"], fc2 * scale[:, None])
    close(
        tower["stages.0.blocks.0.mlp.fc2.bias"],
        tensors["network.0.0.convffn.fc2.bias"] * scale,
    )
    scale = tensors["network.7.0.layer_scale_1"].reshape(-1)
    weight = tensors["network.7.0.token_mixer.proj.weight"]
    close(tower["stages.3.blocks.0.token_mixer.proj.weight"], weight * scale[:, None])
    close(
        tower["stages.3.blocks.0.token_mixer.proj.bias"],
        tensors["network.7.0.token_mixer.proj.bias"] * scale,
    )


def test_a_batch_norm_before_attention_goes_into_its_projection() -> None:
    """MobileCLIP's encoders normalise with BatchNorm, which gives qkv a bias."""
    vision = replace(MCI2, depths=(1, 1, 1, 1), embed_dims=(16, 32, 64, 128))
    rng = np.random.default_rng(0)
    tensors = {
        name: mx.array(rng.random(shape, dtype=np.float32) + 0.1)
        for name, shape in expected_shapes(vision).items()
    }
    block = "stages.3.blocks.0"
    norm = {f"n.{p}": np.array(tensors[f"{block}.norm.{p}"]) for p in tiny.BN}
    weight = np.array(tensors[f"{block}.token_mixer.qkv.weight"])
    folded = fold(vision, tensors)
    x = rng.standard_normal((128, 3, 5))
    expected = weight @ naive.batch_norm(x, norm, "n").reshape(128, -1)
    found = np.array(folded[f"{block}.token_mixer.qkv.weight"]) @ x.reshape(128, -1)
    found += np.array(folded[f"{block}.token_mixer.qkv.bias"])[:, None]
    close(found, expected, 1e-5)


# Incomplete ---------------------------------------------------------------------------------------

# Each would silently give another network if the branch were taken for absent by design.
NEEDED = [
    "patch_embed.0.rbr_conv.0.conv.weight",
    "patch_embed.0.rbr_conv.0.bn.running_var",
    "patch_embed.2.rbr_skip.bias",
    "network.0.0.token_mixer.layer_scale",
    "network.0.0.token_mixer.norm.rbr_skip.running_mean",
    "network.0.0.token_mixer.mixer.rbr_scale.conv.weight",
    "network.0.0.token_mixer.mixer.rbr_skip.weight",
    "network.1.proj.0.lkb_origin.conv.weight",
    "network.1.proj.0.small_conv.bn.weight",
    "network.1.proj.1.rbr_skip.running_var",
    "network.6.pe.bias",
    "conv_exp.rbr_conv.0.conv.weight",
    "conv_exp.rbr_scale.conv.weight",
]


@pytest.mark.parametrize("name", NEEDED)
def test_a_branch_that_lacks_a_tensor(name: str) -> None:
    tensors = apple(training=True)
    del tensors[name]
    timm = {e.apple: e.timm for e in tiny.encoder(training=True)}[name]
    with pytest.raises(CheckpointError, match="branches are incomplete") as error:
        ours(tensors)
    assert timm in str(error.value)


@pytest.mark.parametrize(
    "branch",
    [
        "conv_exp.rbr_scale",
        "network.0.0.token_mixer.mixer.rbr_conv.0",
        "network.1.proj.0.small_conv",
    ],
)
def test_a_branch_that_is_missing_as_a_whole(branch: str) -> None:
    tensors = {n: t for n, t in apple(training=True).items() if not n.startswith(branch + ".")}
    with pytest.raises(CheckpointError, match="branches are incomplete"):
        ours(tensors)


def test_left_over_parts_of_a_branch_are_reported() -> None:
    tensors = apple(training=True)
    tensors["patch_embed.1.rbr_scale.bn.weight"] = np.ones(8, np.float32)
    with pytest.raises(CheckpointError, match=r"unexpected: .*patch_embed\.1\.rbr_scale\.bn"):
        ours(tensors)
