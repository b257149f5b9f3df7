"""The command line of the benchmarks: `python -m benchmarks`, or `tools/benchmark.py`."""

from benchmarks.command_line import main

if __name__ == "__main__":  # processes that measure memory import this file anew
    main()
