"""The project keeps its own rules: the order of its layers, short files, plain code, declared and bounded dependencies.

What ruff can check (names, complexity, docstrings, banned calls, heavy imports) is in ``pyproject.toml``, and run from here.
"""

import ast
import functools
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "lamina"
LINES = 300

# Top-level modules and folders of the package, lowest first: a module imports from its own layer or from lower ones.
LAYERS = (
    {"errors", "section", "process"},
    {"native", "cuda"},
    {"ops"},
    {"model", "adapter", "adapter_files", "data"},
    {"training", "generation", "evaluation", "neutral"},
    {"understand"},
    {"settings", "jobfile", "jobs", "job", "report"},
    {"opened", "policies", "merging", "explaining", "comparing", "ways_out", "planning", "doctor", "observing"}
    | {"reporting", "under_way", "run", "variants", "replaying"},
    {"cli", "commands", "__main__"},
    {""},  # lamina/__init__.py, the public surface
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}

# These compute; they are given what was read, and return what is to be written.
NO_DISK = {"errors", "section", "settings", "ops", "adapter", "generation", "model.decoder", "data.forms"}
NO_DISK |= {"data.llama2_text", "data.offsets", "data.render", "data.fit", "data.faults", "data.pack"}
NO_DISK |= {"training.loop", "training.order", "training.optimizer", "training.finite"}
NO_DISK |= {"training.setup", "training.kept", "training.plan", "training.choosing"}
DISK = {"open", "fdopen", "memmap", "safe_open", "save_file", "mkdir", "rmdir", "unlink", "rename", "rmtree", "touch"}
DISK |= {
    "read_text",
    "read_bytes",
    "write_text",
    "write_bytes",
    "TemporaryFile",
    "NamedTemporaryFile",
    "mkdtemp",
    "copyfile",
}


def modules(package: Path) -> dict[str, Path]:
    """Modules by their name inside the package: ``training.loop``, ``jobs``; the package itself is the empty name."""
    return {
        ".".join(file.relative_to(package).with_suffix("").parts).removesuffix("__init__").rstrip("."): file
        for file in sorted(package.rglob("*.py"))
    }


@functools.cache
def nodes(file: Path) -> list[tuple[ast.AST, str]]:
    """Every node of a file that has a line, with its place as file:line."""
    name = file.name if ROOT not in file.parents else file.relative_to(ROOT)
    return [
        (node, f"{name}:{node.lineno}")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.stmt | ast.expr | ast.ExceptHandler | ast.keyword)
    ]


def imports(file: Path) -> Iterator[tuple[str, str]]:
    """Every absolute import of a file, also inside functions, as dotted name and file:line."""
    for node, where in nodes(file):
        if isinstance(node, ast.Import):
            yield from ((alias.name, where) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = f"{node.module}." if node.module else ""
            yield from (("." * node.level + parent + alias.name, where) for alias in node.names)


def internal_imports(package: Path) -> Iterator[tuple[str, str, str]]:
    """Importing module, imported module and file:line, for imports inside the package."""
    known = modules(package)
    for module, file in known.items():
        for name, where in imports(file):
            if name.startswith("."):
                yield module, name, where  # relative: no layer is called so
            elif name.split(".")[0] == "lamina":
                target = name.removeprefix("lamina").lstrip(".")
                yield module, target if target in known else target.rpartition(".")[0], where


def layer_faults(package: Path) -> list[str]:
    """Imports against the order of the layers, and modules that are in no layer."""
    faults = [f"{name}: is in no layer, see LAYERS" for name in modules(package) if name.split(".")[0] not in RANK]
    for module, target, where in internal_imports(package):
        own, other = module.split(".")[0], target.split(".")[0]
        if other not in RANK or RANK.get(own, 0) < RANK[other]:
            faults.append(f"{where}: lamina.{module} imports lamina.{target}, which is in a later layer or in none")
    return faults


def cycles(package: Path) -> list[str]:
    """One cycle of modules and one of folders, if there are any."""
    edges = [(module, target) for module, target, _ in internal_imports(package) if module]
    folders = [(a.split(".")[0], b.split(".")[0]) for a, b in edges]
    found = []
    for pairs in (edges, [(a, b) for a, b in folders if a != b]):
        graph: dict[str, set[str]] = {}
        for module, target in pairs:
            graph.setdefault(module, set()).add(target)
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            found.append(" → ".join(reversed(error.args[1])))
    return found


def style_faults(package: Path) -> list[str]:
    """What the house rules ban and ruff does not know."""
    faults = []
    for module, file in modules(package).items():
        for node, where in nodes(file):
            match node:
                case ast.Call(func=ast.Name(id="hasattr")):
                    faults.append(f"{where}: hasattr probes; state the type, or catch AttributeError where it is meant")
                case ast.ExceptHandler(type=None | ast.Name(id="Exception" | "BaseException")):
                    faults.append(f"{where}: catches everything; name the errors that are expected")
                case ast.keyword(arg="trust_remote_code", value=value) if ast.unparse(value) != "False":
                    faults.append(f"{where}: trust_remote_code runs code from a checkpoint")
                case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if name in DISK:
                    if {module, module.split(".")[0]} & NO_DISK:
                        faults.append(f"{where}: {name} touches the disk, which lamina.{module} does not")
        if (lines := len(file.read_text(encoding="utf-8").splitlines())) > LINES:
            faults.append(f"{file.name}: {lines} lines, expected at most {LINES}: is there a room missing?")
    return faults


def test_modules_import_earlier_layers_only() -> None:
    faults = layer_faults(PACKAGE)
    assert not faults, "\n".join(faults)


def test_no_import_cycles() -> None:
    faults = cycles(PACKAGE)
    assert not faults, "\n".join(faults)


def test_house_rules() -> None:
    faults = style_faults(PACKAGE)
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("check", "files", "fault"),
    [
        (
            layer_faults,
            {"ops/a.py": "def f():\n    from lamina.training import b", "training/b.py": ""},
            "a.py:2: lamina.ops.a imports",
        ),
        (layer_faults, {"ops/a.py": "from . import b", "ops/b.py": ""}, "a.py:1: lamina.ops.a imports lamina..b"),
        (layer_faults, {"run.py": "from lamina import fine_tune"}, "run.py:1: lamina.run imports"),
        (layer_faults, {"helpers.py": ""}, "helpers: is in no layer"),
        (
            cycles,
            {"ops/a.py": "import lamina.ops.b", "ops/b.py": "from lamina.ops.a import x"},
            "ops.a → ops.b → ops.a",
        ),
        (
            cycles,
            {"model/a.py": "import lamina.data.b", "data/b.py": "", "data/c.py": "import lamina.model.a"},
            "model → data",
        ),
        (style_faults, {"cli.py": "hasattr(1, 'x')"}, "cli.py:1: hasattr"),
        (style_faults, {"cli.py": "try:\n    pass\nexcept Exception:\n    pass"}, "cli.py:3: catches everything"),
        (style_faults, {"cli.py": "try:\n    pass\nexcept:\n    pass"}, "cli.py:3: catches everything"),
        (style_faults, {"cli.py": "f(trust_remote_code=True)"}, "cli.py:1: trust_remote_code"),
        (style_faults, {"adapter.py": "p.write_text('')"}, "adapter.py:1: write_text touches the disk"),
        (style_faults, {"cli.py": "\n" * (LINES + 1)}, "cli.py: 301 lines"),
    ],
)
def test_the_rules_bite(check, files: dict[str, str], fault: str, tmp_path: Path) -> None:
    for name, text in files.items():
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
        (file.parent / "__init__.py").touch()
    assert any(fault in found for found in check(tmp_path)), check(tmp_path)


def test_imported_packages_are_declared_dependencies() -> None:
    """What another package happens to bring may go with its next version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {requirement.split(">=")[0].replace("_", "-").lower() for requirement in project["dependencies"]}
    declared.add("triton")  # torch's builds for CUDA bring it; where it is not, nothing that needs it is imported
    owners = packages_distributions()
    undeclared = [
        f"{where}: {name}"
        for file in modules(PACKAGE).values()
        for name, where in imports(file)
        if (top := name.split(".")[0]) not in {*sys.stdlib_module_names, "lamina"}
        and not declared & {owner.replace("_", "-").lower() for owner in owners.get(top, [])}
    ]
    assert not undeclared, "\n".join(undeclared)


def test_dependencies_are_bounded_on_both_sides() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [r for group in (project["dependencies"], *project["optional-dependencies"].values()) for r in group]
    assert [r for r in requirements if ">=" not in r or ",<" not in r] == []


@pytest.mark.parametrize(
    "command", [["ruff", "format", "--check"], ["ruff", "check", "--output-format=concise"]], ids=" ".join
)
def test_format_and_lint(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *command, "."], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_types() -> None:
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
