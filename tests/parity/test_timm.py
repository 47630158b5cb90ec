"""The encoder against timm's, random weights and all, in training and in released form."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny

from fastvlm_mlx.config import ARCHITECTURES, FASTVITHD, MCI2, VisionConfig
from fastvlm_mlx.models.fastvit import FastViT
from fastvlm_mlx.weights.assemble import channels_last
from fastvlm_mlx.weights.folding import fold, fuse_branches
from fastvlm_mlx.weights.layouts import VISION, translate

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

pytestmark = pytest.mark.parity

SMALL_HD = replace(FASTVITHD, depths=(1, 2, 1, 1, 1), embed_dims=(8, 16, 32, 64, 128))
SMALL_MCI2 = replace(MCI2, depths=(1, 2, 1, 1), embed_dims=(16, 32, 64, 128))


def timm_model(config: VisionConfig, name: str, *, inference: bool) -> Any:
    """timm's network of this configuration, every tensor random."""
    torch.manual_seed(0)
    model = timm.create_model(
        name,
        num_classes=0,
        inference_mode=inference,
        layers=config.depths,
        embed_dims=config.embed_dims,
    )
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            if "gamma" in key:  # timm starts layer scales at 1e-5, which would hide every branch
                tensor.uniform_(0.2, 0.6)
            elif tensor.ndim == 1:
                tensor.add_(torch.randn_like(tensor) * 0.1)
    return model


def trained(model: Any, size: int) -> Any:
    """A few steps in training mode, so that BatchNorm has statistics that are not 0 and 1."""
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.rand(4, 3, size, size) * 2 - 0.5)
    return model


def ours(model: Any, config: VisionConfig) -> FastViT:
    tensors = {
        f"model.vision_tower.timm_model.{name}": tensor.numpy()
        for name, tensor in model.state_dict().items()
    }
    names = translate(tensors, config)
    assert names.unknown == [] and names.layout.name == "transformers"
    canonical = {
        target.removeprefix(VISION): channels_last(target, mx.array(tensors[name]), names.layout)
        for name, target in names.canonical.items()
    }
    fuse_branches(config, canonical)
    tower = FastViT(config)
    tower.load_weights(list(fold(config, canonical).items()))
    assert not canonical
    return tower


def compare(model: Any, config: VisionConfig, height: int, width: int) -> float:
    """Largest difference of the features over the largest feature."""
    model.eval()
    pixels = np.random.default_rng(0).random((2, height, width, 3), dtype=np.float32)
    with torch.no_grad():
        features = model.forward_features(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))
    expected = features.numpy().transpose(0, 2, 3, 1)
    found = np.array(ours(model, config)(mx.array(pixels)))
    assert found.shape == expected.shape
    assert expected.std() > 1e-4 * np.abs(expected).max() > 0
    return float(np.abs(found - expected).max() / np.abs(expected).max())


SMALL = [
    ("fastvit_mci3", SMALL_HD),
    ("fastvit_mci2", SMALL_MCI2),
    ("fastvit_mci0", replace(SMALL_MCI2, depths=(2, 1, 1, 1))),
    ("fastvit_mci4", replace(SMALL_HD, depths=(1, 1, 1, 2, 1))),
]


@pytest.mark.parametrize(("name", "config"), SMALL)
def test_training_form(name: str, config: VisionConfig) -> None:
    model = trained(timm_model(config, name, inference=False), 128)
    assert compare(model, config, 128, 192) < 1e-4


@pytest.mark.parametrize(("name", "config"), SMALL)
def test_released_form(name: str, config: VisionConfig) -> None:
    assert compare(timm_model(config, name, inference=True), config, 192, 128) < 1e-4


@pytest.mark.parametrize("name", ["fastvit_mci3", "fastvit_mci2"])
def test_timms_own_fusing_agrees(name: str) -> None:
    """Our fused weights are those that timm's `reparameterize_model` makes."""
    from timm.utils import reparameterize_model

    config = dict(SMALL)[name]
    model = trained(timm_model(config, name, inference=False), 128).eval()
    before = tiny.parameters(ours(model, config))
    after = tiny.parameters(ours(reparameterize_model(model), config))
    for key, value in before.items():
        assert np.allclose(np.array(value), np.array(after[key]), atol=1e-5), key


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fastvit_mci2", "fastvit_mci3"])
def test_full_size(name: str) -> None:
    """At 256 px, released form, every stage as published."""
    config = ARCHITECTURES[name]
    error = compare(timm_model(config, name, inference=True), config, 256, 256)
    print(f"{name} at 256 px: {error:.1e} of the largest feature")
    assert error < 1e-4


def test_names_of_the_tests_are_timms() -> None:
    """What the other tests call timm's names is what timm has."""
    for training in (False, True):
        model = timm_model(SMALL_HD, "fastvit_mci3", inference=not training)
        real = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        own = {e.timm: e.shape for e in tiny.encoder(training=training)}
        own.pop("head.fc.weight")
        own = {n: s[:1] if n.endswith(".gamma") else s for n, s in own.items()}
        real = {n: s[:1] if n.endswith(".gamma") else s for n, s in real.items()}
        assert own == real
