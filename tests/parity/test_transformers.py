"""A checkpoint that transformers itself saved: our logits and answers against its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny

from fastvlm_mlx.generation import stream_generate
from fastvlm_mlx.loading import load_folder

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

N = tiny.PICTURE_TOKENS
IMAGE = tiny.IM_END + 1


def reference(tied: bool) -> Any:
    torch.manual_seed(0)
    config = tiny.transformers_config()
    config["text_config"]["tie_word_embeddings"] = config["tie_word_embeddings"] = tied
    settings = transformers.FastVlmConfig(
        **{k: v for k, v in config.items() if k not in ("architectures", "model_type")}
    )
    model = transformers.FastVlmForConditionalGeneration(settings).eval()
    # The tests' own values: layer scales of 1e-5, timm's start, would hide most of the network.
    own = tiny.as_transformers(tiny.llava(tied=tied))
    parameters = model.state_dict()
    for name, tensor in own.items():
        parameters[name].copy_(torch.from_numpy(tensor).reshape(parameters[name].shape))
    left = parameters.keys() - own.keys()
    assert left <= {"lm_head.weight"}
    return model


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("saved")
    model = reference(request.param)
    model.save_pretrained(folder)
    tiny.write_tokenizer(folder, image_mark=True)
    size = {"height": tiny.IMAGE_SIZE, "width": tiny.IMAGE_SIZE}
    settings = {"crop_size": size, "size": {"shortest_edge": tiny.IMAGE_SIZE}}
    settings |= {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}  # type: ignore[dict-item]
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return model, folder


def test_logits(both: tuple[Any, Path]) -> None:
    theirs, folder = both
    ours, _ = load_folder(folder)
    assert ours.loaded_from.layout == "transformers" and ours.loaded_from.repairs == []
    ids = [1, 2, *[IMAGE] * N, 3, *[IMAGE] * N, 4, 5]
    pixels = tiny.pictures(2)
    with torch.no_grad():
        expected = theirs(
            input_ids=torch.tensor([ids]),
            pixel_values=torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()),
        ).logits.numpy()
    found = np.array(ours(mx.array([ids]), pixel_values=mx.array(pixels)))
    error = np.abs(found - expected).max()
    print(f"largest difference {error:.1e}, largest logit {np.abs(expected).max():.1f}")
    assert expected.std() > 0.05
    assert error < 1e-4 * np.abs(expected).max()
    other = np.array(ours(mx.array([ids]), pixel_values=mx.array(tiny.pictures(2, seed=9))))
    assert np.abs(other - found).max() > 100 * error


def test_greedy_answer(both: tuple[Any, Path]) -> None:
    theirs, folder = both
    ours, processor = load_folder(folder)
    picture = (tiny.pictures(1)[0] * 255).astype(np.uint8)
    ids = processor.prompt("What is this?", [N]).token_ids
    pixels = torch.from_numpy(processor.pixels([picture])[0].transpose(2, 0, 1).copy())[None]
    with torch.no_grad():
        expected = theirs.generate(
            input_ids=torch.tensor([ids]),
            pixel_values=pixels,
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=sorted(processor.tokenizer.eos_token_ids),
            pad_token_id=tiny.ENDOFTEXT,
        )[0, len(ids) :].tolist()
    responses = stream_generate(ours, processor, "What is this?", [picture], max_tokens=12)
    assert [r.token for r in responses] == expected


def test_parts_are_named_as_the_tests_name_them(both: tuple[Any, Path]) -> None:
    from safetensors.numpy import load_file

    saved = load_file(both[1] / "model.safetensors")
    tied = "lm_head.weight" not in saved
    written = tiny.as_transformers(tiny.llava(tied=tied))
    assert {n: t.size for n, t in saved.items()} == {n: t.size for n, t in written.items()}
