"""One import name for four folders: installed, from a bare checkout, and beside a user's own `solvers.py`."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

import pytest

import gradmaker

ROOT = Path(__file__).resolve().parents[2]
AXES = ("curvature", "representations", "solvers")
GENERATED = {
    ".git",
    ".venv",
    ".hypothesis",
    ".mypy_cache",
    ".pytest_cache",
    ".ruff_cache",
    "__pycache__",
    "build",
    "dist",
    "runs",
}


def config() -> ConfigParser:
    parser = ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def files() -> Iterator[Path]:
    """The files of the project, whether git knows them yet or not."""
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in GENERATED and not name.endswith(".egg-info")]
        yield from (Path(folder, name) for name in names if name not in GENERATED)  # .git is a file in a worktree


def sources() -> dict[str, Path]:
    """Path inside the installed package -> file of the checkout."""
    found = {path.relative_to(ROOT): path for path in (ROOT / "gradmaker").rglob("*.py")}
    found |= {"gradmaker" / path.relative_to(ROOT): path for axis in AXES for path in (ROOT / axis).rglob("*.py")}
    return {target.as_posix(): path for target, path in found.items()}


def python(code: str, cwd: Path, interpreter: str = sys.executable, *, checkout_on_path: bool = True) -> str:
    """What a new interpreter prints; it fails when the interpreter does. Another than ours sees its own packages alone."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if checkout_on_path and interpreter == sys.executable:
        environment["PYTHONPATH"] = str(ROOT)
    command = [interpreter, "-c", code]
    process = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=100)
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def test_packages_are_the_folders() -> None:
    """Every folder with Python in it is listed, and nothing else is."""
    packages = config()["options"]["packages"].split()
    assert sorted(packages) == sorted({str(Path(name).parent).replace("/", ".") for name in sources()})
    folders = dict(re.findall(r"(\S+) = (\S+)", config()["options"]["package_dir"]))
    assert folders == {"gradmaker": "gradmaker"} | {f"gradmaker.{axis}": axis for axis in AXES}


def test_type_checker_sees_every_folder() -> None:
    assert re.split(r",\s*", config()["mypy"]["packages"]) == ["gradmaker", *(f"gradmaker.{axis}" for axis in AXES)]


def test_core_needs_torch_and_opt_einsum_only() -> None:
    assert config()["options"]["install_requires"].split() == ["torch>=2.6", "opt_einsum"]


def test_the_version_is_that_of_the_package() -> None:
    assert config()["metadata"]["version"] == gradmaker.__version__


def test_dependencies_are_pinned() -> None:
    """Every package that an extra names has a line in constraints.txt."""
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    requirements = config()["options"]["install_requires"] + "".join(config()["options.extras_require"].values())
    names = {re.split(r"[>=<\[]", line)[0].lower().replace("_", "-") for line in requirements.split("\n") if line}
    assert names - {"gradmaker"} <= pinned


@pytest.mark.parametrize("axis", AXES)
def test_hostile_neighbours_do_not_shadow(tmp_path: Path, axis: str) -> None:
    """A script beside its own `solvers.py`, `representations.py` and `curvature/` imports ours."""
    for name in ("solvers.py", "representations.py", "curvature/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise RuntimeError('the file of the user was imported')\n")
    code = f"import gradmaker, gradmaker.{axis} as axis; print(axis.__name__, axis.__file__)"
    assert python(code, tmp_path) == f"gradmaker.{axis} {ROOT / axis / '__init__.py'}"


def test_bare_checkout_runs_from_its_root() -> None:
    code = "import gradmaker, gradmaker.solvers as solvers; print(gradmaker.__file__, solvers.__file__)"
    expected = f"{ROOT / 'gradmaker' / '__init__.py'} {ROOT / 'solvers' / '__init__.py'}"
    assert python(code, ROOT, checkout_on_path=False) == expected


EXTRAS = [
    "datasets",
    "itables",
    "jinja2",
    "matplotlib",
    "numpy",
    "pandas",
    "PIL",
    "rich",
    "scipy",
    "sklearn",
    "typer",
    "vl_convert",
    "yaml",
]
"""What a plain install does not have."""
PLAIN = f"""
import importlib, sys, warnings
class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {EXTRAS} else self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Without, sys.meta_path)
with warnings.catch_warnings():  # torch itself warns that there is no NumPy
    warnings.simplefilter("ignore")
    import torch
warnings.simplefilter("error")
"""
"""Begins an interpreter in which neither we nor torch find any of `EXTRAS`."""
STEPS = """
import io, torch, gradmaker
from torch import nn
from torch.nn import functional as F

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))

def loops(name, attached):
    net, options = model(), {"method": name, "failures_allowed": 0} if name != "gradient" else {"method": name}
    maker = gradmaker.from_config(net, options)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    if attached:
        maker.attach(optimizer)
    for _ in range(3):
        x, t = torch.randn(8, 6), torch.randint(3, (8,))
        optimizer.zero_grad()
        if attached:
            F.cross_entropy(net(x), t).backward()
        else:
            maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(net, x), t)
            maker.forward_and_backward()
        optimizer.step()
    return maker

for name in gradmaker.METHODS:
    maker = loops(name, attached=False)
    if name != "gradient":
        str(maker.summary())
        saved = io.BytesIO()
        torch.save(maker.state_dict(), saved)
        saved.seek(0)
        type(maker)(model(), maker.config).load_state_dict(torch.load(saved, weights_only=True))
for name in ("adam", "shampoo", "soap", "psgd_whiten"):
    loops(name, attached=True)
for name in ("kfac", "ekfac", "layer_ng", "caspr"):
    str(loops(name, attached=False).verify())
print("done", len(gradmaker.METHODS), "numpy" in sys.modules)
"""
"""Every method three times, its table and its state; then what else may convert tensors."""


def test_extras_are_not_imported(tmp_path: Path) -> None:
    """Every module but the comparison, measured costs and the command imports where the packages of the extras are missing."""
    modules = [name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in sources()]
    extra = ("gradmaker.compare", "gradmaker.step_costs", "gradmaker.commands", "gradmaker.cli")
    core = [name for name in modules if not name.startswith(extra)]
    code = f"""{PLAIN}
for name in {core}:
    importlib.import_module(name)
print(sorted(set(sys.modules) & set({EXTRAS})))
"""
    assert python(code, tmp_path) == "[]"


def test_every_method_makes_steps_without_numpy(tmp_path: Path) -> None:
    """A plain install has torch and opt_einsum alone; `Tensor.numpy` then raises."""
    assert python(PLAIN + STEPS, tmp_path) == f"done {len(gradmaker.METHODS)} False"


# --- the lazy face --------------------------------------------------------------------------------------------------------
def test_import_loads_nothing(tmp_path: Path) -> None:
    """`import gradmaker` beside `import torch`; then what a maker needs, and still nothing of the comparison."""
    code = """
import sys, torch
before = set(sys.modules)
import gradmaker
print(sorted(set(sys.modules) - before))
maker = gradmaker.from_config(torch.nn.Linear(2, 2), {"method": "kfac"})
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(name for name in sys.modules if name.startswith(("gradmaker.compare", "gradmaker.cli"))))
print(sorted(loaded & set(EXTRAS)))
""".replace("EXTRAS", str(EXTRAS))
    assert python(code, tmp_path) == "['gradmaker']\n[]\n[]"


def static_face() -> dict[str, str]:
    """The public names that a type checker sees, and the modules that it finds them in."""
    tree = ast.parse((ROOT / "gradmaker" / "__init__.py").read_text(encoding="utf-8"))
    seen = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imports = [node for node in seen.body if isinstance(node, ast.ImportFrom)]
    declared = [ast.unparse(node) for node in seen.body if node not in imports]
    assert declared == ["METHODS: Registry[type[GradientMaker]]"]
    assert all(alias.asname == alias.name for node in imports for alias in node.names)  # which exports it
    return {alias.name: str(node.module) for node in imports for alias in node.names} | {
        "METHODS": "gradmaker.options.registry"
    }


def test_static_face_is_what_is_found() -> None:
    """The same names, in `__all__`, in `dir` and for a type checker, and each the same object."""
    face = static_face()
    assert sorted(face) == sorted(gradmaker.__all__)
    assert set(face) <= set(dir(gradmaker))
    for name, module in face.items():
        assert getattr(gradmaker, name) is getattr(importlib.import_module(module), name), name


def test_public_functions_outlive_submodules_of_their_name(tmp_path: Path) -> None:
    """The import system would put the modules of these names where the functions are."""
    names = sorted(
        name for name in gradmaker.__all__ if f"gradmaker/{name}.py" in sources() or (ROOT / "gradmaker" / name).is_dir()
    )
    assert names == ["compare", "damping_sweep", "fidelity"]
    for first in ("import gradmaker", f"from gradmaker import {', '.join(names)}"):
        code = f"""
import importlib
{first}
for name in {names}:
    importlib.import_module("gradmaker." + name)
import gradmaker.compare.rows
import gradmaker
print([type(getattr(gradmaker, name)).__name__ for name in {names}])
"""
        assert python(code, tmp_path) == str(["function"] * len(names))


def test_submodules_and_unknown_names(tmp_path: Path) -> None:
    code = """
import gradmaker
print(gradmaker.solvers.CG.__name__, gradmaker.capture.rules.layers.__name__)
for name in ("Kfac", "numpy", "__wrapped__"):
    try:
        getattr(gradmaker, name)
    except AttributeError as error:
        print(error)
"""
    missing = [f"module 'gradmaker' has no attribute {name!r}" for name in ("Kfac", "numpy", "__wrapped__")]
    assert python(code, tmp_path).splitlines() == ["CG gradmaker.capture.rules.layers", *missing]


def imported(path: Path) -> set[str]:
    """The dotted names that a file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    return names


def test_imports_are_absolute() -> None:
    """`import solvers` in the checkout would make a second copy of every class."""
    banned = {
        (path.name, name)
        for path in files()
        if path.suffix == ".py"
        for name in imported(path)
        if name.startswith(".") or name.partition(".")[0] in AXES
    }
    assert not banned


def test_no_paths_of_one_machine() -> None:
    machine = re.compile(r"(?<![\w.])/(work|root|home)/")
    suffixes = {".cfg", ".toml", ".txt", ".in", ".md", ".yaml", ".yml", ".py", ".j2", ".json", ".csv", ".html", ""}
    texts = [path for path in files() if path.suffix in suffixes and path != Path(__file__)]
    assert [path for path in texts if machine.search(path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("name", ["setup.cfg", "pyproject.toml", "constraints.txt", ".ci/run", ".pre-commit-config.yaml"])
def test_no_package_index_is_named(name: str) -> None:
    """Where packages come from is the business of the machine's own pip configuration."""
    assert not re.search(r"index-url|find-links|file://|pypi\.org|pythonhosted|whl/", (ROOT / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("build")
    source, output = folder / "source", folder / "dist"
    for path in files():  # a copy: building leaves build/ and *.egg-info behind
        target = source / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(output), str(source)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert process.returncode == 0, process.stdout + process.stderr
    return output


@pytest.fixture(scope="module")
def archives(built: Path) -> dict[str, set[str]]:
    """The names inside the sdist and inside the wheel."""
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel, tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        return {"wheel": set(wheel.namelist()), "sdist": {name.partition("/")[2] for name in sdist.getnames()}}


def templates() -> set[str]:
    """What pages are made of, beside Python."""
    found = (path for ending in ("j2", "css", "js") for path in (ROOT / "gradmaker").rglob(f"*.{ending}"))
    return {path.relative_to(ROOT).as_posix() for path in found}


def test_wheel_contents(archives: dict[str, set[str]]) -> None:
    """The four folders under one name, the marker, the templates, the license: no test, no top-level `solvers`."""
    information = {name for name in archives["wheel"] if ".dist-info/" in name}
    assert any(name.endswith("licenses/LICENSE") for name in information)
    assert templates()
    assert archives["wheel"] - information == {*sources(), *templates(), "gradmaker/py.typed"}


def test_sdist_contents(archives: dict[str, set[str]]) -> None:
    modules = {path.relative_to(ROOT).as_posix() for path in sources().values()}
    expected = {
        *modules,
        *templates(),
        "gradmaker/py.typed",
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "constraints.txt",
        "setup.cfg",
    }
    assert expected <= archives["sdist"]
    assert not [name for name in archives["sdist"] if name.startswith("tests")]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_method_makes_steps_in_a_plain_install(built: Path, tmp_path: Path) -> None:
    """The wheel in a new environment, with what it declares and no more."""
    venv.create(tmp_path / "plain", with_pip=True)
    interpreter = str(tmp_path / "plain" / "bin" / "python")
    install = [interpreter, "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), str(next(built.glob("*.whl")))]
    subprocess.run(install, check=True, capture_output=True, timeout=800)
    assert (
        python(STEPS.replace("import io", "import io, sys", 1), tmp_path, interpreter) == f"done {len(gradmaker.METHODS)} False"
    )
