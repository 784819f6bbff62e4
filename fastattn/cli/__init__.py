"""`python -m fastattn COMMAND`: one table, `COMMANDS`. A command is the module of its name in this folder, imported
when it is asked for, with

    add_arguments(parser)  what argparse has to know
    run(options) -> int    the work, and the exit status

A ValueError, NotImplementedError or OSError of `run` is printed as one line, with exit status 1.
"""

import argparse
import importlib
import sys

COMMANDS = {
    "bench": "this machine's limits, and how close attention comes to them, beside torch",
    "compare": "results of bench beside each other: machines, commits, settings",
    "doctor": "what is installed, what runs, what it reaches, and what to do about each finding",
    "explain": "which kernel a call of this shape would run, and why no other",
    "look": "an HTML page that shows what the tokens of a sentence attend to, in a transformers model on disk",
    "warmup": "compile the Triton kernels of given shapes before the first call needs them",
}
"""Name -> what it does, in one line."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m fastattn", description="fused attention, on CPUs first")
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name in arguments[:1]:
            _module(name).add_arguments(command)
    options = parser.parse_args(arguments)
    try:
        return _module(options.command).run(options)
    except (ValueError, NotImplementedError, OSError) as error:
        print(f"{parser.prog} {options.command}: {error}", file=sys.stderr)
        return 1


def _module(name: str):
    return importlib.import_module(f"{__name__}.{name}")


def _version() -> str:
    from .. import __version__

    return f"fastattn {__version__}"
