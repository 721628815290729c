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
from open_rm.errors import UserError
from open_rm.evaluation.arguments import EvaluationArgs, command_of
from open_rm.evaluation.console import writing
from open_rm.evaluation.score_file import META, SCORES
from open_rm.evaluation.scoring import BLOCK_ROWS, ScoreRows, check_invariance, encoder_for
from open_rm.evaluation.sets import NamedSet
from open_rm.manifest import sync_folder
from open_rm.model.contract import CONTRACT
from open_rm.scoring.opening import UNBOUNDED, look, open_scorer
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
    with open_scorer(args) as scorer:
        for line in scorer.lines:
            print(line)
        how = _How(args, scorer, sets, folder)
        if not how.is_there():
            how.make()
    return folder / SCORES


def check_model(args: EvaluationArgs, sets: list[NamedSet], flag: str = "--model") -> None:
    """Refuse a model that its small files show to give no rewards for these sets, before any weights are read.

    flag: which names it.
    """
    transformers.logging.set_verbosity_error()
    try:
        knows = look(args)
    except UserError as mistake:
        raise UserError(str(mistake).replace("--model ", f"{flag} ")) from mistake
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
        """What decides the scores, but for a machine's last digits: name, as a refusal says it -> value."""
        most, overlength = self.scorer.max_token_length, self.args.overlength
        facts = {"model": self.scorer.fingerprint, "--max_token_length": most, "--overlength": overlength}
        facts["--batching"] = self.scorer.layout
        return facts | {f"set {named.name}": self._of_set(named) for named in self.sets}

    def _of_set(self, named: NamedSet) -> str:
        reading = named.reading_for(chat=self.scorer.chat).identity()
        return f"{named.opened.fingerprint} {json.dumps(reading, sort_keys=True, default=str)}"

    def is_there(self) -> bool:
        """Whether scores.jsonl of these facts is there. Raises UserError for one of others that may not be overwritten."""
        scores = self.folder / SCORES
        if not scores.exists():
            return False
        then = read_facts(self.folder / META)
        now = self.decided_by
        other = [name for name in now | then if then.get(name) != now.get(name)]
        if not other:
            print(f"{scores} is there already, by the same model on the same rows: judged again, not computed again")
            return True
        self._refuse(scores, other)
        for name in (SCORES, META):  # first the scores, which say that what stands beside them is theirs
            (self.folder / name).unlink(missing_ok=True)
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
            "facts": {"decided by": self.decided_by, "invariance": invariance}
        }
        with writing(self.folder):
            _replace(self.folder / META, json.dumps(meta, indent=2, ensure_ascii=False) + "\n")
            new = self.folder / f"{SCORES}.new"
            with new.open("wb") as joined:
                for part in parts:
                    with part.path.open("rb") as file:
                        shutil.copyfileobj(file, joined)
                joined.flush()
                os.fsync(joined.fileno())
            os.replace(new, self.folder / SCORES)
            sync_folder(self.folder)
        shutil.rmtree(self.folder / "parts", ignore_errors=True)

    def _part(self, named: NamedSet) -> "_Part":
        """One set's rows, whole."""
        path = self.folder / "parts" / f"{named.name}.jsonl"
        facts = {name: value for name, value in self.decided_by.items() if not name.startswith("set ")}
        facts |= {"set": self._of_set(named)} | self.scorer.machine
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
        over, answers = sum(t.overlength for t in tallies), sum(t.answers for t in tallies)
        skipped = sum(t.skipped for t in tallies)
        became = "cut (the prompt's start, then an answer's end)" if args.overlength == "truncate" else "not scored"
        template = args.chat_template_name or "the tokenizer's own"
        template = f"{template} (sha256 {tokenizers.fingerprint(scorer.tokenizer)[:12]}, tokenizer and template)"
        most, unbounded = scorer.max_token_length, scorer.max_token_length >= UNBOUNDED
        meta = {
            "model": scorer.name,
            "revision": self._revision(),
            "fingerprint": scorer.fingerprint[:16],
            "opened as": self._opened_as(),
            "truncation length": "none" if unbounded else f"{most} tokens of prompt and answer",
            "over-length answers": f"{over:,} of {answers:,}: {became}" if over else f"none of {answers:,}",
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
        return meta | ({"bad rows left out": skipped} if skipped else {})

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
    return (_read(path).get("facts") or {}).get("decided by") or {}


def _read(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _replace(path: Path, text: str) -> None:
    """The file, whole or as it was."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)


@contextlib.contextmanager
def _in_words_of_this_command(name: str) -> Iterator[None]:
    """The stream's sentences speak of the flags of python -m open_rm.scoring."""
    try:
        yield
    except UserError as mistake:
        said = str(mistake).replace("rows of --input", f"rows of {name}")
        raise UserError(re.sub(r"--output\b(?!_)", "--output_dir", said)) from mistake
