"""What one answer cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Stats:
    """Times in seconds, counts in tokens, memory in bytes.

    `ttft_s`, the time to first token, is preprocess + encode + project + prefill; loading the
    model, which happens once, is apart.
    """

    load_s: float = 0.0
    preprocess_s: float = 0.0  # opening the pictures and making pixels of them
    encode_s: float = 0.0  # vision tower
    project_s: float = 0.0  # mm_projector
    prefill_s: float = 0.0  # the prompt through the language model, to the first token
    decode_tokens_per_s: float = 0.0
    prompt_tokens: int = 0
    visual_tokens: int = 0
    generated_tokens: int = 0
    peak_memory_bytes: int = 0

    @property
    def ttft_s(self) -> float:
        return self.preprocess_s + self.encode_s + self.project_s + self.prefill_s

    def to_dict(self) -> dict[str, Any]:
        """Every figure by name, `ttft_s` included."""
        return asdict(self) | {"ttft_s": self.ttft_s}
