"""`gradmaker cost --task`: the report, and one sentence for what cannot be planned."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from gradmaker.commands.app import app
from gradmaker.compare.errors import InputError
from gradmaker.compare.parsing import parse_rows
from gradmaker.compare.plan_report import Planner, plan_report, read_mesh, sized
from gradmaker.compare.rank_task import RankTask, read_task
from gradmaker.costs.traffic import Scheme

TASK = """
import torch
from torch import nn
from types import SimpleNamespace

def pair():
    return nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 10)), torch.zeros(8, 30)

def object():
    model, x = pair()
    return SimpleNamespace(model=model, batch={"input": x})

def nothing(): return None
def fails(): raise KeyError("no such size")
def placed(): return nn.Linear(3, 3, device="cpu"), torch.zeros(2, 3)
def mismatched(): return nn.Linear(3, 3), torch.zeros(2, 4)
def untensored(): return nn.Linear(3, 3), "batch"
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "planned_task.py").write_text(TASK)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["cost", *arguments])


def test_the_report() -> None:
    found = invoke("--task", "planned_task:pair", "kfac", "adamw", "hessian_free", "--world", "2", "--memory", "1e-5")
    assert found.exit_code == 0, found.output
    head, *lines = found.output.splitlines()
    assert head.startswith("830 parameters on 2 ranks (2 replicas x 1 shards), ")
    rows = [line.split()[:2] for line in lines]
    assert rows.count(["kfac", "replicated"]) == 5 and ["adamw", "owners"] in rows  # its costs and four collectives
    assert ["all", "replicated", "all_reduce", "of", "gradients", "step"] in [line.split()[:6] for line in lines]
    assert " KiB do not fit into 10.5 KiB; most of it is workspace, " in found.output
    assert "hessian_free, owners: not planned: full: Implicit is applied by products with further passes" in found.output
    assert "GiB sent  s" not in found.output


def test_times_are_told_where_rates_are_given() -> None:
    found = invoke("--task", "planned_task:object", "shampoo", "--world", "2", "--bandwidth", "1e-6", "--flops", "1e-6")
    assert found.exit_code == 0 and found.output.splitlines()[1].split()[-1] == "s"


def test_default_methods() -> None:
    assert {line.split()[0] for line in plan_report("planned_task:pair").splitlines()[2:7]} == {
        *("adamw", "kfac", "shampoo", "soap", "muon")
    }


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["kfac", "--world", "2"], "--world plans one --task module:function"),
        (["--task", "planned_task"], "expected module:function"),
        (["--task", "planned_tusk:pair"], "no module 'planned_tusk' here or installed"),
        (["--task", "planned_task:pear"], "did you mean 'pair'"),
        (["--task", "planned_task:nothing"], "expected a model and the batch of one rank"),
        (["--task", "planned_task:untensored"], "expected a model and the batch of one rank"),
        (["--task", "planned_task:fails"], "fails() raised KeyError: 'no such size'"),
        (["--task", "planned_task:placed"], "weight has data: make the model in the function"),
        (["--task", "planned_task:mismatched"], "the forward pass failed on the meta device"),
        (["--task", "planned_task:pair", "kfacc"], "did you mean 'kfac'"),
        (["--task", "planned_task:pair", "--world", "64", "--mesh", "8x9"], "mesh='8x9' has 72 ranks, and world=64"),
        (["--task", "planned_task:pair", "--world", "4", "--mesh", "2x2x1"], "expected replicas x shards"),
        (["--task", "planned_task:pair", "--world", "4", "--mesh", "0x4"], "expected replicas x shards"),
        (["--task", "planned_task:pair", "--world", "0"], "world=0: expected an integer of at least 1"),
        (["--task", "planned_task:pair", "--memory", "0"], "memory=0.0: expected 0 < memory < inf"),
        (["--task", "planned_task:pair", "--results", "root"], "did you mean 'roots'"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], reason: str) -> None:
    found = invoke(*arguments, *([] if "--world" in arguments else ["--world", "2"]))
    assert found.exit_code == 2 and reason in found.output and "Traceback" not in found.output
    assert len(found.output.strip().splitlines()) == 1


def test_an_import_that_fails_inside_of_the_module_is_not_hidden(tmp_path: Path) -> None:
    (tmp_path / "planned_other.py").write_text("import absent_module_of_a_task")
    with pytest.raises(ModuleNotFoundError, match="absent_module_of_a_task"):
        read_task("planned_other:pair")


def test_meshes() -> None:
    assert [read_mesh(mesh, 8) for mesh in (None, "8", "8x1", "4x2", "1X8")] == [1, 1, 1, 2, 8]
    with pytest.raises(InputError, match="has 4 ranks"):
        read_mesh("4", 8)


def mended(memory: float, method: dict[str, Any], scheme: Scheme) -> str:
    with torch.device("meta"):
        task = RankTask(nn.Sequential(nn.Embedding(3000, 64), nn.Linear(64, 2048)), torch.zeros(4, 8, dtype=torch.long))
    (row,) = parse_rows([method])
    planner = Planner(task, memory)
    found = planner.plan(row, scheme)
    assert found.cost is not None and (found.cost.bytes > memory) == bool(found.mended)
    return found.mended


def test_options_that_mend() -> None:
    """The mildest one that fits, of those that the method has, or the one that takes least."""
    replicas, owners = Scheme("replicated", 4), Scheme("owners", 64, results="gradients")
    wide = {"method": "kfac", "max_dim": 4096}
    assert mended(1e9, wide, replicas) == ""
    assert mended(2.5e6, wide, replicas) == "the model takes 2.48 MiB without the method: shard it over more ranks (--mesh)"
    assert mended(1.2037e8, wide, owners) == "embeddings=False fits, with 115 MiB"
    assert mended(7e7, wide, replicas).startswith("preset='large' fits")  # instead of the wide sides of the row
    assert mended(4e6, {"method": "soap"}, replicas) == "nothing that was tried fits; the method muon takes 4.98 MiB"


def test_objects_are_tasks() -> None:
    assert isinstance(read_task("planned_task:object").batch, dict)
    made = SimpleNamespace(model=nn.Linear(2, 2).to("meta"), batch=torch.zeros(1, 2, device="meta"))
    assert "6 parameters on 1 ranks" in plan_report(RankTask(made.model, made.batch), ["adam"])


def test_bytes_in_words() -> None:
    assert [sized(x) for x in (3, 2**10, 1.5 * 2**20, 2**31)] == ["3 B", "1 KiB", "1.5 MiB", "2 GiB"]
