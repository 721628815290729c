"""The report in plain words: three questions with their answers, and what to beware of.

Everything is read from the report's own numbers, so that words and numbers cannot part. An answer has a line for each set where there
are several. Differences are given in points (hundredths), shares in percent, each with its 95 % interval.
"""

HOW_GOOD, CAN_I_BELIEVE_IT, WHERE_DOES_IT_FAIL = "How good is it?", "Can I believe it?", "Where does it fail?"
CHANCE = 0.5
FEW_ROWS = 100
LARGE_ECE = 0.1
FAR_TEMPERATURES = (0.5, 2.0)
NEAR_TEMPERATURES = (0.8, 1.25)  # between them probabilities are called neither over- nor underconfident
LARGE_SHARE = 0.01  # of answers that are too long or without a score, of ties
MUCH = 0.1  # of a difference between shares
STEEP = 0.2  # of RM-Bench's easy minus hard
SIGNIFICANT = 0.05
NO_PAIRS = "no row has two scored answers of which one is known to be better."
LEFT_OUT = "bad rows left out"  # how keeping.py and in_training.py call it
NAMED = 5  # of missing or failing subsets, the others are counted


def answers(report: dict) -> list[dict]:
    """[{question, answer}] in the order in which one asks; of several sets, each begins a line of its own."""
    sets = report["sets"]
    good = [_how_good(one) for one in sets]
    if report["against"]:
        good.append(report["against"]["says"])
    believe = [_by_name(sets, one, _trusted(one)) for one in sets]
    believe.append(_same_scores(report["invariance"]))
    if not report["made_known"]:
        believe.append("How the scores were made is not known.")
    fail = [_by_name(sets, one, _fails(one)) for one in sets]
    questions = ((HOW_GOOD, good), (CAN_I_BELIEVE_IT, believe), (WHERE_DOES_IT_FAIL, fail))
    return [{"question": question, "answer": "\n".join(lines)} for question, lines in questions]


def _by_name(sets: list[dict], one: dict, text: str) -> str:
    return text if len(sets) == 1 else f"{one['title']}: {text}"


# ---------------------------------------------------------------- how good


def _how_good(one: dict) -> str:
    accuracy, headline = one["accuracy"], one["headline"]
    if accuracy is None:
        return f"On {one['title']} nothing can be said: {NO_PAIRS}"
    rows = one["rows_with_pairs"]
    of = _count(one["pairs"], "pair") + ("" if one["pairs"] == rows else f" from {_count(rows, 'row')}")
    on = f"what is there of {one['title']}" if one["missing"] else one["title"]
    parts = [
        f"On {on} it prefers the better answer in {percent(accuracy)} of {of} (95 % interval {interval(accuracy)})."
    ]
    number = f"{headline['name']}, {percent(headline)} ({interval(headline)})"
    if one["benchmark"] and one["missing"]:
        parts.append(
            f"The number by the benchmark's rules cannot be compared with published ones, since rows are missing: {number}."
        )
    elif one["benchmark"] and headline["value"] != accuracy["value"]:
        parts.append(f"By the benchmark's rules: {number}.")
    if one["ranking"] and one["ranking"]["tau"]:
        tau = one["ranking"]["tau"]
        parts.append(
            f"It orders {_count(tau['n'], 'list')} of answers as their gold scores do with Kendall's tau "
            f"{tau['value']:.2f} ({tau['low']:.2f} to {tau['high']:.2f}; 1: the same order, 0: no relation)."
        )
    return " ".join(parts)


# ---------------------------------------------------------------- can it be believed


def _trusted(one: dict) -> str:
    if one["accuracy"] is None:
        return f"There is nothing to believe: {NO_PAIRS}"
    parts = [_sample(one), _calibrated(one["calibration"])]
    if one["length"]:
        parts.append(_beyond_length(one["length"]))
    return " ".join(parts + _lost(one, 0))


def _sample(one: dict) -> str:
    accuracy = one["accuracy"]
    wide = 50 * (accuracy["high"] - accuracy["low"])
    found = f"From {_count(one['rows_with_pairs'], 'row')} the accuracy is known to about {wide:.1f} points either way."
    return f"{found} It cannot be told from chance." if _is_chance(one) else found


def _is_chance(one: dict) -> bool:
    """Whether as many pairs may be right as wrong; ties are neither."""
    found = one["accuracy_without_ties"]
    return found is not None and found["low"] <= CHANCE <= found["high"]


def _calibrated(found: dict) -> str:
    temperature = found["temperature"]
    ece = f"expected calibration error {found['ece']:.2f} (right probabilities have up to {found['ece_of_chance']:.2f} by chance)"
    if temperature is None:
        return f"No temperature makes probabilities of its margins: {found['why_no_temperature']}; {ece}."
    low, high = NEAR_TEMPERATURES
    if temperature > high and found["temperature_p"] < SIGNIFICANT:
        says = "It is surer than it should be"
    elif temperature < low and found["temperature_p"] < SIGNIFICANT:
        says = "It could be surer than it is"
    elif _is_off(found):
        says = "Its probabilities are off, though neither too sure nor too unsure on the whole"
    elif found["ece_of_chance"] > LARGE_ECE:
        return f"There are too few pairs to tell whether its probabilities are right: {ece}."
    else:
        return f"Its probabilities are about right: {ece}."
    return (
        f"{says}: {ece}. A temperature of {temperature:.3g}, fitted on these pairs, takes the loss from {found['loss']:.3f} to "
        f"{found['loss_at_temperature']:.3f}."
    )


def _is_off(calibration: dict) -> bool:
    """Whether ECE is large, and larger than by chance."""
    return calibration["ece"] > max(LARGE_ECE, calibration["ece_of_chance"])


def _beyond_length(length: dict) -> str:
    gain, baseline = length["gain"], length["baseline"]
    alone = f"length alone ({baseline['rule']}: {percent(baseline)})"
    if gain["low"] > 0:
        return f"It beats {alone} by {points(gain)}."
    if gain["high"] < 0:
        return f"{_sentence(alone).rstrip('.')} beats it by {points(gain, sign=-1)}."
    return f"It cannot be told from {alone}: the difference is {points(gain)}."


def _lost(one: dict, share: float) -> list[str]:
    """What more than a share of the answers or pairs lack."""
    found = []
    if one["overlength"] > share * one["answers"]:
        found.append(f"Longer than what was scored of them: {_of(one, 'overlength', 'answers')}.")
    if one["unscored"] > share * one["answers"]:
        found.append(f"Without a score: {_of(one, 'unscored', 'answers')}.")
    if one["tied"] > share * one["pairs"]:
        found.append(f"Equal scores, which count as wrong: {_of(one, 'tied', 'pairs')}.")
    return found


def _same_scores(invariance: dict | None) -> str:
    if invariance is None:
        return "Whether a score depends on what is scored beside it was not looked at."
    return _sentence(invariance["says"])


# ---------------------------------------------------------------- where it fails


def _fails(one: dict) -> str:
    if one["accuracy"] is None:
        return f"Nothing can be said: {NO_PAIRS}"
    parts = [_weak_subsets(one["extremes"])]
    if one["length"]:
        parts += _by_length(one["length"])
    parts += _steep(one)
    confident = one["confident"]
    if confident["pairs"]:
        parts.append(
            f"Of {_count(confident['pairs'], 'pair')} in which it is more than {100 * confident['above']:.0f} % sure, "
            f"{confident['wrong']:,} are wrong ({_percent(confident['wrong'] / confident['pairs'])})."
        )
    else:
        parts.append(f"It is never more than {100 * confident['above']:.0f} % sure.")
    return " ".join(parts)


def _weak_subsets(extremes: dict | None) -> str:
    if extremes is None:
        return "There are no two subsets of a kind with enough rows to be compared."
    worst, tests = extremes["worst"], extremes["worst"]["tests"]
    weak = sorted((one for one in extremes["clear"] if one["value"] < one["rest"]), key=lambda one: one["value"])
    if not weak:
        lowest = _beside_the_rest(worst)
        return f"No subset is clearly worse than the rest (p corrected for {tests} subsets): the lowest is {lowest}."
    named = [_beside_the_rest(one) for one in weak]
    return f"Clearly worse than the rest, corrected for {tests} subsets: {_some(named)}."


def _beside_the_rest(subset: dict) -> str:
    of = f" of {subset['form']}" if subset["form"] else ""
    return f"{subset['name']} {_percent(subset['value'])} (the rest{of} {_percent(subset['rest'])}, p {_p(subset['p_sidak'])})"


def _by_length(length: dict) -> list[str]:
    difference = length["difference"]
    if difference is None:
        return []
    sides = f"{percent(length['longer'])} where the better answer is longer, {percent(length['shorter'])} where it is shorter"
    if difference["low"] <= 0 <= difference["high"]:
        return [f"Length makes no clear difference: {sides}."]
    start = "longer" if difference["value"] > 0 else "shorter"
    sign = 1 if difference["value"] > 0 else -1
    return [f"It is better with {start} better answers, by {points(difference, sign)}: {sides}."]


def _steep(one: dict) -> list[str]:
    """RM-Bench: whether a plain right answer loses to a wrong one in better dress, or wins less often than one in better dress."""
    if not one["style"]:
        return []
    hard, easy, steep = (one["style"][name] for name in ("hard", "easy", "steep"))
    if steep["value"] <= STEEP or steep["low"] <= 0:
        return []
    start = "Style outweighs content" if hard["high"] < CHANCE else "Style matters"
    return [
        f"{start}, by {points(steep)}: {percent(hard)} ({interval(hard)}) right where the wrong answer is the longer or more formatted one, "
        f"{percent(easy)} where the right answer is."
    ]


# ---------------------------------------------------------------- warnings


def warnings(report: dict) -> list[str]:
    """What to beware of, a sentence each, the worst first; those of a set begin with its title."""
    found = []
    invariance = report["invariance"]
    if invariance and not all(check["exact"] for check in invariance["checks"]):
        found.append(f"Scores are not the same however they are computed. {_sentence(invariance['says'])}")
    for one in report["sets"]:
        found += [f"{one['title']}: {text}" for text in _warnings(one)]
    if left_out := dict(report["made"]).get(LEFT_OUT):
        found.append(f"{left_out:,} rows that could not be read were left out.")
    if not report["made_known"]:
        found.append(
            "How the scores were made is not known (truncation length, dtype, chat template), and all of that changes them."
        )
    return found


def _warnings(one: dict) -> list[str]:
    if one["accuracy"] is None:
        return [NO_PAIRS]
    found = _of_chance(one)
    if one["missing"]:
        found.append(f"not comparable with published numbers, since rows are missing: {_some(one['missing'])}.")
    if one["rows_with_pairs"] < FEW_ROWS:
        of = "" if one["rows_with_pairs"] == one["rows"] else f" of {one['rows']:,}"
        count = "row" if one["rows_with_pairs"] == 1 and not of else "rows"
        found.append(f"only {one['rows_with_pairs']:,}{of} {count} can be counted, so the intervals are wide.")
    found += [_small(text) for text in _lost(one, LARGE_SHARE)]
    return (
        found + _of_length(one["length"]) + [_small(text) for text in _steep(one)] + _of_calibration(one["calibration"])
    )


def _of_chance(one: dict) -> list[str]:
    accuracy, apart = one["accuracy"], one["accuracy_without_ties"]
    says = f"{percent(accuracy)} right ({interval(accuracy)})"
    if _is_chance(one):
        without = f" (without ties {percent(apart)})" if one["tied"] else ""
        return [f"{says} cannot be told from chance{without}."]
    if apart is not None and apart["value"] < CHANCE:
        return [f"{says} is less than chance: it prefers the worse answer more often than the better one."]
    if accuracy["high"] < CHANCE:
        return [f"{says} is less than chance, since equal scores count as wrong."]
    return []


def _of_length(length: dict | None) -> list[str]:
    if not length:
        return []
    found, gain, prefers = [], length["gain"], length["prefers_longer"]
    if gain["low"] <= 0:
        found.append(_small(_beyond_length(length)))
    if prefers and prefers["excess"]["value"] > MUCH and prefers["excess"]["low"] > 0:
        found.append(
            f"it prefers the longer answer in {percent(prefers['model'])} of the pairs; the better one is the longer in "
            f"{percent(prefers['gold'])}."
        )
    return found


def _of_calibration(found: dict) -> list[str]:
    ece, temperature = f"expected calibration error {found['ece']:.2f}", found["temperature"]
    low, high = FAR_TEMPERATURES
    if temperature is not None and not low <= temperature <= high and found["temperature_p"] < SIGNIFICANT:
        sure = "far too sure" if temperature > high else "far less sure than it could be"
        return [f"sigma(margin) is no probability: it is {sure} (temperature {temperature:.3g}, {ece})."]
    return [f"sigma(margin) is no probability: {ece}."] if _is_off(found) else []


# ---------------------------------------------------------------- numbers as text


def percent(found: dict) -> str:
    return _percent(found["value"])


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def interval(found: dict) -> str:
    return f"{100 * found['low']:.1f} to {100 * found['high']:.1f}"


def points(found: dict, sign: int = 1) -> str:
    low, high = sorted((sign * found["low"], sign * found["high"]))
    return f"{100 * sign * found['value']:.1f} points ({100 * low:.1f} to {100 * high:.1f})"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


def _small(text: str) -> str:
    return text[:1].lower() + text[1:]


def _p(p: float) -> str:
    return "below 0.0001" if p < 0.0001 else f"{p:.2g}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def _of(one: dict, what: str, of: str) -> str:
    return f"{one[what]:,} of {one[of]:,} {of} ({_percent(one[what] / one[of])})"


def _some(names: list[str]) -> str:
    """The first NAMED, and how many more."""
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more:,} more" if more > 0 else "")
