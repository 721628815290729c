"""Whose scores are compared: files read and judged, each model under a name of its own."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from open_rm.errors import UserError
from open_rm.evaluation import score_file
from open_rm.evaluation.page import inert
from open_rm.evaluation.rules.verdict import Verdict
from open_rm.evaluation.scored import ScoredSet
from open_rm.evaluation.trust.report import FACTS, judge

MODEL = "model"  # in scores.meta.json
# A set in a table: its benchmark, since one model's copy of that may have another name; else (None, its name), as where one model
# has several of a benchmark.
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
        file = _scores_of(Path(path).expanduser())
        if file.resolve() in files:
            raise UserError(f"{path} is the same as {files[file.resolve()]}: name each model's scores once")
        files[file.resolve()] = path
    made = {file: score_file.read_meta(file) for file in files}
    sets = {file: _by_key(score_file.read_scores(file)) for file in files}
    return [
        Model(name, file, _shown(made[file]), sets[file], {key: judge(scored) for key, scored in sets[file].items()})
        for file, name in _names(made).items()
    ]


def _names(made: dict[Path, dict]) -> dict[Path, str]:
    """By what made says; where that is one name for several, with the file."""
    names = {file: inert.name(of.get(MODEL) or _own_name(file)) for file, of in made.items()}
    often = Counter(names.values())
    found: dict[Path, str] = {}
    for file, name in names.items():
        if often[name] > 1:
            name += f" ({inert.name(file.parent.name)}/{inert.name(file.name)})"
        while name in found.values():
            name += "'"
        found[file] = name
    return found


def _own_name(file: Path) -> str:
    return file.parent.name if file.name == score_file.SCORES else file.stem


def _shown(made: dict) -> dict[str, str]:
    return {inert.name(label): inert.name(value) for label, value in made.items() if label not in (FACTS, MODEL)}


def _scores_of(path: Path) -> Path:
    if not path.is_dir():
        return path
    if not (path / score_file.SCORES).is_file():
        raise UserError(
            f"{path}: no {score_file.SCORES} in this folder; name a folder that the evaluation wrote, or a scores file"
        )
    return path / score_file.SCORES


def _by_key(sets: Iterable[ScoredSet]) -> dict[Key, ScoredSet]:
    sets = list(sets)
    often = Counter(scored.benchmark for scored in sets)
    return {
        (scored.benchmark, "") if scored.benchmark and often[scored.benchmark] == 1 else (None, scored.name): scored
        for scored in sets
    }
