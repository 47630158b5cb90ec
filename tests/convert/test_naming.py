"""Names on disk: the reverse of what reading does, for every tensor of every layout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
from fastvlm_mlx.convert.naming import disk_name, disk_shape

from fastvlm_mlx.config import ARCHITECTURES, FASTVITHD
from fastvlm_mlx.weights import folding
from fastvlm_mlx.weights.layouts import LAYOUTS, VISION, translate

SMALL = replace(FASTVITHD, depths=tiny.TINY.depths, embed_dims=tiny.TINY.dims)
MLX = next(layout for layout in LAYOUTS if layout.name == "mlx")


def test_names_are_those_that_the_ecosystem_reads() -> None:
    written = {name for name in tiny.as_mlx(tiny.llava()) if not name.endswith("head.proj")}
    read = translate(tiny.llava(), SMALL).canonical.values()
    assert {disk_name(name, SMALL) for name in read} == written


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_what_is_written_is_read_back_under_the_same_name(architecture: str) -> None:
    config = ARCHITECTURES[architecture]
    names = [VISION + name for name in folding.expected_shapes(config)]
    on_disk = {disk_name(name, config): name for name in names}
    assert len(on_disk) == len(names)
    assert translate(on_disk, config, MLX).canonical == on_disk


def test_branches_of_training_have_names_too() -> None:
    names = translate(tiny.llava(training=True), SMALL).canonical.values()
    on_disk = {disk_name(name, SMALL): name for name in names}
    assert translate(on_disk, SMALL, MLX).canonical == on_disk


def test_scales_are_stored_as_rows_of_a_map() -> None:
    assert disk_shape("vision_tower.stages.0.blocks.0.layer_scale.gamma", (8,)) == (1, 1, 8)
    assert disk_shape("language_model.model.norm.weight", (8,)) == (8,)
