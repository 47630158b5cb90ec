"""The command `fastvlm-mlx`: a file a command. Each parses, calls the library and prints; none has
logic of its own.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status. `argv` is without the program's name; None
    means sys.argv.
    """
    try:
        from fastvlm_mlx.cli.app import run

        return run(argv)
    except KeyboardInterrupt:
        return 130  # 128 + SIGINT, as shells count it
