"""The example of several processes, started as its page says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]


def run(processes: int, *options: str) -> str:
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes else []
    command = [sys.executable, *start, "examples/mnist_ddp.py", "--data", "digits", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def accuracy(text: str) -> float:
    return float(re.findall(r"test accuracy ([\d.]+)", text)[-1])


@pytest.mark.skipif(not dist.is_gloo_available(), reason="gloo is not in this build")
@pytest.mark.parametrize(
    "way", ["ddp", "fsdp", pytest.param("plain", marks=pytest.mark.slow), pytest.param("attach", marks=pytest.mark.slow)]
)
def test_two_processes_end_with_equal_weights(way: str) -> None:
    pytest.importorskip("sklearn")
    text = run(2, "--way", way, "--batch-size", "100")
    assert len(re.findall(r"weights differ from those of rank 0 by 0(?![.\de])", text)) == 2  # lines of ranks may run together
    assert accuracy(text) > 0.9


@pytest.mark.slow
def test_one_process_is_served_too() -> None:
    pytest.importorskip("sklearn")
    assert accuracy(run(0)) > 0.9
