"""The model card: the reward in a few lines of code, what it means, who reads it the same, results, settings."""

import contextlib
import json
import re
import shlex
from pathlib import Path

from huggingface_hub import ModelCardData
from transformers.utils.hub import cached_file

from open_rm.data.attributes import parse_attributes
from open_rm.evaluation.page.pictures import RELIABILITY
from open_rm.evaluation.rules.verdict import SUBSET
from open_rm.model.adapters import ADAPTER_CONFIG
from open_rm.model.contract import Contract
from open_rm.publishing.run_folder import Place

ON_HUB = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")  # entity/name

WHOLE = """from transformers import AutoModelForSequenceClassification, AutoTokenizer

where = {where}
tokenizer = AutoTokenizer.from_pretrained(**where)
model = AutoModelForSequenceClassification.from_pretrained(**where{attention})"""

ADAPTER = """from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer, BitsAndBytesConfig

where = {where}
tokenizer = AutoTokenizer.from_pretrained(**where)
base = {{"num_labels": 1, "torch_dtype": "{dtype}", "quantization_config": {packed}}}
model = AutoPeftModelForSequenceClassification.from_pretrained(**where, **base).eval()
model.base_model.model.config.pad_token_id = tokenizer.pad_token_id"""

PACKED = """BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="{dtype}"
)"""

REWARD = """## Get the raw reward

{given}

```python
{load}
text = {text}
reward = model(**tokenizer(text, {encode}return_tensors="pt")).logits[0, 0].item()
```"""

MEANING = """## What the number means

Only differences between answers to the same prompt have a meaning: sigmoid(r_a - r_b) is the modelled probability that people
prefer a to b. A single reward has none."""

ATTRIBUTES = """It was also trained to predict attributes of an answer: {attributes}.

    reward = a preference part + sum of weight x (predicted attribute - its mean in the training data)

Preferences train this sum; known values of the attributes train the predictions as well. The saved model gives this one number
alone, and no attributes."""

SPREAD = """Over both answers of {pairs} held-out pairs, rewards have the mean {mean:.4g} and the standard deviation {std:.4g} ({names}).
For a learner that wants rewards of mean 0 and standard deviation 1:

```python
mean, std = {mean!r}, {std!r}
normalised = (reward - mean) / std
```"""

TEMPERATURE = """Probabilities fit those pairs best where differences are divided by a temperature of {temperature:.4g}:

```python
import torch


def preferred(reward_a: float, reward_b: float) -> float:
    \"\"\"The probability that people prefer answer a to answer b.\"\"\"
    return torch.sigmoid(torch.tensor((reward_a - reward_b) / {temperature!r})).item()
```"""

NO_SPREAD = "How rewards are spread is not known: no held-out pairs were scored, or all had the same reward."
NO_TEMPERATURE = "No temperature makes the probabilities fit those pairs better: {no_temperature}."

COMMANDS = """## Score files, serve rewards

```bash
# a file of answers, with a column of rewards
python -m open_rm.scoring score {opening} --input answers.jsonl --output scored.jsonl
# a server for trainers that ask for rewards
python -m open_rm.serve {opening}
```"""

EAGER = """transformers 4 leaves out the soft cap of this model's attention scores, without a word, unless it is told: a pipeline
needs `model_kwargs={"attn_implementation": "eager"}`; `rewardbench` needs `--attn_implementation eager`."""

NEW_BASE = """transformers 4 does not find the rotary settings of `{base}`, which transformers 5 has saved, and computes other rewards,
without a word: this adapter needs transformers 5, or `--merge_adapter` at training."""


def write_card(
    place: Place,
    contract: Contract,
    facts: dict[str, object],
    results: dict[str, float],
    *,
    data: list[str],
    report: dict | None = None,
) -> None:
    """Write README.md into the run's folder, which holds the model already.

    Args:
        contract: of the run: its trust_remote_code is the user's.
        facts: flags and derived numbers of the run (run.json), as a table; "clients", where it is there, is one of its own:
            a list of dicts, of which each says of one client whether it computes the same rewards.
        results: final metrics, as a table.
        data: names of the training sources.
        report: of evaluation/trust/report.py, whose diagram is reliability.png; None where nothing was judged.
    """
    base_model, name = str(facts["model_name_or_path"]), place.repo_id or place.folder
    code = sorted(path.name for path in Path(place.folder).glob("*.py"))
    trusted = contract.trust_remote_code or bool(code)
    settings = facts["plan"] | {key: value for key, value in facts.items() if key not in ("plan", "clients")}
    parts = [
        _header(base_model, adapter=contract.holds_adapter),
        f"# {place.name}",
        f"A reward model: it reads {'a conversation' if contract.chat else 'a text'} and returns one number, higher for the "
        f"answer that people would prefer.\nTrained with open_rm from `{base_model}` on {', '.join(data)}.",
        _reward(
            contract, name, place.revision if place.repo_id else None, trusted=trusted, attention=_attention(place)
        ),
        f"Loading runs Python code ({', '.join(code) or f'of {base_model}'}): read it first." if trusted else None,
        *_meaning(contract),
        *_attributes(facts),
        # they need no trust for a file of ours
        COMMANDS.format(
            opening=_opening(name, place.revision if place.repo_id else None, trusted=contract.trust_remote_code)
        ),
        *_clients(facts.get("clients") or [], _silent_faults(place)),
        *_trust(report, reliability=(Path(place.folder) / RELIABILITY).is_file()),
        "## Results",
        _table(("metric", "value"), [(key, f"{value:.4g}") for key, value in results.items()]),
        "![training curves](curves.png)",
        "## Training",
        _table(("setting", "value"), [(key, value) for key, value in settings.items() if value not in (None, [])]),
    ]
    text = "\n\n".join(part for part in parts if part is not None)
    (Path(place.folder) / "README.md").write_text(text + "\n", encoding="utf-8")


def _header(base_model: str, *, adapter: bool) -> str:
    """What the Hub reads."""
    on_hub = ON_HUB.fullmatch(base_model) and not Path(base_model).exists()
    data = ModelCardData(
        base_model=base_model if on_hub else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-classification",
        tags=["reward-model", "open_rm"],
    )
    return f"---\n{data.to_yaml()}\n---"


def _attention(place: Place) -> str:
    """What transformers 4 has to be told of models that soft-cap attention scores (Gemma 2): it would leave that out."""
    file = Path(place.folder) / "config.json"  # an adapter has none
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    capped = (config.get("text_config") or config).get("attn_logit_softcapping")
    return ', attn_implementation="eager"' if capped else ""


def _reward(contract: Contract, name: str, revision: str | None, *, trusted: bool, attention: str) -> str:
    """The lines that compute a reward, with what a reader passes to from_pretrained: repository and branch, or the folder."""
    where = {"pretrained_model_name_or_path": name}
    where |= {"revision": revision} if revision else {}
    where |= {"trust_remote_code": True} if trusted else {}
    packed = PACKED.format(dtype=contract.dtype) if contract.load_in_4bit else None
    load = WHOLE.format(where=where, attention=attention)
    if contract.holds_adapter:
        load = ADAPTER.format(where=where, packed=packed, dtype=contract.dtype)
    if contract.chat:
        given = """`messages` is a conversation that ends with the answer, a list of `{"role": ..., "content": ...}`."""
        text, encode = "tokenizer.apply_chat_template(messages, tokenize=False)", "add_special_tokens=False, "
    else:
        given = (
            f"`prompt` and `answer` are texts. What is scored ends with `{contract.ending}`, whose last token is read."
        )
        text, encode = f'prompt + answer + "{contract.ending}"', ""
    return REWARD.format(given=given, load=load, text=text, encode=encode)


def _meaning(contract: Contract) -> list[str]:
    if contract.statistics is None:
        return [MEANING, NO_SPREAD]
    numbers = vars(contract.statistics)
    fitted = contract.statistics.temperature is not None
    names = "`mean` and `std` in config.json, the names that OpenRLHF reads"
    if contract.holds_adapter:
        names = "`statistics` in contract.json"
    return [
        MEANING,
        SPREAD.format(**numbers, names=names),
        (TEMPERATURE if fitted else NO_TEMPERATURE).format(**numbers),
    ]


def _attributes(facts: dict[str, object]) -> list[str]:
    """What the reward is a sum of, where attributes were trained."""
    weights, means = facts.get("attribute_weights") or [], facts.get("attribute_means")
    of_each = [f"weight {weight:g}" for weight in weights]
    if means:
        of_each = [f"{said}, mean {mean:.4g} in the training data" for said, mean in zip(of_each, means, strict=True)]
    names = [name for name, _ in parse_attributes(facts.get("attributes") or [])]
    named = ", ".join(f"{_cell(name)} ({said})" for name, said in zip(names, of_each, strict=True))
    return [ATTRIBUTES.format(attributes=named)] if named else []


def _opening(name: str, revision: str | None, *, trusted: bool) -> str:
    """Flags that name the model to a command."""
    flags = ["--model", name]
    flags += ["--model_revision", revision] if revision else []
    flags += ["--trust_remote_code"] if trusted else []
    return shlex.join(flags)


def _silent_faults(place: Place) -> list[str]:
    """Where older clients compute other rewards from the right token ids."""
    faults = [EAGER] if _attention(place) else []
    file = Path(place.folder) / ADAPTER_CONFIG
    if file.is_file():
        adapter = json.loads(file.read_text(encoding="utf-8"))
        base = adapter["base_model_name_or_path"]
        # the run has loaded it, so that it is a folder or in the Hub's cache; if it has gone since, nothing is said
        found, how = None, {"revision": adapter.get("revision"), "local_files_only": True}
        with contextlib.suppress(OSError):
            found = cached_file(base, "config.json", _raise_exceptions_for_missing_entries=False, **how)
        config = json.loads(Path(found).read_text(encoding="utf-8")) if found else {}
        config = config.get("text_config") or config
        if config.get("rope_parameters") and "rope_theta" not in config:
            faults.append(NEW_BASE.format(base=base))
    return faults


def _clients(clients: list[dict], faults: list[str]) -> list[str]:
    if not clients:
        return []
    rows = []
    for one in clients:
        verdict = "yes" if one["reads_the_same"] else f"no: {one['why_not']}"
        rows.append((one["client"], verdict, one["how"]))
    return ["## Who reads this folder the same", _table(("client", "as it was trained", "how"), rows), *faults]


def _trust(report: dict | None, *, reliability: bool) -> list[str]:
    """The three answers, the warnings, a table of overall numbers and sections, the diagram."""
    if report is None:
        return []
    answers = [
        "\n".join([f"**{one['question']}**\n", *(f"- {_cell(line)}" for line in one["answer"].splitlines())])
        for one in report["answers"]
    ]
    warnings = [f"> **Warning:** {_cell(warning)}" for warning in report["warnings"]]
    rows = [
        (found["title"], line["name"], f"{_interval(line)}", line["n"])
        for found in report["sets"]
        for line in found["lines"]
        if line["level"] != SUBSET
    ]
    # not where it lies on a disk
    made = ", ".join(f"{label} {value}" for label, value in report["made"] if label not in ("model", "command"))
    return [
        "## How far it can be trusted",
        *answers,
        "\n>\n".join(warnings) or None,
        _table(("judged on", "number", "value (95 % interval)", "rows"), rows),
        f"How the scores were made: {_cell(made)}.",
        f"![how often the preferred answer is right, by how sure the model is]({RELIABILITY})" if reliability else None,
    ]


def _interval(line: dict) -> str:
    return f"{line['value']:.1%} ({line['low']:.1%} to {line['high']:.1%})"


def _table(head: tuple[str, ...], rows: list[tuple]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    return "\n".join(lines + [f"| {' | '.join(map(_cell, row))} |" for row in rows])


def _cell(value: object) -> str:
    """On one line, with bars that are no borders and special tokens that are no HTML."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "\\<")
