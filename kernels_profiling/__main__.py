"""``python -m kernels_profiling``."""

from __future__ import annotations

import sys

from kernels_profiling.commands import main

if __name__ == "__main__":
    sys.exit(main())
