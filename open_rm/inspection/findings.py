"""What an inspection found, in sentences: one per problem, with the source and the first place.

Made from the report alone (see report.inspect_data), so that a report that was kept can be judged again. The
thresholds are here; what they mean for a training run is the reader's to decide, or --strict's.
"""

from open_rm.data.counts import oddity_sentence, shown
from open_rm.data.tokenizer import DATE
from open_rm.errors import UserError

LENGTH_ACCURACY = 0.6  # a finding above this, where so many pairs make it more than chance (two standard errors)
DROPPED_SHARE = 0.1
# What to do about a column that is not read, by what its name or content says it is.
UNREAD = {
    "prompt": "if it is part of what the model was asked, map it (--column_map prompt={0})",
    "system": "map it (--column_map system={0})",
    "label": "if it says which answer is better, map it (--column_map winner={0}, with response_a and response_b); scores of each answer "
    "are taken with --attributes",
    "score": "two columns of chosen and of rejected are taken with --margin_from, one of how much chosen leads with "
    "--column_map margin=..., those of each answer with --attributes",
    "tool": "map it (--column_map tools={0})",
    "image": "the reward model reads text alone",
}
# Of rows.ODDITIES; the others are in the log. Those of SOME are findings where some rows are so and others not, of ALL where all,
# of MOST where more than half are.
ODD = ("equal scores", "contrary scores", "ranks", "JSON", "prefill", "no prompt")
SOME, ALL, MOST = ("repeated", "in order"), ("nothing there", "less likely"), ("one side",)


def find(report: dict) -> list[str]:
    """What a person should know before training, a sentence each, with the source and the first place."""
    findings, attributes = [], _attribute_columns(report["splits"]["train"]["sources"])
    for split, found in report["splits"].items():
        for source in found["sources"]:
            # held-out data is judged by the reward, so that its attributes are left unread
            excused = attributes if split == "eval" else frozenset()
            sentences = _source_findings(source) + _column_findings(source, excused)
            if source["held_out_form"] and split == "train":
                sentences.append(
                    "these are the columns of a benchmark, whose score will say nothing once it was trained on; it belongs in "
                    "--dataset_mixer_eval_list (--dataset_format pairs if it is no benchmark)"
                )
            findings += [f"{split} {source['label']}: {sentence}" for sentence in sentences]
        findings += [
            f"{split}: {sentence}" for sentence in _between_sources(found) + _attribute_findings(found["sources"])
        ]
    for source in report["overlap"].get("sources", []):
        if source["first"]:
            findings.append(
                f"eval {source['label']}: {source['prompts']} of {source['of_prompts']} held-out prompts, and a side "
                f"of {source['pairs_with_a_side']} pairs, occur in the training data, first {source['first']['eval']} "
                f"(in training: {source['first']['train']}); evaluation will flatter the model"
            )
    if report["text_beside_template"] and _prompts_of_text(report["splits"]["train"]):
        findings.append(
            "prompt and answer are joined as plain text, and the tokenizer has a chat template; --as_messages writes them as "
            "turns of user and assistant, as clients of a chat model do"
        )
    if report["date_in_template"]:
        findings.append(
            "the chat template prints today's date, so rewards would change from day to day; here and in the saved "
            f"tokenizer it is {DATE}"
        )
    return findings


def _source_findings(source: dict) -> list[str]:
    findings = []
    if source["skipped"]:
        first = source["skipped"][0]
        findings.append(f"{plural(source['skipped'], 'row')} skipped, first {first['place']}: {first['what']}")
    if len(source["forms"]) > 1:
        forms = ", ".join(f"{form} ({count} rows)" for form, count in source["forms"].items())
        findings.append(f"rows of several forms: {forms}; the model sees them written differently")
    dropped = drop_counts(source["dropped"])
    share = sum(dropped.values()) / max(1, sum(dropped.values()) + source["pairs"])
    if share > DROPPED_SHARE:
        reason = max(dropped, key=dropped.get)
        findings.append(
            f"{share:.1%} of the pairs are dropped, most of them ({dropped[reason]}) for: {reason}, "
            f"first {source['dropped'][reason]['first']}"
        )
    if not source["pairs"]:
        return findings
    if source["promptless"]:
        findings.append(
            f"{plural(source['promptless'], 'pair')} lost the whole prompt to --overlength truncate, since an answer "
            "fills --max_token_length; raise it, or leave such pairs out with --overlength filter"
        )
    duplicates, contradictory = source["duplicates"], source["contradictory"]
    if duplicates["count"]:
        findings.append(
            f"{plural(duplicates['count'], 'duplicate pair')}, first {duplicates['first']['place']} "
            f"(repeats {duplicates['first']['other']})"
        )
    if contradictory["count"]:
        findings.append(
            f"{plural(contradictory['count'], 'contradictory pair')} (A over B, and B over A), first "
            f"{contradictory['first']['place']} against {contradictory['first']['other']}"
        )
    baseline = source["length_baseline"]
    if baseline["accuracy"] > max(LENGTH_ACCURACY, 0.5 + max(1, baseline["pairs"]) ** -0.5):
        findings.append(
            f'"{baseline["rule"]}" alone is right in {baseline["accuracy"]:.1%} of the pairs; a model can score that '
            "without reading, so compare its accuracy with it"
        )
    return findings + _scored_findings(source["scored"])


def _prompts_of_text(found: dict) -> bool:
    return any("text, prompt given" in source["forms"] for source in found["sources"])


def _attribute_columns(sources: list[dict]) -> frozenset[str]:
    """The columns that --attributes read."""
    entries = [entry for source in sources for entry in source.get("attributes", {}).values()]
    return frozenset(name for entry in entries for name in entry["columns"])


def _attribute_findings(sources: list[dict]) -> list[str]:
    """Attributes of which there is nothing to learn."""
    findings = []
    attributes = [source.get("attributes", {}) for source in sources]
    for name in dict.fromkeys(name for of_source in attributes for name in of_source):
        entries = [of_source[name] for of_source in attributes if of_source.get(name, {}).get("known")]
        values = {entry[what] for entry in entries for what in ("least", "most")}
        if len(values) == 1:
            findings.append(
                f"the attribute {shown(name)} is {values.pop():g} wherever it is known, so nothing is learned from it; name "
                "another, or leave it out"
            )
    return findings


def _column_findings(source: dict, excused: frozenset[str]) -> list[str]:
    """Columns that nobody read and that look as if somebody should, and rows that are odd. excused: columns of scores
    that need no finding."""
    findings = []
    for says, advice in UNREAD.items():
        columns = [name for name, entry in source["unread"].items() if entry["says"] == says]
        columns = [name for name in columns if says not in ("label", "score") or name not in excused]
        if columns:
            named = " and ".join(columns) if len(columns) < 3 else f"{', '.join(columns[:-1])} and {columns[-1]}"
            findings.append(
                f"{named} {'is' if len(columns) == 1 else 'are'} not read, and by name or content {says} (first "
                f"{source['unread'][columns[0]]['first']}); {advice.format(columns[0])}, or leave it out "
                f"(--ignore_columns {' '.join(columns)})"
            )
    rows = source["read_rows"]
    for key, entry in source["oddities"].items():
        what, some = key.partition(":")[0], entry["count"] < rows
        if what in ODD or what in (SOME if some else ALL) or (what in MOST and 2 * entry["count"] > rows):
            findings.append(f"{entry['count']} of {rows} rows {oddity_sentence(key)}, first {entry['first']}")
    return findings


def _scored_findings(scored: dict) -> list[str]:
    findings = []
    if scored["distinct"] > 1:
        named = ", ".join(f"{token_name(token)} in {plural(token['sides'], 'side')}" for token in scored["tokens"][:3])
        named += ", ..." if scored["distinct"] > 3 else ""
        findings.append(
            f"the reward is read at {scored['distinct']} different tokens ({named}), "
            f"the first other than the most frequent at {scored['first_other']}"
        )
    blank = [token for token in scored["tokens"] if not token["text"].strip()]
    if blank:
        findings.append(
            f"the reward is read at {token_name(blank[0])}, which is only whitespace, in "
            f"{plural(blank[0]['sides'], 'side')}, first {blank[0]['first']}; end the chat template with a token "
            "that says the response is over"
        )
    return findings


def _between_sources(found: dict) -> list[str]:
    findings = []
    for name, what in (("duplicates", "duplicate pair"), ("contradictory", "contradictory pair")):
        overall = found["overall"].get(name, {"count": 0})
        between = overall["count"] - sum(source.get(name, {"count": 0})["count"] for source in found["sources"])
        if len(found["sources"]) > 1 and between > 0:
            findings.append(
                f"{plural(between, what)} between its sources; over all sources the first is "
                f"{overall['first']['place']} (and {overall['first']['other']})"
            )
    return findings


def check_strict(report: dict) -> None:
    """--strict: findings are a mistake of the user's."""
    if report["findings"]:
        raise UserError(
            f"--strict: {plural(report['findings'], 'finding')} in the data, the first: {report['findings'][0]}"
        )


def plural(things, name: str) -> str:
    """`3 pairs` or `1 pair`, of a number or of a list."""
    number = things if isinstance(things, int) else len(things)
    return f"{number} {name}{'' if number == 1 else 's'}"


def token_name(token: dict) -> str:
    """A scored token of the report as a person reads it."""
    return f"{token['text']!r} (id {token['id']})"


def drop_counts(dropped: dict) -> dict[str, int]:
    """Reason -> pairs dropped for it."""
    return {reason: fault["count"] for reason, fault in dropped.items()}
