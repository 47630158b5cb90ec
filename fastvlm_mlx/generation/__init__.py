"""Answers about pictures, on mlx-lm's generation."""

from ..loading import load
from .answer import Response, generate, stream_generate
from .stats import Stats
from .summary import ModelSummary, describe_model

__all__ = [
    "ModelSummary",
    "Response",
    "Stats",
    "describe_model",
    "generate",
    "load",
    "stream_generate",
]
