"""Peak memory of K-FAC with the exact Fisher: ResNet-18 for 32 x 32 images, width 64, ten classes, batch 128, float32.

python benchmarks/memory.py            each row in a fresh process; writes benchmarks/memory.md
python benchmarks/memory.py --one gradient
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "examples"))

from gradmaker import GradientMaker, KfacGradientConfig, KfacGradientMaker  # noqa: E402
from gradmaker.compare.cost import machine  # noqa: E402
from gradmaker.curvature import FisherExact  # noqa: E402

MEMORY = {"exact Fisher": 2**30, "exact Fisher, memory=2 GiB": 2**31, "exact Fisher, memory=1 byte": 1}
ROWS = ["gradient", *MEMORY]
LIMIT = 6.0


def run(row: str, width: int, batch: int) -> tuple[float, float]:
    """GiB at the peak of this process, and seconds of the step."""
    from networks import resnet18

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, x, t = resnet18(width), torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    maker: GradientMaker = GradientMaker(model)
    if row != "gradient":
        maker = KfacGradientMaker(model, KfacGradientConfig(fisher=FisherExact(memory=MEMORY[row])))
    y = maker.setup_model_call(model, x)
    maker.setup_loss_call(F.cross_entropy, y, t)
    start = time.perf_counter()
    maker.forward_and_backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, time.perf_counter() - start


def measured(row: str, width: int, batch: int) -> tuple[float, float]:
    """The same, in a process of its own."""
    options = ["--one", row, "--width", str(width), "--batch", str(batch)]
    done = subprocess.run([sys.executable, __file__, *options], capture_output=True, text=True, check=True)
    gib, seconds = done.stdout.split()
    return float(gib), float(seconds)


def render(width: int, batch: int) -> str:
    """The page."""
    torch.set_num_threads(1)
    lines = ["| step | peak, GiB | seconds |", "|---|---|---|"]
    for row in ROWS:
        gib, seconds = measured(row, width, batch)
        lines.append(f"| {row} | {gib:.2f} | {seconds:.0f} |")
        print(lines[-1], flush=True)
    head = (__doc__ or "").split("\n")[0]
    facts = ", ".join(f"{name} {value}" for name, value in machine(torch.device("cpu")).items())
    text = (
        "One step, with a measurement of the curvature and a refresh, in a fresh process; the peak is `ru_maxrss`, Python "
        f"and torch included. The limit is {LIMIT:g} GiB.\n\nOn {facts}."
    )
    return "\n".join(["# Memory of the exact Fisher", "", head, "", text, "", *lines]) + "\n"


def main() -> None:
    """One row, or the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", choices=ROWS)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=128)
    given = parser.parse_args()
    if given.one:
        print(*run(given.one, given.width, given.batch))
        return
    (ROOT / "benchmarks" / "memory.md").write_text(render(given.width, given.batch), encoding="utf-8")


if __name__ == "__main__":
    main()
