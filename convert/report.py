"""What a conversion did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# Called as progress(stage, done, total), in bytes; stages: "unpack", "write", "check".
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PartReport:
    """One part of the model as it lies on disk now."""

    bytes: int
    parameters: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.parameters if self.parameters else 0.0


@dataclass
class ConvertReport:
    """The outcome. `repairs` is what the source said wrongly of itself; `notes` the rest that a
    person should know; `kept` the layers that were to be quantised and stayed whole, with why."""

    target: Path
    source: str
    source_layout: str
    repairs: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    parts: dict[str, PartReport] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)  # name -> bytes
    source_sha256: dict[str, str] = field(default_factory=dict)  # file -> digest
    quantization: dict[str, Any] | None = None
    verification: Any = None  # whatever the check that was passed to `convert` returned
    seconds: float = 0.0

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts.values())

    @property
    def bits_per_weight(self) -> float:
        parameters = sum(part.parameters for part in self.parts.values())
        return 8 * self.bytes / parameters if parameters else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        values = asdict(self)
        values["target"] = str(self.target)
        for name, part in self.parts.items():
            values["parts"][name]["bits_per_weight"] = round(part.bits_per_weight, 3)
        values["bits_per_weight"] = round(self.bits_per_weight, 3)
        if hasattr(self.verification, "to_dict"):
            values["verification"] = self.verification.to_dict()
        return values
