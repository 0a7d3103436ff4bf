"""`python -m qlens` is the command `qlens`."""

import gc
import sys
from io import TextIOWrapper

from qlens.signals import hold_reload


def main() -> int:
    """Run the command line; returns the exit code."""
    # Almost all that is made while the program loads stays, 150,000 objects: to look for cycles in it again and again
    # takes a tenth of the time. Not to look at all would leave 2 MB more.
    gc.set_threshold(50_000, 10, 10)
    if sys.argv[1:2] == ["serve"]:
        hold_reload()
    from qlens.cli import main as run
    from qlens.crashes import guard_output

    guard_output()
    if isinstance(sys.stdout, TextIOWrapper):  # a file's name may be bytes that are no text, and is shown all the same
        sys.stdout.reconfigure(errors="backslashreplace")
    return run()


if __name__ == "__main__":
    sys.exit(main())
