"""A report with everything in it that a report can have, by hand, so that the page is tested without what makes reports."""

import random

HOSTILE = (
    '<script>window.hurt = 1</script><img src=x onerror="window.hurt = 2">]]></style></title></svg><!-- '
    "<a href='javascript:window.hurt=3'>x</a> {{ 7*7 }} {% raw %} ${7*7} &lt;b&gt; \x00\x07\x1b[31m \u202egnp.exe\u202c \u2066x\u2069 "
    "\ud800 lone \udfff \u200bzero\ufeff "
    "Z" + "\u0335\u0301\u0316" * 60 + " " + "W" * 3000 + " \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 "
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 |a|b| \r\n\r \u2028 http://example.com/x?y=1"
)


def share(value: float, n: int) -> dict:
    width = 1.96 * (max(value * (1 - value), 0.01) / n) ** 0.5
    return {"value": value, "low": max(0.0, value - width), "high": min(1.0, value + width), "n": n}


def sample_report(hostile: str = "", megabytes: int = 0) -> dict:
    """hostile: a text that stands in every name and text of the report.  megabytes: length of the first answer."""
    chat = _set("Chat and code" + hostile, "rm_bench", hostile)
    chat["style"] = {
        "names": ["concise", "detailed", "detailed, markdown"],
        "matrix": [
            [share(value, 512) for value in row] for row in ((0.71, 0.42, 0.18), (0.88, 0.7, 0.55), (0.97, 0.84, 0.69))
        ],
    }
    plain = _set("answers" + hostile, None, hostile)
    plain["ranking"] = {
        "rows": 420,
        "tau": {"value": 0.412, "low": 0.38, "high": 0.444, "n": 420},
        "best_of_n": [
            {"n": n, "expected": 3.1 + 0.5 * n**0.5, "oracle": 3.1 + 0.8 * n**0.5, "random": 3.6} for n in range(1, 9)
        ],
    }
    plain["calibration"] |= {
        "temperature": None,
        "loss_at_temperature": None,
        "why_no_temperature": "every pair is ranked right",
    }
    if megabytes:
        plain["mistakes"][0]["better"] = "long " * (200_000 * megabytes)
    return {
        "model": "tiny-reward-model" + hostile,
        "created": "2026-05-04T10:11:12+00:00",
        "command": "python -m open_rm.evaluation --model out/tiny --benchmark rm_bench --dataset answers --seed 7" + hostile,
        "seed": 7,
        "made": [["truncation length", "2,048 tokens"], ["dtype", "bfloat16"], ["chat template", "of the tokenizer" + hostile], ["device", None]],
        "answers": [
            {"question": "How good is it?", "answer": "It ranks 62.3 % (57.6 to 66.8) of the pairs right, better than length alone (54.0 %)." + hostile},
            {"question": "Can I believe it?", "answer": "Only in part: it says 93.1 % on average where it is right in 62.3 %.\nDivide its margins by 14.2."},
            {"question": "Where does it fail?", "answer": "Where the worse answer is longer and in markdown: 18.0 %."},
        ],
        "warnings": ["Rewards change with the batch size." + hostile, "41 answers were longer than the 2,048 tokens that were read."],
        "sets": [chat, plain],
        "invariance": {
            "rows": 64,
            "tolerance": 0.0,
            "checks": [
                {"what": "chosen and rejected swapped", "largest": 0.0, "flips": 0, "exact": True},
                {"what": "batches of 1 instead of 32" + hostile, "largest": 0.0312, "flips": 2, "exact": False},
            ],
            "says": "Rewards are not the same at every batch size: two decisions of 64 flip." + hostile,
        },
        "against": {
            "model": "other-model" + hostile,
            "sets": [
                {
                    "name": "Chat and code" + hostile,
                    "lines": [
                        {"name": name + hostile, "level": level, "own": own, "other": other, "difference": own - other, "low": own - other - 0.04, "high": own - other + 0.04, "p": p, "p_sidak": min(1.0, 3 * p)}
                        for name, level, own, other, p in (("total", "overall", 0.623, 0.641, 0.21), ("chat", "section", 0.7, 0.58, 0.0002), ("code", "section", 0.51, 0.53, 0.4))
                    ],
                    "won": 60, "lost": 71, "same": 381,
                }
            ],
            "says": "The two cannot be told apart." + hostile,
        },
    }  # fmt: skip


def _set(name: str, benchmark: str | None, hostile: str) -> dict:
    rng = random.Random(5)
    lines = [("total", "overall", 0.623, 1194)]
    for section, value in (("chat", 0.701), ("code", 0.512), ("safety", 0.656)):
        lines += [(section, "section", value, 398)]
        lines += [
            (f"{section}, {kind}" + hostile, "subset", value + step, 398)
            for kind, step in (("hard", -0.3), ("normal", 0.0), ("easy", 0.25))
        ]
    sources = [
        {
            "name": f"{source}" + hostile, "rows": 200, "pairs": 1800, "accuracy": share(0.5 + 0.05 * number, 1800), "mean_margin": 0.2 * number - 0.3,
            "reward": {"mean": number - 2.0, "std": 1.5, "quantiles": [number - 4.5, number - 3.0, number - 2.0, number - 1.0, number + 0.5]},
        }
        for number, source in enumerate(("chat", "code", "safety-refuse", "safety-response"))
    ] + [{"name": "unscored", "rows": 3, "pairs": 0, "accuracy": None, "mean_margin": None, "reward": None}]  # fmt: skip
    bins = [
        {"low": 0.5 + 0.05 * number, "high": 0.55 + 0.05 * number, "confidence": 0.525 + 0.05 * number, "accuracy": 0.5 + 0.02 * number, "n": 40 + 20 * number, "interval": [0.43 + 0.02 * number, 0.57 + 0.02 * number]}
        for number in range(10)
    ]  # fmt: skip
    return {
        "name": name, "benchmark": benchmark, "title": name, "rows": 512, "pairs": 4608, "tied": 3, "unscored": 1, "overlength": 41,
        "headline": {"name": "total", **share(0.623, 1194)},
        "lines": [{"name": line, "level": level, **share(value, n), "authors_rows": 441 if level == "section" else None} for line, level, value, n in lines],
        "missing": ["math" + hostile],
        "notes": ["A total without math is not the published number." + hostile],
        "extremes": {
            "best": {"name": "chat" + hostile, "value": 0.7, "rest": 0.58, "p": 0.0004, "p_sidak": 0.0016, "tests": 4},
            "worst": {"name": "code", "value": 0.51, "rest": 0.66, "p": 0.03, "p_sidak": 0.115, "tests": 4},
        },
        "calibration": {"bins": bins, "ece": 0.3244, "brier": 0.3322, "loss": 2.4082, "temperature": 14.221, "loss_at_temperature": 0.6303, "why_no_temperature": None},
        "length": {
            "unit": "tokens", "longer": share(0.85, 2000), "shorter": share(0.39, 2500), "equal": None, "reward_length_correlation": 0.412,
            "baseline": {"rule": "the longer answer is better", **share(0.54, 4608)}, "matched": share(0.602, 700) | {"within": 0.1},
        },
        "margins": [{"low": 0.25 * bin, "high": 0.25 * (bin + 1), "accuracy": share(0.5 + 0.05 * bin, 576)} for bin in range(8)],
        "sources": sources, "style": None, "ranking": None,
        "mistakes": [_pair(number, -9.0 + number, rng, hostile) for number in range(4)],
        "least_sure": [_pair(number, 0.01 * number, rng, hostile) for number in range(3)],
    }  # fmt: skip


def _pair(number: int, margin: float, rng: random.Random, hostile: str) -> dict:
    words = [
        "the",
        "answer",
        "gives",
        "a",
        "short",
        "list",
        "of",
        "steps",
        "that",
        "a",
        "careful",
        "reader",
        "can",
        "follow",
        "without",
        "any",
        "more",
        "help",
        "from",
        "others",
    ]
    better = " ".join(rng.choices(words, k=120))
    changed = better.split()
    changed[20:26] = ["something", "that", "is", "plainly", "not", "so"]
    changed[70:72] = ["42", "apples"]
    return {
        "id": f"row-{number}" + hostile, "subset": "chat" + hostile, "margin": margin, "probability": 1 / (1 + 2.718281828 ** -margin),
        "prompt": "user: How many apples are in the basket?\n\nassistant: Which one?\n\nuser: The red one." + hostile,
        "better": better + hostile, "worse": " ".join(changed) + hostile, "better_score": 1.25, "worse_score": 1.25 - margin,
    }  # fmt: skip
