"""Data parallelism over processes of one machine.

On a CPU one single-threaded process per core trains about twice as fast as one process with as
many threads, because the layers here are too small to be worth sharing out.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta

import torch
from torch import distributed, nn


def run(function: Callable[..., None], ranks: int, *arguments: object) -> None:
    """Call `function(rank, ranks, *arguments)` in `ranks` processes."""
    if ranks == 1:
        function(0, 1, *arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(
            _start, (function, ranks, os.path.join(folder, "store"), arguments), ranks
        )


def _start(
    rank: int, function: Callable[..., None], ranks: int, store: str, arguments: tuple
) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(minutes=30),
    )
    try:
        function(rank, ranks, *arguments)
    finally:
        distributed.destroy_process_group()


def average_gradients(parameters: list[nn.Parameter], ranks: int) -> None:
    """Replace every gradient by its mean over the ranks, in one exchange."""
    if ranks == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([p.grad.reshape(-1) for p in parameters])
    distributed.all_reduce(flat)
    flat.div_(ranks)
    offset = 0
    for parameter in parameters:
        count = parameter.numel()
        parameter.grad.copy_(flat[offset : offset + count].view_as(parameter))
        offset += count


def sum_over_ranks(values: list[float], ranks: int) -> list[float]:
    """Sum a few numbers over the ranks."""
    if ranks == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64)
    distributed.all_reduce(tensor)
    return tensor.tolist()
