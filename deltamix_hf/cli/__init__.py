"""The `deltamix` command: one module a command, nothing heavy imported before a command runs.

A command is a function whose signature typer turns into arguments and options, and whose docstring
it turns into help. It imports torch and transformers inside, so that `--help` answers at once. It
raises; `main` turns what is raised into one readable line and an exit status other than 0.
"""

from __future__ import annotations

import sys

import typer

from .compress import compress
from .console import report
from .env import env

app = typer.Typer(
    name="deltamix",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    epilog="Any command takes --debug, which shows the whole trace of an error.",
)


@app.callback()
def about() -> None:
    """Store a fine-tuned model as a small delta to its base, and run it beside the base."""


for command in (compress, env):
    app.command()(command)


def main() -> None:
    """Entry point of the `deltamix` script."""
    debug = "--debug" in sys.argv[1:]
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(arguments)
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            raise
        sys.exit(report(error))
