"""scores.jsonl of a model: made a set at a time, kept over kills, told from those of another model or with other flags.

OUT/parts/NAME.jsonl     one set's rows (scoring/output.py: .partial and .progress beside it until it is whole)
OUT/parts/NAME.json      what decided its bytes, and what was counted
OUT/scores.jsonl         all sets, joined; OUT/scores.meta.json appears before it
"""

import contextlib
import dataclasses
import datetime
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from open_rm.data import tokenizer as tokenizers
from open_rm.data.preparation import CHARACTERS_PER_TOKEN, LONGEST_TEXT
from open_rm.errors import UserError
from open_rm.evaluation.arguments import EvaluationArgs, command_of
from open_rm.evaluation.console import writing
from open_rm.evaluation.score_file import META, SCORES
from open_rm.evaluation.scoring import BLOCK_ROWS, ScoreRows, check_invariance, encoder_for
from open_rm.evaluation.sets import NamedSet
from open_rm.evaluation.trust.report import FACTS
from open_rm.evaluation.trust.words import LEFT_OUT
from open_rm.manifest import sync_folder
from open_rm.model.contract import CONTRACT
from open_rm.scoring.opening import UNBOUNDED, Identity, identify, look, open_scorer
from open_rm.scoring.output import Output
from open_rm.scoring.scorer import Scorer
from open_rm.scoring.showing import Progress
from open_rm.scoring.streams import Stream, Tally, summary

AGAINST = "against"  # the folder of the other model's scores


def keep_scores(args: EvaluationArgs, sets: list[NamedSet]) -> Path:
    """scores.jsonl of the model, in output_dir: made, gone on with, or found to be there already.

    Raises:
        UserError: no such model; a row that cannot be scored; the folder holds scores of something else.
    """
    folder = Path(args.output_dir).expanduser()
    scores = folder / SCORES
    if scores.exists() and _are_there(folder, decided_by(args, identify(args), sets)):
        return scores
    with open_scorer(args) as scorer:
        for line in scorer.lines:
            print(line)
        how = _How(args, scorer, sets, folder)
        if not how.is_there():
            how.make()
    return scores


def decided_by(args: EvaluationArgs, model: Scorer | Identity, sets: list[NamedSet]) -> dict[str, object]:
    """What decides the scores, but for a machine's last digits: name, as a refusal says it -> value."""
    facts = {"model": model.fingerprint, "--max_token_length": model.max_token_length, "--overlength": args.overlength}
    facts["--batching"] = model.layout
    return facts | {f"set {named.name}": _of_set(named, chat=model.chat) for named in sets}


def _of_set(named: NamedSet, *, chat: bool) -> str:
    reading = named.reading_for(chat=chat).identity()
    return f"{named.opened.fingerprint} {json.dumps(reading, sort_keys=True, default=str)}"


def _differing(folder: Path, now: dict[str, object]) -> list[str]:
    """Names of the facts that the scores in a folder do not have in common with these."""
    then = read_facts(folder / META)
    return [name for name in now | then if then.get(name) != now.get(name)]


def _are_there(folder: Path, now: dict[str, object]) -> bool:
    """Whether a folder's scores are of these facts, which is said."""
    if _differing(folder, now):
        return False
    print(f"{folder / SCORES} is there already, by the same model on the same rows: judged again, not computed again")
    return True


def check_model(args: EvaluationArgs, sets: list[NamedSet], flag: str = "--model") -> None:
    """Refuse a model that its small files show to give no rewards for these sets, before any weights are read.

    flag: which names it.
    """
    transformers.logging.set_verbosity_error()
    try:
        knows = look(args)
    except UserError as mistake:
        said = str(mistake).replace("--model ", f"{flag} ")
        if flag not in said and said.startswith("--max_token_length"):
            said = f"{flag} {args.model}: {said}; both models are scored with the same limit"
        raise UserError(said) from mistake
    asked = next((named for named in sets if named.benchmark is not None), None)
    if asked is not None and not knows:
        raise UserError(
            f"{flag} {args.model}: its tokenizer has no chat template, and {asked.benchmark.title} is conversations; pass "
            "--chat_template_name, a name or a Jinja file, as its model card says"
        )


def of_other(args: EvaluationArgs) -> EvaluationArgs:
    """The arguments by which the model of --against is scored. --chat_template_name is for models that have none."""
    ours = (Path(args.against).expanduser() / CONTRACT).is_file()
    how = {"model": args.against, "model_revision": None, "against": None}
    how["chat_template_name"] = None if ours else args.chat_template_name
    return dataclasses.replace(args, **how, output_dir=str(Path(args.output_dir) / AGAINST))


@dataclass
class _How:
    """One model's scores of one list of sets."""

    args: EvaluationArgs
    scorer: Scorer
    sets: list[NamedSet]
    folder: Path

    @property
    def decided_by(self) -> dict[str, object]:
        """See the function."""
        return decided_by(self.args, self.scorer, self.sets)

    def is_there(self) -> bool:
        """Whether scores.jsonl of these facts is there. Raises UserError for one of others that may not be overwritten; where it
        may, it stays until the new one is whole."""
        scores = self.folder / SCORES
        if not scores.exists():
            return False
        if _are_there(self.folder, self.decided_by):
            return True
        self._refuse(scores, _differing(self.folder, self.decided_by))
        return False

    def _refuse(self, path: Path, other: list[str]) -> None:
        """Raises UserError, unless it may be made anew. other: facts that differ."""
        if not self.args.overwrite:
            raise UserError(
                f"{path} is there already, made with another {' and another '.join(other)}; name another --output_dir, or pass "
                "--overwrite to score anew"
            )

    def make(self) -> None:
        """Score what is not scored yet, check invariance, and have scores.jsonl appear."""
        parts = [self._part(named) for named in self.sets]
        checked = encoder_for(self.scorer, self.sets[0], self.args.overlength)
        invariance = check_invariance(
            self.sets, checked, seed=self.args.seed, written=lambda keys: _written(parts, keys)
        )
        meta = self._meta([part.tally for part in parts]) | {
            FACTS: {"decided by": self.decided_by, "invariance": invariance}
        }
        with writing(self.folder):
            self._appear(parts, json.dumps(meta, indent=2, ensure_ascii=False) + "\n")
        shutil.rmtree(self.folder / "parts", ignore_errors=True)

    def _appear(self, parts: list["_Part"], meta: str) -> None:
        """Both files, once they are whole, in the place of those that may be there."""
        new = {name: self.folder / f"{name}.new" for name in (META, SCORES)}
        try:
            new[META].write_text(meta, encoding="utf-8")
            with new[SCORES].open("wb") as joined:
                for part in parts:
                    with part.path.open("rb") as file:
                        shutil.copyfileobj(file, joined)
                joined.flush()
                os.fsync(joined.fileno())
            (self.folder / SCORES).unlink(missing_ok=True)  # first: what stands beside scores is taken to be theirs
            for name, path in new.items():
                os.replace(path, self.folder / name)
            sync_folder(self.folder)
        finally:
            for path in new.values():
                path.unlink(missing_ok=True)

    def _part(self, named: NamedSet) -> "_Part":
        """One set's rows, whole."""
        path = self.folder / "parts" / f"{named.name}.jsonl"
        facts = {name: value for name, value in self.decided_by.items() if not name.startswith("set ")}
        facts |= {"set": _of_set(named, chat=self.scorer.chat)} | self.scorer.machine
        about = path.with_suffix(".json")
        if path.exists() and (kept := _read(about)):
            other = [name for name in facts | kept["facts"] if kept["facts"].get(name) != facts.get(name)]
            if not other:
                print(f"{named.name}: scored already")
                return _Part(path, named.name, Tally.of(kept["tally"]))
            self._refuse(path, other)
        encoder = encoder_for(self.scorer, named, self.args.overlength)
        with _in_words_of_this_command(named.name):
            output = _Kept(path, facts, overwrite=self.args.overwrite or path.exists())
            shown = Progress(named.opened.size)
            rows, maker = range(named.opened.size), ScoreRows(named, self.scorer.tokenizer)
            skipped = self.args.skip_bad_rows
            tally = Stream(named.opened, rows, encoder, None, maker, output, BLOCK_ROWS, skipped, shown).run()
        took = shown.close()
        for line in summary(tally, name=named.name, model=self.scorer.name, judge=None):
            if "agrees with what the file says" not in line:  # which the report says by the set's own rules
                print(line)
        print(f"{named.name}: {tally.answers - tally.unscored:,} answers scored ({took})")
        return _Part(path, named.name, tally)

    def _meta(self, tallies: list[Tally]) -> dict[str, object]:
        """How the scores were made: label -> value, for people."""
        scorer, args = self.scorer, self.args
        skipped = sum(t.skipped for t in tallies) + sum(len(named.left_out) for named in self.sets)
        template = args.chat_template_name or "the tokenizer's own"
        template = f"{template} (sha256 {tokenizers.fingerprint(scorer.tokenizer)[:12]}, tokenizer and template)"
        most, unbounded = scorer.max_token_length, scorer.max_token_length >= UNBOUNDED
        meta = {
            "model": scorer.name,
            "revision": self._revision(),
            "fingerprint": scorer.fingerprint[:16],
            "opened as": self._opened_as(),
            "truncation length": "none" if unbounded else f"{most} tokens of prompt and answer",
            "over-length answers": self._overlength(tallies),
        }
        if authors := self._authors_limits():
            meta["truncation length of the authors"] = authors
        meta |= {
            "dtype": scorer.dtype,
            "chat template": template if scorer.chat else "none: plain text",
            "batching": scorer.layout,
            "positions of a micro-batch": scorer.machine.get("--max_tokens_per_micro_batch"),
            "device": scorer.machine["device"],
            "threads": scorer.machine.get("number of threads"),
            "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}",
            "command": command_of(args),
            "seed": args.seed,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        return meta | ({LEFT_OUT: skipped} if skipped else {})

    def _overlength(self, tallies: list[Tally]) -> str:
        """How many answers were over-length, and what became of them."""
        over, answers = sum(t.overlength for t in tallies), sum(t.answers for t in tallies)
        if not over:
            return f"none of {answers:,}"
        said = f"{over:,} of {answers:,}"
        if self.args.overlength != "truncate":
            return f"{said}: not scored"
        cut = "cut (the prompt's start, then an answer's end)"
        left = sum(t.unscored - t.empty for t in tallies)
        if not left:
            return f"{said}: {cut}"
        most = max(LONGEST_TEXT, CHARACTERS_PER_TOKEN * self.scorer.max_token_length)
        return f"{said}: {over - left:,} {cut}; {left:,} without a score (above {most:,} characters with the prompt)"

    def _opened_as(self) -> str:
        first, *more = self.scorer.lines
        trained = [line for line in more if line.startswith("trained on")]
        return "; ".join([first.removeprefix(f"{self.scorer.name}: "), *trained])

    def _authors_limits(self) -> str:
        known = [named.benchmark for named in self.sets if named.benchmark]
        limits = (f"{one.max_token_length} tokens" if one.max_token_length else "none" for one in known)
        return ", ".join(f"{one.title} {limit}" for one, limit in zip(known, limits, strict=True))

    def _revision(self) -> str:
        """What was asked for, and the commit that the Hub gave."""
        folder = Path(self.scorer.folder)
        if folder.parent.name != "snapshots":
            return "a local folder, which has none"
        named = f"{self.args.model_revision}, " if self.args.model_revision else ""
        return f"{named}commit {folder.name}"


@dataclass(frozen=True)
class _Part:
    path: Path
    name: str
    tally: Tally


class _Kept(Output):
    """An output with a file beside it that says what decided its bytes, so that it is known again when it is whole."""

    def finish(self, beside: dict[Path, str] | None = None) -> None:
        about = json.dumps({"facts": self.facts, "tally": self.progress}, default=str)
        super().finish((beside or {}) | {self.path.with_suffix(".json"): about})


def _written(parts: list[_Part], keys: set[tuple[str, str]]) -> dict[tuple[str, str], list]:
    """(set, id) -> scores, of the rows that are asked for."""
    found = {}
    for part in parts:
        with part.path.open(encoding="utf-8") as file:
            for row in map(json.loads, file):
                if (key := (part.name, row["id"])) in keys:
                    found[key] = row["scores"]
    return found


def read_facts(path: Path) -> dict[str, object]:
    """What decided the scores beside a meta file; empty where there is none that can be read."""
    return (_read(path).get(FACTS) or {}).get("decided by") or {}


def _read(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@contextlib.contextmanager
def _in_words_of_this_command(name: str) -> Iterator[None]:
    """The stream's sentences speak of the flags of python -m open_rm.scoring."""
    try:
        yield
    except UserError as mistake:
        said = str(mistake).replace("rows of --input", f"rows of {name}")
        raise UserError(re.sub(r"--output\b(?!_)", "--output_dir", said)) from mistake
