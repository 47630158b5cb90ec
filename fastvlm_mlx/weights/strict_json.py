"""JSON out of files nobody vouches for: no key twice, no absurd numbers, no endless nesting."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from .lazy import shown

LARGEST_JSON = 100_000_000  # bytes; the bound the safetensors library keeps too


def read_strict(data: bytes) -> Any:
    """The value in `data`. Raises ValueError with a reason fit to end a sentence."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not valid UTF-8 (byte {error.start})") from error
    try:
        return json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=float,
            parse_constant=_constant,
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"is not valid JSON ({error.msg} at character {error.pos})") from error
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"names {shown(key)} twice")
        found[key] = value
    return found


def _integer(digits: str) -> int:
    # Turning a million digits into an integer takes quadratic time.
    if len(digits) > 20:
        raise ValueError(f"has a number of {len(digits)} digits")
    return int(digits)


def _constant(name: str) -> NoReturn:
    raise ValueError(f"holds {name}, which is not JSON")
