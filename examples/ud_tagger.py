"""CASPR against Shampoo against AdamW: a small transformer that tags parts of speech, on the English Web Treebank.

    python examples/ud_tagger.py                                          the small version, from the hub, into runs/tagger
    python examples/ud_tagger.py --data-dir ewt                           from a folder with {train,validation,test}.parquet
    python examples/ud_tagger.py --config examples/ud_tagger_full.yaml --device cuda    the full-size version
    python examples/ud_tagger.py --publish docs                           put page, picture and numbers into the documentation

Each method gets the same randomly drawn configurations, one training each; the one with the best dev accuracy is trained again
from fresh seeds, and only these trainings see the test part. Finished trainings are not repeated. The parts are in the folder
of the same name.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from ud_tagger.experiment import Results, run
from ud_tagger.report import machine, markdown, write_report
from ud_tagger.setting import read_setting
from ud_tagger.treebank import PARTS, read_treebank


def publish(out: Path, docs: Path) -> None:
    """Page, picture and numbers."""
    picture, numbers = "images/tagger.png", "data/tagger.json"
    for name, place in (("overview.png", picture), ("results.json", numbers)):
        (docs / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(out / name, docs / place)
    content = json.loads((out / "results.json").read_text(encoding="utf-8"))
    (docs / "data" / "tagger.md").write_text(markdown(content, f"../{picture}", Path(numbers).name), encoding="utf-8")


def main(
    data_dir: Annotated[
        Path | None, typer.Option(envvar="GRADMAKER_DATA", help="Folder of the data; default: the hub.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Output folder; finished trainings in it are not repeated.")] = Path("runs/tagger"),
    config: Annotated[Path | None, typer.Option(help="YAML file of settings; default: the small version.")] = None,
    publish_to: Annotated[Path | None, typer.Option("--publish", help="Documentation folder.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Search, repeat, report and, if asked, publish."""
    torch.set_num_threads(threads)
    setting = read_setting(config)
    data = read_treebank(setting, data_dir)
    sizes = {part: {"sentences": len(data.parts[part]), "tokens": data.tokens(part)} for part in PARTS}
    head = {"setting": asdict(setting), "treebank": {"words": data.words, "tags": data.tags, **sizes}}
    results = Results(out / "results.json", head)
    run(setting, data, results, device)
    results.describe(machine(device))
    write_report(results.content, out)
    if publish_to is not None:
        publish(out, publish_to)


if __name__ == "__main__":
    typer.run(main)
