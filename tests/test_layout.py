"""The house rules: layering, small files, style, and nothing that does not belong."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import REPOSITORY

ROOMS = sorted((REPOSITORY / "open_rm").glob("*.py"))
# Rooms that import nothing of ours but the exception that is shown to a user, and what stands here.
LEAVES = {
    **dict.fromkeys(
        ("errors", "losses", "attention", "steps", "tokenization", "metrics", "tracking", "plots", "hub"), set()
    ),
    **dict.fromkeys(("command_line", "messages", "sources"), set()),
    "rows": {"messages"},
    "adapters": set(),
    "families": {"adapters", "tokenization"},
    "inspection_findings": {"tokenization"},
    "batching": {"attention"},  # a packed batch carries its segments
    "plan": {"steps"},  # the number of steps is counted by drawing them
}


def imports_of_ours(path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "open_rm":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("open_rm.")}
    return found


def test_leaf_rooms_import_nothing_of_ours():
    for path in ROOMS:
        if path.stem in LEAVES:
            assert imports_of_ours(path) <= {"errors"} | LEAVES[path.stem], path.name


def test_nobody_imports_the_recipe():
    for path in ROOMS:
        assert "reward_modeling" not in imports_of_ours(path), path.name


def test_arrows_go_one_way():
    graph = {path.stem: imports_of_ours(path) for path in ROOMS}

    def reachable(room, seen):
        for other in graph.get(room, ()):
            assert other not in seen, f"{' -> '.join([*seen, other])} is a circle"
            reachable(other, [*seen, other])

    for room in graph:
        reachable(room, [room])


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: path.stem)
def test_rooms_are_small_documented_and_named_for_what_they_do(path):
    source = path.read_text()
    assert ast.get_docstring(ast.parse(source)), "no module docstring"
    assert path.stem not in {"utils", "common", "helpers"} | set(sys.stdlib_module_names)
    assert len(source.splitlines()) <= 400


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
