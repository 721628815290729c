"""Whose scores are compared: files read and judged, each model under a name of its own."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from open_rm.errors import UserError
from open_rm.evaluation import score_file
from open_rm.evaluation.page import inert
from open_rm.evaluation.rules.verdict import Verdict
from open_rm.evaluation.score_folders import OF_A_RUN, scores_path, why_none
from open_rm.evaluation.scored import ScoredSet
from open_rm.evaluation.trust.report import FACTS, judge

MODEL = "model"  # in scores.meta.json
ROWS_ALIKE = "preference data"  # what sets of the same rows are called where each has the name of its file
# A set in a table: its benchmark, since one model's copy of that may have another name; else (None, its name), as where a model has
# several of a benchmark.
Key = tuple[str | None, str]


@dataclass(frozen=True)
class Model:
    """name: unique in a table.  path: its scores.  made: how they were made, label to value.  sets, verdicts: by Key."""

    name: str
    path: Path
    made: dict
    sets: dict[Key, ScoredSet]
    verdicts: dict[Key, Verdict]


def read(paths: Sequence[str | Path]) -> list[Model]:
    """Raises UserError: no paths, a folder without scores, one input twice, or what score_file says of a file."""
    if not paths:
        raise UserError("nothing to compare: name folders with scores, or scores files")
    files: dict[Path, str | Path] = {}
    for path in paths:
        file = _scores_of(path)
        if file.resolve() in files:
            raise UserError(f"{path} is the same as {files[file.resolve()]}: name each model's scores once")
        files[file.resolve()] = path
    made = {file: score_file.read_meta(file) for file in files}
    sets = _by_key(_named({file: score_file.read_scores(file) for file in files}))
    return [
        Model(
            name,
            file,
            _shown(made[file]),
            sets[file],
            dict(zip(sets[file], judged(file, sets[file].values()), strict=True)),
        )
        for file, name in _names(made).items()
    ]


def judged(file: Path, sets: Iterable[ScoredSet]) -> list[Verdict]:
    """The sets of a file by their rules.

    Raises:
        UserError: they cannot judge one; the sentence begins with the file.
    """
    try:
        return [judge(scored) for scored in sets]
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def _names(made: dict[Path, dict]) -> dict[Path, str]:
    """By what made says; where that is one name for several, with as much of the path as tells them apart."""
    names = {file: inert.name(of.get(MODEL) or _own_name(file)) for file, of in made.items()}
    found: dict[Path, str] = {}
    for file, name in names.items():
        alike = [other for other in names if names[other] == name]
        if len(alike) > 1:
            name += f" ({inert.name(_end_of(file, alike))})"
        while name in found.values():
            name += "'"
        found[file] = name
    return found


def _own_name(file: Path) -> str:
    if file.name != score_file.SCORES:
        return file.stem
    folder = file.resolve().parent
    return (folder.parent if folder.name == OF_A_RUN else folder).name


def _end_of(file: Path, alike: list[Path]) -> str:
    """The last parts of a path, at least its folder and name, by which all of these differ."""
    parts = [other.resolve().parts for other in alike]
    count = 2
    while len({own[-count:] for own in parts}) < len(parts):
        count += 1
    return "/".join(file.resolve().parts[-count:])


def _shown(made: dict) -> dict[str, str]:
    return {inert.name(label): inert.name(value) for label, value in made.items() if label not in (FACTS, MODEL)}


def _scores_of(path: str | Path) -> Path:
    file, folder = scores_path(path), Path(path).expanduser()
    if folder.is_dir() and not file.is_file():
        raise UserError(f"{path}: {why_none(folder)}")
    return file


def _named(sets: dict[Path, list[ScoredSet]]) -> dict[Path, list[ScoredSet]]:
    """The same, in which sets that are called by their files alone have one name where they are of the same rows: that of a set
    with a name, else of the file if all are called so."""
    by_file = [file for file, own in sets.items() if score_file.is_named_by_its_file(file, own)]
    firsts = [scored for file in sets if file not in by_file for scored in sets[file] if not scored.benchmark]
    called, named = [scored.name for scored in firsts], len(firsts)
    renamed: dict[Path, int] = {}
    for file in by_file:
        [scored] = sets[file]
        place = next((i for i, first in enumerate(firsts) if _meet(first, scored)), len(firsts))
        renamed[file] = place
        if place == len(firsts):
            firsts.append(scored)
            called.append(scored.name)
        elif place >= named and called[place] == firsts[place].name != scored.name:
            called[place] = f"{ROWS_ALIKE} {place + 1}" if ROWS_ALIKE in called else ROWS_ALIKE
    return sets | {file: [replace(sets[file][0], name=called[place])] for file, place in renamed.items()}


def _meet(first: ScoredSet, scored: ScoredSet) -> bool:
    """Whether two sets are of the same rows, or of one name (and then it is said of their rows that they differ)."""
    try:
        score_file.aligned([first], [replace(scored, name=first.name)])
    except UserError:
        return scored.name == first.name
    return True


def _by_key(sets: dict[Path, list[ScoredSet]]) -> dict[Path, dict[Key, ScoredSet]]:
    often = [Counter(scored.benchmark for scored in own) for own in sets.values()]
    once = {benchmark for own in often for benchmark in own if benchmark and all(of[benchmark] <= 1 for of in often)}
    return {
        file: {(scored.benchmark, "") if scored.benchmark in once else (None, scored.name): scored for scored in own}
        for file, own in sets.items()
    }
