"""`python -m qlens` is the command `qlens`."""

import gc
import sys


def main() -> int:
    """Run the command line; returns the exit code."""
    # Almost all that is made while the program loads stays: to look for cycles in it, a hundred times over, takes a
    # tenth of the time.
    gc.set_threshold(10_000, 10, 10)
    from qlens.cli import main as run
    from qlens.crashes import guard_output

    guard_output()
    return run()


if __name__ == "__main__":
    sys.exit(main())
