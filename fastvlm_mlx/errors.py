"""Errors that a person reads: what is wrong, where, and what to do about it."""


class FastVLMError(Exception):
    """Base of every error raised on purpose. `exit_code` is what the command returns."""

    exit_code = 1


class UsageError(FastVLMError):
    """The request itself makes no sense: contradictory options, a number out of range."""

    exit_code = 2


class PictureError(FastVLMError):
    """A picture that cannot be read: missing, truncated, not a picture, too large."""

    exit_code = 2


class PromptError(FastVLMError):
    """A prompt that cannot be put together, such as more `<image>` marks than pictures."""

    exit_code = 2


class CheckpointError(FastVLMError):
    """Weights that cannot be read or do not fit the model; names the file and the tensor."""


class ConfigError(FastVLMError):
    """A configuration that is missing, unreadable or describes something unsupported."""


class HubError(FastVLMError):
    """A model that is neither here nor to be fetched: unknown, offline, no permission."""
