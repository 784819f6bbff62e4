"""What the layout of the sources promises: no import circles, files and functions of a size one can read."""

import ast
from pathlib import Path

import pytest

import fastattn

ROOT = Path(fastattn.__file__).parents[1]
SOURCES = [path for folder in ("fastattn", "csrc", "kernels") for path in sorted((ROOT / folder).rglob("*"))]
SOURCES = [path for path in SOURCES if path.suffix in (".py", ".h", ".cpp")]
PYTHON = [path for path in SOURCES if path.suffix == ".py"]


def name_of(path):
    folder = path.relative_to(ROOT)
    folder = Path("fastattn", folder) if folder.parts[0] == "kernels" else folder
    return ".".join(folder.with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in PYTHON}


def imports(path, name):
    """Modules of ours that a file imports when it is imported, not inside functions or for type checkers."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.parse(path.read_text()).body:
        for statement in [node, *getattr(node, "body", [])] if isinstance(node, ast.Try) else [node]:
            if isinstance(statement, ast.ImportFrom):
                base = package.split(".")[: len(package.split(".")) - statement.level + 1] if statement.level else []
                module = ".".join([*base, *([statement.module] if statement.module else [])])
                whole = {f"{module}.{alias.name}" for alias in statement.names}
                found |= {x if x in MODULES else module for x in whole}
            elif isinstance(statement, ast.Import):
                found |= {alias.name for alias in statement.names}
    return {x for x in found if x in MODULES and x != name}


def test_no_import_circle_in_python():
    graph = {name: imports(path, name) for name, path in MODULES.items()}
    graph = {name: {x for x in found if x not in ("fastattn",)} for name, found in graph.items()}
    # A package's own __init__ is imported with each of its modules: what it collects does not make a circle of them.
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    done = set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name] - packages):
                visit(other, [*path, name])
            done.add(name)

    for name in sorted(graph.keys() - packages):
        visit(name, [])


def test_no_include_circle_in_cpp():
    files = {path.relative_to(ROOT / "csrc").as_posix(): path for path in SOURCES if path.suffix in (".h", ".cpp")}
    graph = {}
    for name, path in files.items():
        quoted = [line.split('"')[1] for line in path.read_text().splitlines() if line.startswith('#include "')]
        beside = [(Path(name).parent / other).as_posix() for other in quoted]
        graph[name] = [x if x in files else y for x, y in zip(beside, quoted, strict=True)]
        assert all(other in files for other in graph[name]), (name, graph[name])

    def visit(name, path):
        assert name not in path, " -> ".join([*path, name])
        for other in graph[name]:
            visit(other, [*path, name])

    for name in graph:
        visit(name, [])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_is_long(path):
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_function_is_long_or_takes_many_arguments_by_position(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and not is_kernel(node):
            assert node.end_lineno - node.lineno < 100, node.name
            # transformers calls an attention function with 13; flash-attn's functions have flash-attn's arguments
            limit = 33 if "flash_attn" in path.parts else 13
            assert len(node.args.posonlyargs + node.args.args) <= limit, node.name


def is_kernel(function):
    """Triton has no keyword-only arguments, and a kernel is one function."""
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def test_no_test_file_imports_a_test_file():
    tests = {path.stem: path for path in (ROOT / "tests").rglob("test_*.py")}
    assert len(tests) == len(list((ROOT / "tests").rglob("test_*.py")))  # pytest imports them by their bare names
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not tests.keys() & set(names), f"{path.name} imports {names}"
