"""`python -m qlens` is the command `qlens`."""

import sys

from qlens.cli import main

sys.exit(main())
