"""``python -m fused info|bench|train``."""

from __future__ import annotations

import argparse
import importlib
import sys

from fused._cli import CommandError
from fused._version import __version__

# Imported only when asked for: each has a main(argv) that returns the exit status.
_COMMANDS = {
    "info": ("fused._info", "versions, devices, which kernels were built, what is missing"),
    "bench": ("fused.bench", "speed of every op against stock PyTorch"),
    "train": ("fused.train", "train the reference models with stock and with fused layers"),
}


def main(argv: list[str] | None = None) -> int:
    commands = "\n".join(f"  {name:<7} {summary}" for name, (_, summary) in _COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m fused",
        usage="python -m fused COMMAND [options]",
        description=f"commands:\n{commands}\n\n'python -m fused COMMAND --help' says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=_COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"fused {__version__}")
    arguments = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(arguments or ["--help"])
    module, _ = _COMMANDS[args.command]
    try:
        return importlib.import_module(module).main(args.arguments)
    except CommandError as error:
        print(f"fused {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"fused {args.command}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
