"""Compare the time and memory of our kernels with what a user would run instead."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks stand beside the package, not in it

from benchmarks.command_line import main

if __name__ == "__main__":  # processes that measure memory import this file anew
    main()
