"""The root of the command line: the table of commands, the options that all of them share, and what
becomes of errors.

Nothing here imports a command's module before that command is asked for, and no command's module
imports MLX, numpy or Pillow before it runs: `fastvlm-mlx --help` has to answer at once.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperGroup

from fastvlm_mlx import __version__
from fastvlm_mlx.errors import FastVLMError

PROGRAM = "fastvlm-mlx"


class CommandEntry(NamedTuple):
    """A command: its name, the module whose function `command` does it, and its line in the
    help.
    """

    name: str
    module: str
    help: str


# To add a command, write its module (a function `command`, and `EXAMPLES` for the end of its help)
# and a line here.
COMMANDS = (
    CommandEntry("generate", "fastvlm_mlx.cli.generate", "Answer a question about pictures."),
    CommandEntry(
        "download", "fastvlm_mlx.cli.download", "Fetch a model from the hub into the local cache."
    ),
    CommandEntry(
        "info", "fastvlm_mlx.cli.info", "Show a model's parts, size, resolution and memory."
    ),
    CommandEntry(
        "convert", "fastvlm_mlx.cli.convert", "Convert any checkpoint to MLX, quantised or not."
    ),
    CommandEntry(
        "inspect", "fastvlm_mlx.cli.inspect", "Look into a checkpoint, even a broken one."
    ),
    CommandEntry("doctor", "fastvlm_mlx.cli.doctor", "Check this machine and say what to improve."),
)

EXAMPLES = f"""\b
Examples:
  {PROGRAM} generate --image cat.jpg "What is this?"
  {PROGRAM} download apple/FastVLM-0.5B
  {PROGRAM} COMMAND --help
"""


class LazyGroup(TyperGroup):
    """A group whose commands are in a table and are imported when they are used."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [entry.name for entry in COMMANDS]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        entry = next((entry for entry in COMMANDS if entry.name == cmd_name), None)
        if entry is None:
            return None
        module = importlib.import_module(entry.module)
        single = typer.Typer(
            add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
        )
        single.command(
            name=entry.name,
            epilog=module.EXAMPLES,
            short_help=entry.help,
            context_settings={"help_option_names": ["-h", "--help"]},
        )(module.command)
        return typer.main.get_command(single)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        names = self.list_commands(ctx)
        if args and args[0] not in names and not ctx.resilient_parsing:
            close = get_close_matches(args[0], names, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
            ctx.fail(f"no command {args[0]!r}; {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(entry.name, entry.help) for entry in COMMANDS])


app = typer.Typer(
    cls=LazyGroup,
    name=PROGRAM,
    epilog=EXAMPLES,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"{PROGRAM} {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    ctx: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Ask a picture a question: FastVLM on MLX."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def run(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status; an error becomes one line on standard error."""
    debug, arguments = _take_debug(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character shows '?' rather than ending the answer.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        # Not app(...): that would put typer's own hook in place of sys.excepthook.
        status = typer.main.get_command(app).main(
            args=arguments, prog_name=PROGRAM, standalone_mode=False
        )
        return status if isinstance(status, int) else 0
    except typer.TyperException as error:  # wrong usage
        message = error.format_message()
        return _report(error, message[:1].lower() + message[1:], error.exit_code, debug)
    except FastVLMError as error:
        return _report(error, str(error), error.exit_code, debug)
    except typer.Abort as error:
        return _report(error, "stopped: the input has ended", 1, debug)
    except Exception as error:
        text = f"unexpected {type(error).__name__}: {error} (--debug shows where)"
        return _report(error, text, 1, debug)


def _take_debug(argv: Sequence[str]) -> tuple[bool, list[str]]:
    """Lets `--debug` stand anywhere before a bare `--`, also after the command's name."""
    arguments = list(argv)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    debug = "--debug" in arguments[:end]
    return debug, [a for a in arguments[:end] if a != "--debug"] + arguments[end:]


def _report(error: BaseException, message: str, status: int, debug: bool) -> int:
    if debug:
        traceback.print_exception(type(error), error, error.__traceback__)
    note(f"error: {' '.join(message.split())}")
    return status


def note(line: str) -> None:
    """One line on standard error. Nobody reading it is no reason to fail."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - stays open until the process ends
