"""Tiny Shakespeare, character by character: gradmaker's optimizers beside torch's AdamW and Muon on a small GPT.

    python examples/char_gpt.py                             from the hub, into runs/char_gpt
    python examples/char_gpt.py --data-dir tinyshakespeare  from a local folder with input.txt
    python examples/char_gpt.py --only soap --only muon     the trainings of some rows, without a report
    python examples/char_gpt.py --publish docs              and put page, picture and numbers into the documentation

Each row tries as many learning rates, one training of half the steps each, on a seed of their own; the best on the validation
part is trained from fresh seeds. Finished trainings are not repeated. The parts are in the folder of the same name.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from char_gpt.experiment import Trainings, final, search
from char_gpt.report import machine, markdown, write_report
from char_gpt.rows import ROWS
from char_gpt.setting import read_setting
from char_gpt.text import read_text


def publish(out: Path, docs: Path) -> None:
    """Page, picture and numbers."""
    picture, numbers = "images/char_gpt.png", "data/char_gpt.json"
    for name, place in (("overview.png", picture), ("results.json", numbers)):
        (docs / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(out / name, docs / place)
    content = json.loads((out / "results.json").read_text(encoding="utf-8"))
    (docs / "data" / "char_gpt.md").write_text(markdown(content, f"../{picture}", Path(numbers).name), encoding="utf-8")


def main(
    data_dir: Annotated[
        Path | None, typer.Option(envvar="GRADMAKER_DATA", help="Folder of the data; default: the hub.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Output folder; what is finished in it is not repeated.")] = Path("runs/char_gpt"),
    config: Annotated[Path | None, typer.Option(help="YAML file of settings; default: those of the page.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="A row; repeat for more; without a report.")] = None,
    publish_to: Annotated[Path | None, typer.Option("--publish", help="Documentation folder.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Search, train, report and, if asked, publish."""
    if unknown := [name for name in only or () if name not in ROWS]:
        raise typer.BadParameter(f"{unknown[0]!r}: legal are {', '.join(ROWS)}", param_hint="--only")
    torch.set_num_threads(threads)
    setting, text = read_setting(config), read_text(data_dir)
    trainings = Trainings(out / "trainings", setting, text, device)
    records = []
    for row in only or ROWS:
        tried = search(row, trainings)
        records += [*tried, *final(row, tried, trainings)]
    if only:
        return
    sizes = {part: len(getattr(text, part)) for part in ("train", "validation", "test")}
    head = {"setting": asdict(setting), "text": {"characters": len(text.characters), **sizes}, "machine": machine(device)}
    (out / "results.json").write_text(json.dumps({**head, "trainings": records}, indent=1) + "\n", encoding="utf-8")
    write_report(out)
    if publish_to is not None:
        publish(out, publish_to)


if __name__ == "__main__":
    typer.run(main)
