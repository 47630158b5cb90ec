"""Figures as people read them."""

from __future__ import annotations

import pytest

from fastvlm_mlx.text import human_bytes, human_count, human_seconds, table


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1536, "1.5 kB"),
        (12e6, "12.0 MB"),
        (2.5e15, "2500.0 TB"),
    ],
)
def test_bytes(count: float, text: str) -> None:
    assert human_bytes(count) == text


def test_seconds_and_counts() -> None:
    assert human_seconds(0.0123) == "12.3 ms"
    assert human_seconds(1.5) == "1.50 s"
    assert [human_count(n) for n in (7, 1500, 125_070_000, 7 * 10**9)] == [
        "7",
        "1.50 k",
        "125.07 M",
        "7.00 G",
    ]


def test_tables_line_up_and_carry_no_blanks_at_the_end() -> None:
    assert table([("a", "1", "x"), ("bcd", "23")], right=(1,)) == "a     1  x\nbcd  23"
    assert table([]) == ""
