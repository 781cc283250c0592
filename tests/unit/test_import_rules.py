"""The rules of the architecture that can be read off the source."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIB = ROOT / "lib" / "aslseg"
# later packages may import earlier ones, never the other way round; modules beside them count as one layer
ORDER = [
    "base",
    "compute",
    "volume",
    "cases",
    "prompts",
    "ssl",
    "sam",
    "adaptation",
    "agreement",
    "models",
    "rounds",
    "review",
    "serving",
    "api",
    "console",
    "commands",
    "cli",
]
# the same for the folders of rounds/; the modules beside them are last
ROUNDS = [
    "ledger",
    "scheduling",
    "label_files",
    "steps",
    "folds",
    "feedback",
    "gate",
    "promotion",
    "recipes",
    "modules",
]
BASE = {"settings", "types", "errors", "registry", "resources", "files", "__init__"}
SIBLINGS = {("ssl", "sam"), ("sam", "ssl")}  # neither may import the other
WITHOUT_TORCH = ["aslseg.settings", "aslseg.registry", "aslseg.rounds.ledger.ledger", "aslseg.cli"]
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}

OURS = sorted(LIB.rglob("*.py"))
ALL = OURS + [p for folder in ("apps", "scripts", "benchmarks") for p in sorted((ROOT / folder).rglob("*.py"))]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def layer(module: str) -> str:
    """``aslseg.volume.io`` to ``volume``; what the package itself defines (``aslseg.__version__``) to ``base``."""
    part = module.split(".")[1] if "." in module else "__init__"
    return part if part in ORDER or part == "__main__" else "base"


def imports(path: Path) -> list[tuple[str, int]]:
    """Every imported module with its line, at any depth; type-checking imports are free."""
    free = {
        id(node)
        for branch in ast.walk(tree(path))
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for statement in branch.body
        for node in ast.walk(statement)
    }
    found = []
    for node in ast.walk(tree(path)):
        if id(node) in free:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}:{node.lineno}: relative import"
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]


def test_every_package_has_its_place_in_the_order():
    packages = {p.name for p in LIB.iterdir() if p.is_dir() and any(p.glob("*.py"))}
    assert packages <= set(ORDER) | BASE
    modules = {p.stem for p in LIB.glob("*.py")}
    assert modules <= BASE | {"api", "console", "cli", "__main__"}


@pytest.mark.parametrize("path", OURS, ids=name)
def test_imports_point_back(path):
    own = layer(".".join(path.relative_to(LIB.parent).with_suffix("").parts))
    if own == "__main__":
        return
    for module, line in imports(path):
        if module.split(".")[0] == "aslseg" and layer(module) != own:
            allowed = ORDER.index(layer(module)) < ORDER.index(own) and (own, layer(module)) not in SIBLINGS
            assert allowed, f"{name(path)}:{line}: {own} may not import {module}"


def folder_of_rounds(module: str) -> str:
    """``aslseg.rounds.gate.fresh`` to ``gate``, ``aslseg.rounds.run`` to ``modules``."""
    part = module.split(".")[2]
    return part if part in ROUNDS else "modules"


def test_every_folder_of_rounds_has_its_place_in_the_order():
    assert {p.parent.name for p in (LIB / "rounds").glob("*/*.py")} == set(ROUNDS) - {"modules"}


@pytest.mark.parametrize("path", sorted((LIB / "rounds").rglob("*.py")), ids=name)
def test_imports_within_rounds_point_back(path):
    own = folder_of_rounds(".".join(path.relative_to(LIB.parent).with_suffix("").parts))
    for module, line in imports(path):
        if module.startswith("aslseg.rounds."):
            allowed = ROUNDS.index(folder_of_rounds(module)) <= ROUNDS.index(own)
            assert allowed, f"{name(path)}:{line}: {own} may not import {module}"


@pytest.mark.parametrize("path", ALL, ids=name)
def test_only_serving_and_the_app_import_monailabel(path):
    if path.is_relative_to(LIB) and not path.is_relative_to(LIB / "serving"):
        found = [line for module, line in imports(path) if module.split(".")[0] == "monailabel"]
        assert not found, f"{name(path)}: lines {found}"


@pytest.mark.parametrize("path", ALL, ids=name)
def test_files_and_functions_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= 60, f"{name(path)}:{node.lineno}: {node.name} has {length} lines"


def test_the_app_is_short():
    main = ROOT / "apps" / "aslseg" / "main.py"
    if main.exists():
        assert len(main.read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("path", ALL, ids=name)
def test_nothing_prints_but_the_command_line(path):
    if path != LIB / "cli.py":
        found = [node.lineno for called, node in calls(path) if called == "print"]
        assert not found, f"{name(path)}: print in lines {found}"


@pytest.mark.parametrize("path", ALL, ids=name)
def test_nothing_unpickles_or_evaluates(path):
    for module, line in imports(path):
        # the error that torch.load(weights_only=True) raises has to be named to be caught
        harmless = module == "pickle.UnpicklingError"
        assert harmless or module.split(".")[0] not in FORBIDDEN_IMPORTS, f"{name(path)}:{line}: imports {module}"
    for called, node in calls(path):
        where = f"{name(path)}:{node.lineno}: {called}"
        assert called not in ("eval", "exec", "compile", "__import__", "os.system"), where
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if called == "torch.load":
            assert keywords.get("weights_only") == "True", f"{where} without weights_only=True"
        assert keywords.get("weights_only") != "False", where
        assert keywords.get("allow_pickle") != "True", where
        assert keywords.get("shell") != "True", where
        assert not called.startswith("yaml.") or called == "yaml.safe_load", where


@pytest.mark.parametrize("path", ALL, ids=name)
def test_no_bare_except(path):
    found = [n.lineno for n in ast.walk(tree(path)) if isinstance(n, ast.ExceptHandler) and n.type is None]
    assert not found, f"{name(path)}: lines {found}"


@pytest.mark.parametrize("path", ALL, ids=name)
def test_nothing_is_left_for_later(path):
    text = path.read_text(encoding="utf-8")
    assert not [word for word in ("TO" + "DO", "FIX" + "ME", "X" * 3) if word in text]
    for called, node in calls(path):
        assert called != "NotImplementedError", f"{name(path)}:{node.lineno}: a stub"


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_starts_without_torch(module):
    code = f"import sys, {module}; sys.exit(sum(m in sys.modules for m in ('torch', 'monai', 'monailabel')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr or f"{module} imports torch, MONAI or MONAI Label"
