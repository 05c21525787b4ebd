"""The rooms of the house: who may import whom, and what an import must not do."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import fruits_dask

PACKAGE = Path(fruits_dask.__file__).parent
NAME = "fruits_dask"

# A module may import what stands above it, and nothing that stands below. One line is one floor.
FLOORS = (
    (NAME,),  # the version alone
    ("errors",),
    ("records", "layout", "progress"),
    ("config",),
    ("storage",),
    ("residency", "source", "partition", "decode", "tasks"),
    ("featurize",),
    ("features",),
    ("reduce",),
    ("results",),
    ("lock",),
    ("workspace", "extract"),
    ("cluster",),
    ("report",),
    ("sample",),
    ("demo",),
    ("pipeline", "doctor"),
    ("bench", "estimate"),
    ("console",),
    ("cli",),
    ("__main__",),
)
# Of a library: the only modules (or packages) that import it.
HOMES = {
    "fsspec": {"storage"},
    "s3fs": {"storage", "demo"},
    "botocore": {"storage", "cluster.ec2.account", "cluster.ec2.machines"},
    "aiobotocore": {"cluster.ec2.machines"},
    "dask_cloudprovider": {"cluster.ec2.machines"},
    "boto3": set(),
    "aiohttp": {"storage"},
    "tensorflow": {"featurize.keras"},
    "keras": {"featurize.keras", "featurize.convert"},
    "openvino": {"featurize.openvino"},
    "h5py": {"featurize.keras", "featurize.weights"},
    "dask_ml": {"reduce.incremental"},
    "scipy": {"reduce.exact"},
    "sklearn": set(),
    "distributed": {
        *("cluster.local", "cluster.existing", "cluster.workers"),
        *("cluster.versions", "cluster.kept"),
        *("cluster.ec2", "cluster.ec2.machines", "cluster.ec2.spot"),
    },
    "moto": {"demo"},
    "bokeh": {"report", "report.plots"},
    "jinja2": {"report"},
    "typer": {"cli"},
    "pydantic": {"config"},
    "pydantic_settings": {"config"},
    "rich": {"console", "cli"},
    "pandas": set(),
}
# Not imported while a module is: their import is slow, or only some runs need them.
LAZY = ("tensorflow", "keras", "dask_ml", "sklearn", "moto", "s3fs", "h5py", "botocore")

# Ends the process when an engine is imported; an exception could be caught by a library. Looking
# whether it is installed (`importlib.util.find_spec`) is no import.
GUARD = """
import os, sys
def guard(event, arguments):
    if event == "import" and arguments[0].partition(".")[0] in ("tensorflow", "keras"):
        os.write(2, f"import of {arguments[0]}".encode())
        os._exit(97)
sys.addaudithook(guard)
"""
GUARD_EXIT = 97
IMPORT_ALL = "import importlib\nfor name in {names!r}: importlib.import_module(name)\n"


def module_name(path: Path) -> str:
    """Name below the package: ``cluster.local``; that of the package itself for its top."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or NAME


TREES = {module_name(p): ast.parse(p.read_text("utf-8")) for p in sorted(PACKAGE.rglob("*.py"))}
PACKAGES = {module_name(p) for p in PACKAGE.rglob("__init__.py")}
FLOOR_OF = {name: number for number, floor in enumerate(FLOORS) for name in floor}


def absolute(module: str, node: ast.ImportFrom) -> str:
    """Resolve ``from ..x import y`` in a module to ``fruits_dask.x``."""
    if node.level == 0:
        return node.module or ""
    own = [NAME] if module == NAME else [NAME, *module.split(".")]
    package = own if module in PACKAGES else own[:-1]
    base = package[: len(package) - (node.level - 1)]
    return ".".join([*base, *([node.module] if node.module else [])])


def imported(module: str, nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Yield full names of what the nodes import: ``fruits_dask.storage``, ``bokeh.models``."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = absolute(module, node)
            for alias in node.names:
                full = f"{source}.{alias.name}"
                yield full if full.removeprefix(f"{NAME}.") in TREES else source


def own_imports(module: str) -> set[str]:
    """Modules of this package that a module imports, also within functions and for typing."""
    names = imported(module, ast.walk(TREES[module]))
    return {n.removeprefix(f"{NAME}.") for n in names if n.split(".")[0] == NAME}


def executed(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield the nodes that run when a module is imported."""
    todo: list[ast.AST] = list(tree.body)
    while todo:
        node = todo.pop()
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        todo.extend(ast.iter_child_nodes(node))


def room(module: str) -> str:
    return module.split(".", maxsplit=1)[0]


def run_python(
    code: str, *arguments: str, cwd: Path, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process whose home and working folder are empty."""
    inherited = {
        k: v for k, v in os.environ.items() if not k.startswith(("FRUITS_", "KERAS", "AWS"))
    }
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        env={**inherited, "HOME": str(cwd), "PYTHONDONTWRITEBYTECODE": "1", **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_every_module_has_a_floor() -> None:
    assert {room(name) for name in TREES} == set(FLOOR_OF)


@pytest.mark.parametrize("module", TREES)
def test_imports_go_up_the_list_only(module: str) -> None:
    """A floor may use itself only within one package (`cluster.local` -> `cluster.workers`)."""
    mine = FLOOR_OF[room(module)]
    wrong = {
        other
        for other in own_imports(module)
        if room(other) != room(module) and FLOOR_OF[room(other)] >= mine
    }
    assert not wrong, f"{module} imports {sorted(wrong)}, which stand beside or below it"


def test_there_is_no_cycle() -> None:
    order = TopologicalSorter({module: own_imports(module) for module in TREES})
    assert len(list(order.static_order())) == len(TREES)


@pytest.mark.parametrize("library", HOMES)
def test_a_library_is_used_in_its_home_only(library: str) -> None:
    users = {
        module
        for module, tree in TREES.items()
        if any(name.split(".")[0] == library for name in imported(module, ast.walk(tree)))
    }
    assert users <= HOMES[library]


def test_nothing_uses_what_is_not_declared() -> None:
    """A library that comes along with another one today is not there tomorrow."""
    text = (PACKAGE.parent / "pyproject.toml").read_text("utf-8").lower().replace("-", "_")
    known_otherwise = {"pil": "pillow", "sklearn": "scikit_learn"}
    transitive = {"aiohttp", "botocore", "jinja2", "markupsafe"}  # of s3fs and bokeh
    foreign = {
        name.split(".")[0]
        for module, tree in TREES.items()
        for name in imported(module, ast.walk(tree))
    } - {NAME, *sys.stdlib_module_names, *transitive}
    declared = {n for n in foreign if f'"{known_otherwise.get(n.lower(), n.lower())}' in text}
    assert foreign - declared <= {"keras"}  # tensorflow requires it, and re-exports it


@pytest.mark.parametrize("module", TREES)
def test_slow_libraries_are_not_imported_with_a_module(module: str) -> None:
    names = {name.split(".")[0] for name in imported(module, executed(TREES[module]))}
    assert names.isdisjoint(LAZY) or module.startswith("cluster.ec2.")  # for those who rent


@pytest.mark.parametrize("module", TREES)
def test_nothing_prints(module: str) -> None:
    calls = [
        node.lineno
        for node in ast.walk(TREES[module])
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stdout.write")
    ]
    assert not calls


def test_the_guard_sees_an_import(tmp_path: Path) -> None:
    """What the tests below rely on, even where a library swallows errors."""
    code = GUARD + "try:\n    import keras\nexcept BaseException:\n    pass\n"
    assert run_python(code, cwd=tmp_path).returncode == GUARD_EXIT


def test_importing_everything_imports_no_engine_and_leaves_no_trace(tmp_path: Path) -> None:
    """No environment variable, file, thread, log handler, signal handler or default changes."""
    names = [f"{NAME}.{name}" for name in TREES if name not in (NAME, "__main__")]
    code = GUARD + (
        "import logging, pathlib, signal, threading, warnings\n"
        "before = dict(os.environ)\n"
        "handlers = [signal.getsignal(n) for n in (2, 15)]\n"
        f"{IMPORT_ALL.format(names=names)}"
        "assert dict(os.environ) == before, set(os.environ.items()) ^ set(before.items())\n"
        "assert [signal.getsignal(n) for n in (2, 15)] == handlers\n"
        "assert threading.active_count() == 1, threading.enumerate()\n"
        "assert not logging.getLogger('fruits_dask').handlers\n"
        "print(len(sys.modules))\n"
    )
    done = run_python(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 500  # it did import
    assert not done.stderr
    # dask-cloudprovider leaves its defaults, all of them commented out.
    files = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert files == ["cloudprovider.yaml"]


def test_importing_the_package_imports_nothing_else(tmp_path: Path) -> None:
    code = (
        "import sys\nbefore = set(sys.modules)\nimport fruits_dask\n"
        "print(sorted(set(sys.modules) - before))"
    )
    assert run_python(code, cwd=tmp_path).stdout.strip() == "['fruits_dask']"


# Nor what makes a command slow to start, and only work needs.
ENGINES = '("tensorflow", "keras")'
HEAVY = '("tensorflow", "keras", "openvino", "dask", "distributed", "bokeh", "dask_ml", "scipy")'
assert ENGINES in GUARD
MAIN = GUARD + "from fruits_dask.cli import main\nsys.argv[0] = 'fruits_dask'\nmain()\n"


def photos_for_plan(folder: Path) -> Path:
    """Files that only look like photos: whoever reads them fails."""
    source = folder / "photos" / "Training" / "Lemon"
    source.mkdir(parents=True)
    for number in range(3):
        (source / f"{number}.jpg").write_bytes(b"no photo")
        (source / f"{number}.jpg").chmod(0)
    return source.parents[1]


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"]])
def test_help_imports_no_engine(arguments: list[str], tmp_path: Path) -> None:
    done = run_python(MAIN, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", ["plan", "doctor"])
def test_planning_and_examining_import_nothing_heavy(command: str, tmp_path: Path) -> None:
    source = photos_for_plan(tmp_path)
    arguments = ["--input", str(source), "--output", str(tmp_path / "out"), "--weights", "fruits"]
    # `doctor` asks Dask how many cores and how much memory there are.
    main = MAIN.replace(ENGINES, HEAVY) if command == "plan" else MAIN
    done = run_python(main, command, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3" in done.stdout


@pytest.mark.slow
def test_planning_opens_no_photo(tmp_path: Path) -> None:
    """Seen by the interpreter's own audit of opened files."""
    source = photos_for_plan(tmp_path)
    audit = (
        "import sys\n"
        "def look(event, arguments):\n"
        "    if event == 'open' and str(arguments[0]).endswith('.jpg'):\n"
        "        import os; os._exit(97)\n"
        "sys.addaudithook(look)\n"
    )
    arguments = ["--input", str(source), "--output", str(tmp_path / "out"), "--weights", "fruits"]
    done = run_python(audit + MAIN, "plan", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert run_python(audit + "open('x.jpg', 'w')", cwd=tmp_path).returncode == GUARD_EXIT
