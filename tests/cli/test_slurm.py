"""The example for Slurm, with stand-ins of its commands that start the processes on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SRUN = """#!/bin/bash
shift  # --kill-on-bad-exit=1
worst=0
for rank in $(seq 0 $((SLURM_NTASKS - 1))); do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" &
    children="${children:-} $!"
done
for child in $children; do wait "$child" || worst=$?; done
exit $worst
"""
SCONTROL = """#!/bin/bash
echo "$@" >> "$CALLS"
[ "$1" = show ] && echo localhost || true
"""
# Stands for the interpreter: says what it was started as, and ends as a run that was told to stop.
PYTHON = """#!/bin/bash
echo "$RANK/$WORLD_SIZE at $MASTER_ADDR:$MASTER_PORT $*"
exit $STATUS
"""


@pytest.mark.skipif(sys.platform == "win32", reason="bash")
@pytest.mark.parametrize("status", [0, 1, 143])
def test_processes_are_started_and_preempted_jobs_queued_again(tmp_path: Path, status: int) -> None:
    for name, content in (("srun", SRUN), ("scontrol", SCONTROL), ("python", PYTHON)):
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHON": "python",
        "STATUS": str(status),
        "CALLS": str(tmp_path / "calls"),
        "SLURM_JOB_ID": "70001",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
    }
    done = subprocess.run(
        ["bash", "tools/slurm.sbatch", "my config.yaml", "data.root=/a b"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == status
    command = "tools/train.py my config.yaml data.root=/a b resume=auto train.timeout=600"
    assert sorted(done.stdout.splitlines()) == [f"{r}/2 at localhost:30001 {command}" for r in (0, 1)]
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == ["show hostnames localhost", *(["requeue 70001"] if status == 143 else [])]
