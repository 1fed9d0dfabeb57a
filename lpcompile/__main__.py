"""``python -m lpcompile``: ``doctor`` says what this machine can do, ``bench`` measures it."""

import argparse
import sys
from collections.abc import Sequence

from lpcompile import doctor
from lpcompile.bench import cli
from lpcompile.errors import LowPrecisionError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; the exit status is 0 when everything went well."""
    parser = argparse.ArgumentParser(prog="python -m lpcompile", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    doctor.add_command(commands)
    cli.add_commands(commands.add_parser("bench", help="benchmarks: see bench --help"))
    args = parser.parse_args(arguments)
    try:
        return args.run(args)
    except LowPrecisionError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
