"""House rules that a machine can hold: who imports whom, sizes, what happens at import, units in names."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "apexsim"

# The floors of the house, from the ground up. A module imports from its own floor and from those below, never from
# above: not inside functions, and not for types alone.
FLOORS = (
    {"errors"},
    {
        "units",
        "atomic",
        "columns",
        "tables",
        "reading",
        "metrics",
        "quantiles",
        "versions",
        "reasons",
    },  # numbers, files, arithmetic that know nothing of serving
    {"specs"},
    {"costs"},
    {"results", "replicas", "usage", "result_files", "flows", "steady", "batch_means", "summary", "uncertainty"},
    {"serving"},
    {"search"},
    {
        "io",
        "catalog",
        "fitting",
        "validation",
        "calibration",
        "planning",
        "plots",
        "sweep",
        "testing",
        "cli",
    },  # the edges
)
# Edges that only these may import; ``planning`` comes with ``import apexsim``.
CALLERS = {
    "cli": set(),
    "testing": set(),
    "fitting": {"cli"},
    "plots": {"cli"},
    "calibration": {"cli"},
    "planning": {"cli", "__init__"},
}

# Where a library may be imported; it is the only such place.
PLACES = {
    "simpy": "serving/",
    "yaml": "io/",
    "typer": "cli/",
    "rich": "cli/",
    "matplotlib": "plots.py",
    "ray": "search/executors.py",
    "scipy": ("fitting/", "calibration.py", "specs/laws.py", "batch_means.py"),
    "torch": (),
}
# Slow to import, so only inside functions.
INSIDE_FUNCTIONS = {"matplotlib", "ray", "scipy", "networkx"}

# Modules of kernels_profiling that are commands.
COMMANDS = {"commands", "measure", "live", "swiftkv", "second_engine", "prove", "serving_flags"}

MAX_FUNCTION_LINES = 40
MAX_ARGUMENTS = 6
MAX_MODULE_LINES = 400

# Functions that may be called while a module is imported: they make types, fields, patterns and small constants.
AT_IMPORT = {
    "field", "dataclass", "model_validator", "field_validator", "field_serializer", "model_serializer",
    "cache", "lru_cache", "staticmethod", "re.compile",
    "typer.Option", "typer.Argument", "app.callback", "np.exp2", "np.arange",
    "list", "tuple", "dict", "frozenset", "getattr", "type", "next", "range",
}  # fmt: skip
READS_OR_CONFIGURES = re.compile(r"\w+\.(items|values|add_implicit_resolver|add_representer|add_constructor)")

OTHER_UNITS = re.compile(r"_(ms|us|gb|gib|mb|mib|kb|kib|tb|tflops|gbps|mw|kwh)$", re.IGNORECASE)
# Columns of published tables, named by those who measured them.
NAMED_BY_OTHERS = ("fitting/",)


def modules(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


OURS = modules(PACKAGE)
PROFILER = modules(ROOT / "kernels_profiling")
SIZED = [*OURS, *PROFILER, *modules(ROOT / "scripts", ROOT / "benchmarks")]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def inside(path: Path) -> str:
    """A path of the package such as ``serving/clock.py``."""
    return path.relative_to(PACKAGE).as_posix()


def room(name: str) -> str:
    """The part of the package that a dotted name or a path inside it belongs to."""
    return re.split(r"[./]", name.removeprefix("apexsim").lstrip("."))[0]


def floor(name: str) -> int:
    found = [number for number, rooms in enumerate(FLOORS) if room(name) in rooms]
    assert found, f"{name} has no floor: put its room into FLOORS"
    return found[0]


def imports(path: Path) -> Iterator[tuple[str, int, bool]]:
    """Imported modules, their lines, and whether the import is that of a module (not of a function)."""
    outer = {id(node) for node in at_import(tree(path))}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: import by full name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield name, node.lineno, id(node) in outer


def at_import(module: ast.Module) -> Iterator[ast.AST]:
    """Every node that is evaluated when the module is imported: not what is inside functions, or for types only."""
    pending: list[ast.AST] = list(module.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'"):
            continue
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            pending += [*node.decorator_list, *node.args.defaults, *(d for d in node.args.kw_defaults if d)]
        elif not isinstance(node, ast.Lambda):
            pending += ast.iter_child_nodes(node)


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_imports_go_down_only() -> None:
    faults = []
    for path in OURS:
        if inside(path) == "__init__.py":
            continue
        for name, line, _ in imports(path):
            if not name.startswith("apexsim.") or name == "apexsim.__version__":
                continue
            importer = inside(path).removesuffix(".py")
            allowed = CALLERS.get(room(name))
            outsider = allowed is not None and room(importer) not in {*allowed, room(name)}
            if floor(name) > floor(importer) or outsider:
                faults.append(f"{inside(path)}:{line} imports {name}")
    assert not faults


def test_modules_do_not_import_each_other_in_circles() -> None:
    """What modules import when they are imported makes a graph without a circle."""
    known = {inside(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in OURS}
    graph: dict[str, set[str]] = {}
    for path in OURS:
        importer = inside(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        names = {name.removeprefix("apexsim.") for name, _, outer in imports(path) if outer and "apexsim" in name}
        targets = {name if name in known else name.rpartition(".")[0] for name in names}
        graph[importer] = (targets & known) - {importer, "__init__"}
    while graph:
        leaves = {name for name, targets in graph.items() if not targets & graph.keys()}
        assert leaves, f"a circle among {sorted(graph)}"
        graph = {name: targets for name, targets in graph.items() if name not in leaves}


def test_libraries_stay_in_their_place() -> None:
    faults = [
        f"{inside(path)}:{line} imports {name}"
        for path in OURS
        for name, line, outer in imports(path)
        for library in [name.split(".")[0]]
        if not inside(path).startswith(PLACES.get(library, "")) or (outer and library in INSIDE_FUNCTIONS)
    ]
    assert not faults


def test_simulator_never_imports_the_profiler() -> None:
    assert not [path for path in OURS for name, _, _ in imports(path) if name.startswith("kernels_profiling")]


def test_the_profiler_brings_no_second_clock_and_no_second_yaml() -> None:
    """Time there is that of the wall; files are read where the traps of their formats are closed."""
    faults = [
        f"{path.name}:{line} imports {name}"
        for path in PROFILER
        for name, line, _ in imports(path)
        if name.split(".")[0] in {"simpy", "yaml", "matplotlib", "ray", "scipy"}
    ]
    assert not faults


@pytest.mark.parametrize("path", [path for path in PROFILER if path.stem in COMMANDS], ids=lambda path: path.name)
def test_commands_of_the_profiler_are_light_to_import(path: Path) -> None:
    """Their ``--help`` needs no torch."""
    assert not [name for name, _, outer in imports(path) if outer and name.split(".")[0] in ("torch", "transformers")]


@pytest.mark.parametrize("path", SIZED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_sizes(path: Path) -> None:
    """Lines count docstrings, arguments everything a caller can name but ``self`` and ``cls``."""
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_MODULE_LINES
    for function in functions(path):
        length = (function.end_lineno or function.lineno) - function.lineno + 1
        assert length <= MAX_FUNCTION_LINES, f"{function.name} has {length} lines"
        args = function.args
        named = [arg.arg for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs)]
        count = len([name for name in named if name not in ("self", "cls")])
        assert count <= MAX_ARGUMENTS, f"{function.name} has {count} arguments"


def test_no_work_at_import() -> None:
    """Importing a module makes types, functions and constants: no loops, files or calls of one's own functions."""
    faults = []
    for path in OURS:
        for node in at_import(tree(path)):
            if isinstance(node, ast.While | ast.With | ast.Try | ast.Raise | ast.Assert | ast.Delete):
                faults.append(f"{inside(path)}:{node.lineno} {type(node).__name__}")
            if isinstance(node, ast.Call) and not _may_be_called(ast.unparse(node.func)):
                faults.append(f"{inside(path)}:{node.lineno} calls {ast.unparse(node.func)}")
    assert not faults


def _may_be_called(function: str) -> bool:
    name = function.rpartition(".")[2].lstrip("_")
    return name[:1].isupper() or function in AT_IMPORT or READS_OR_CONFIGURES.fullmatch(function) is not None


def test_only_the_command_line_prints() -> None:
    faults = [
        f"{path.name}:{node.lineno}"
        for path in (*OURS, *PROFILER)
        if path in PROFILER or room(inside(path)) != "cli"
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stdout.write", "sys.stderr.write")
    ]
    assert not faults


def test_units_in_names_are_the_houses() -> None:
    faults = [
        f"{path.name}:{line} {name}"
        for path in (*OURS, *PROFILER)
        if path in PROFILER or not inside(path).startswith(NAMED_BY_OTHERS)
        for name, line in _names(path)
        if OTHER_UNITS.search(name)
    ]
    assert not faults


def _names(path: Path) -> Iterator[tuple[str, int]]:
    """Names of functions, classes, arguments, variables, attributes, and of columns and keys."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            yield node.value, node.lineno


@pytest.mark.parametrize("folder", ["device_profiles", "engine_profiles", "model_specs", "workloads", "examples"])
def test_units_in_yaml_keys_are_the_houses(folder: str) -> None:
    files = sorted((ROOT / folder).glob("*.yaml"))
    assert files
    for path in files:
        wrong = [key for key in _keys(yaml.safe_load(path.read_text(encoding="utf-8"))) if OTHER_UNITS.search(key)]
        assert not wrong, path.name


def _keys(data: object) -> Iterator[str]:
    if isinstance(data, dict):
        for key, value in data.items():
            yield str(key)
            yield from _keys(value)
    elif isinstance(data, list):
        for value in data:
            yield from _keys(value)


def test_public_things_say_what_they_are() -> None:
    """Modules, and the public functions, classes and methods in them, have a docstring.

    Not the methods of a protocol or of a subclass, which are said where they are declared, nor properties whose name
    says it all.
    """
    faults = []
    for path in (*OURS, *PROFILER):
        if not ast.get_docstring(tree(path)):
            faults.append(path.name)
        for node in tree(path).body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            overload = any("overload" in ast.unparse(decorator) for decorator in node.decorator_list)
            if not overload and not ast.get_docstring(node):
                faults.append(f"{path.name}:{node.lineno} {node.name}")
    assert not faults


def test_nothing_is_left_to_do() -> None:
    unfinished = re.compile(r"\b(TODO|FIXME|XXX|HACK|NotImplementedError)\b")
    assert not [path.name for path in (*OURS, *PROFILER) if unfinished.search(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("path", modules(ROOT / "tests"), ids=lambda path: path.name)
def test_no_test_depends_on_how_busy_the_machine_is(path: Path) -> None:
    """None reads a clock to compare with, gives an example a deadline, or lets hypothesis find an example too slow."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "time":
            assert node.attr not in ("time", "perf_counter", "perf_counter_ns", "process_time"), node.lineno
        if isinstance(node, ast.keyword) and node.arg == "deadline":
            assert ast.unparse(node.value) == "None", node.lineno
        if isinstance(node, ast.keyword) and node.arg == "suppress_health_check":
            assert "too_slow" in ast.unparse(node.value), node.value.lineno


# -- the heart of the engine -------------------------------------------------------------------------------------------

PLAIN = "request", "job", "ledger", "policies", "scheduler", "kv_cache", "decodes", "batch", "replica"


def _code_lines(path: Path) -> int:
    """Lines that hold code: neither blank, nor a comment alone, nor part of a docstring."""
    text = path.read_text(encoding="utf-8")
    documented = ast.Module | ast.ClassDef | ast.FunctionDef
    strings = [node.body[0] for node in ast.walk(ast.parse(text)) if isinstance(node, documented) and node.body]
    texts = [each for each in strings if isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant)]
    said = {line for each in texts for line in range(each.lineno, (each.end_lineno or each.lineno) + 1)}
    lines = enumerate(text.splitlines(), start=1)
    return sum(bool(line.strip()) and not line.lstrip().startswith("#") and at not in said for at, line in lines)


def test_the_plain_path_is_read_in_an_hour() -> None:
    sizes = {name: _code_lines(PACKAGE / "serving" / f"{name}.py") for name in PLAIN}
    assert sum(sizes.values()) <= 1_350, sizes


def test_the_fast_path_is_named_behind_its_door_alone() -> None:
    """Whoever does not open ``serving/fast`` meets neither its words nor its modules; only ``Replica`` has the key."""
    outside = [path for path in PACKAGE.rglob("*.py") if "fast" not in path.relative_to(PACKAGE).parts]
    for path in outside:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"cohort|march", text, re.IGNORECASE), path
        found = re.findall(r"apexsim\.serving\.fast\S*", text)
        assert found == (["apexsim.serving.fast"] if path.name == "replica.py" else []), path
    assert len((PACKAGE / "serving" / "replica.py").read_text(encoding="utf-8").splitlines()) <= 220


def test_a_request_changes_rooms_seldom() -> None:
    spec = importlib.util.spec_from_file_location("rooms", ROOT / "benchmarks" / "rooms.py")
    assert spec is not None
    assert spec.loader is not None
    rooms = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rooms)
    for pipeline, most in ((1, 60), (2, 100)):
        changes, _ = rooms.changes_of_room(2_000, pipeline)
        assert changes.total() / 2_000 <= most, changes.most_common(5)
