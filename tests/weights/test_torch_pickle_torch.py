"""The same readers on files that PyTorch itself wrote. Runs where torch is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.weights.files import open_tensors

torch: Any = pytest.importorskip("torch")
pytestmark = pytest.mark.parity


def state() -> dict[str, Any]:
    base = torch.arange(24.0).reshape(2, 3, 4)
    tied = torch.randn(5, 4)
    found = {
        "plain": base,
        "permuted": base.permute(2, 0, 1),
        "narrow": base[:, 1:, ::2],
        "expanded": torch.arange(3.0).expand(4, 3),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(tied),
        "tied": tied,
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "double": torch.randn(3, dtype=torch.float64),
        "complex": torch.randn(3, dtype=torch.complex64),
        "bool": torch.tensor([True, False]),
    }
    for kind in ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"):
        found[kind] = torch.randn(4, 6).to(getattr(torch, kind)).t()
    for kind in ("int8", "uint8", "int16", "int32", "int64", "uint16", "uint32"):
        found[kind] = torch.tensor([[1, 2], [3, 127]]).to(getattr(torch, kind))
    return found


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_agrees_with_torch(tmp_path: Path, zipped: bool, protocol: int) -> None:
    torch.manual_seed(0)
    expected = state()
    path = tmp_path / "x.pt"
    torch.save(
        {"state_dict": expected, "epoch": 3},
        path,
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=zipped,
    )
    with open_tensors(path) as tensors:
        assert tensors.ignored == {"epoch": "int"}
        assert list(tensors) == list(expected)
        for name, value in expected.items():
            value = value.detach()
            if value.is_floating_point() and value.dtype != torch.float64:
                value = value.float() if value.dtype != torch.float16 else value
            found = tensors[name].numpy()
            assert found.shape == tuple(value.shape), name
            assert np.array_equal(found, value.numpy()), name


def test_state_dict_of_a_module(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    torch.save(module.state_dict(), tmp_path / "pytorch_model.bin")
    with open_tensors(tmp_path) as tensors:
        assert set(tensors) == set(module.state_dict())
        assert tensors["1.num_batches_tracked"].numpy() == 0
        assert np.array_equal(tensors["0.weight"].numpy(), module[0].weight.detach().numpy())


def test_a_whole_module_is_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"refuses to run torch\.nn\.modules\.linear\.Linear"):
        open_tensors(tmp_path / "x.pt")


def test_a_torchscript_program_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "x.pt"))
    with pytest.raises(CheckpointError, match="TorchScript"):
        open_tensors(tmp_path / "x.pt")
