"""The house rules: arrows that run down, small rooms, flags in groups, style, and nothing that does not belong."""

import ast
import dataclasses
import re
import subprocess
import sys

import pytest
from conftest import REPOSITORY

from open_rm import flags

PACKAGE = REPOSITORY / "open_rm"
ROOMS = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(path.relative_to(PACKAGE)) for path in ROOMS]
# From the ground up. A file imports from its own folder and from what stands before it.
ORDER = [
    "errors",
    "bounds",
    "flags",
    "manifest",
    "alive",
    "process_group",
    "node_cache",
    "ranks",
    "alike",
    "measures",
    "data",
    "batching",
    "model",
    "resolving",
    "scoring",
    "serving",
    "training",
    "reliability",
    "evaluation",
    "publishing",
    "inspection",
    "dry_run",
    "checks",
    "command_line",
]
# Started with python -m: these import anything, and are imported by nobody.
COMMANDS = {
    "reward_modeling.py",
    "export.py",
    "hub.py",
    "serve.py",
    "toy.py",
    "inspection/__main__.py",
    "scoring/__main__.py",
    "evaluation/__main__.py",
}
# The interface is transformers'.
ATTENTION_FUNCTIONS = {"segment_attention", "dense_attention"}


def imported(path) -> set[str]:
    """Dotted names below open_rm that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "open_rm":
            inside = node.module.split(".")[1:]
            found |= {".".join([*inside, alias.name]) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("open_rm.") for alias in node.names if alias.name.startswith("open_rm.")}
    return found


def functions(path):
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


def test_arrows_run_down():
    for path, name in zip(ROOMS, NAMES, strict=True):
        if name in COMMANDS or name == "__init__.py":
            continue
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for other in {dotted.split(".")[0] for dotted in imported(path)}:
            assert other == own or ORDER.index(other) < ORDER.index(own), f"{name}: {own} -> {other}"


def test_nobody_imports_a_command():
    commands = {name.removesuffix(".py").replace("/", ".") for name in COMMANDS}
    for path, name in zip(ROOMS, NAMES, strict=True):
        for dotted in imported(path):
            assert not any(dotted == command or dotted.startswith(f"{command}.") for command in commands), name


def test_rooms_of_a_folder_do_not_import_each_other_in_circles():
    graph = {}
    for path, name in zip(ROOMS, NAMES, strict=True):
        room = name.removesuffix(".py").replace("/", ".")
        graph[room] = {other for dotted in imported(path) for other in (dotted, dotted.rpartition(".")[0])} - {room}

    def walk(room, way):
        for other in graph.get(room, ()):
            assert other not in way, f"{' -> '.join([*way, other])} is a circle"
            if other in graph:
                walk(other, [*way, other])

    for room in graph:
        walk(room, [room])


def test_flags_import_their_bounds_alone_and_nothing_heavy():
    program = "import sys, open_rm.flags; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "datasets", "deepspeed", "numpy", "tyro"} & set(loaded.stdout.split())
    assert {name.partition(".")[0] for name in imported(PACKAGE / "flags.py")} == {"bounds"}
    assert imported(PACKAGE / "bounds.py") == set()


@pytest.mark.parametrize("path", ROOMS, ids=NAMES)
def test_rooms_are_small_documented_and_named_for_what_they_do(path):
    source = path.read_text()
    assert ast.get_docstring(ast.parse(source)), "no module docstring"
    assert path.stem not in {"utils", "common", "helpers"} | set(sys.stdlib_module_names)
    assert len(source.splitlines()) <= 400
    for function in functions(path):
        assert function.end_lineno - function.lineno < 70, f"{function.name} is long"
        of_function = function.args
        parameters = [*of_function.posonlyargs, *of_function.args, *of_function.kwonlyargs]
        named = [parameter.arg for parameter in parameters if parameter.arg not in ("self", "cls")]
        assert len(named) <= 7 or function.name in ATTENTION_FUNCTIONS, f"{function.name} takes {len(named)} parameters"


def test_the_recipe_is_short_and_so_is_its_loop():
    source = (PACKAGE / "reward_modeling.py").read_text()
    assert len(source.splitlines()) <= 320
    [loop] = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.For) and ast.unparse(node.target) == "step"
    ]
    assert loop.end_lineno - loop.lineno < 45
    for verb in ("engine(", "loss_terms(", "engine.backward(", "engine.step("):
        assert verb in ast.unparse(loop), f"{verb} is not in sight"


def test_checks_are_by_concern_and_short():
    for function in functions(PACKAGE / "checks.py"):
        assert function.end_lineno - function.lineno < 35, function.name


def test_a_folder_lists_its_rooms():
    for path in ROOMS:
        if path.name == "__init__.py" and path.parent != PACKAGE:
            listed = re.findall(r"^(\w+)  +\S", path.read_text(), re.MULTILINE)
            assert sorted(listed) == sorted(room.stem for room in path.parent.glob("[!_]*.py")), path.parent.name


# ---------------------------------------------------------------- flags

GROUPS = {name: kind for name, kind in vars(flags).items() if name.endswith("Flags")}


def annotated() -> list[tuple[str, ast.FunctionDef, str, str]]:
    """(file, function, parameter, group) for every parameter that takes flags."""
    found = []
    for path, name in zip(ROOMS, NAMES, strict=True):
        for function in functions(path):
            for parameter in [*function.args.args, *function.args.kwonlyargs]:
                kind = parameter.annotation and ast.unparse(parameter.annotation)
                if kind in {*GROUPS, "Args"}:
                    found.append((name, function, parameter.arg, kind))
    return found


def test_only_what_looks_at_a_whole_run_takes_all_flags():
    takers = {name for name, _, _, group in annotated() if group == "Args"}
    assert takers <= {"reward_modeling.py", "checks.py", "inspection/__main__.py", "resolving.py", "dry_run/telling.py"}


def attributes_of(function: ast.FunctionDef, parameter: str) -> set[str]:
    nodes = [node for node in ast.walk(function) if isinstance(node, ast.Attribute)]
    return {node.attr for node in nodes if isinstance(node.value, ast.Name) and node.value.id == parameter}


def test_a_room_reads_its_own_group_of_flags_alone():
    """Args passes for every group, and nothing but this keeps a room from reading a flag of another one."""
    for name, function, parameter, group in annotated():
        if group != "Args":
            own = {field.name for field in dataclasses.fields(GROUPS[group])}
            foreign = attributes_of(function, parameter) - own
            assert not foreign, f"{name}: {function.name} reads {sorted(foreign)} of {parameter}: {group}"


def test_every_flag_is_read_by_a_room_or_by_the_recipe():
    read = set()
    for name, function, parameter, _ in annotated():
        if name != "checks.py":
            read |= attributes_of(function, parameter)
    for function in functions(PACKAGE / "reward_modeling.py"):  # where `args` may also be a local name for run.args
        read |= attributes_of(function, "args")
    # under a name that is put together, in data/building.py
    read |= {"dataset_mixer_list", "dataset_mixer_list_splits", "dataset_mixer_eval_list_splits"}
    assert {field.name for field in dataclasses.fields(flags.Args)} <= read


def test_every_fault_in_the_docs_names_tests_that_exist():
    defined = {}
    for path in (REPOSITORY / "tests").rglob("test_*.py"):
        defined[path.stem] = {function.name for function in functions(path)}
    lines = (REPOSITORY / "docs" / "reliability.md").read_text().splitlines()
    faults = [line for line in lines if "::" in line]
    assert len(faults) > 20
    for line in faults:
        for file, name in re.findall(r"`(\w+)::(\w+)`", line.rpartition(" | ")[2]):
            assert name in defined[file], f"{file}::{name}"


# ---------------------------------------------------------------- what does not belong


def test_the_peer_is_never_imported():
    for path in ROOMS:
        assert not re.search(r"^\s*(import|from) trl\b", path.read_text(), re.MULTILINE), path.name


def test_style_is_clean():
    for command in (["check", "."], ["format", "--check", "."]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command], cwd=REPOSITORY, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_requirement_is_pinned_and_has_a_reason():
    for name in ("requirements.txt", "requirements-dev.txt"):
        for line in (REPOSITORY / name).read_text().splitlines():
            if line and not line.startswith(("#", "-r")):
                assert re.fullmatch(r"[\w.-]+==[\w.]+ +# .+", line), line
