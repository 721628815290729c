"""What the values of flags have to be: a type for each bound, which `checks.check_values` tests and `--help` need not repeat."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class Must:
    """What a value has to be: as the user reads it, and as it is tested. NaN passes none of the tests."""

    be: str
    test: Callable[[float], bool]


def _is_switch(given: object) -> bool:
    """True or False, for all sources or for some (data/reading.py)."""
    values = [given] if isinstance(given, bool) else given
    return all(str(value).rpartition("::")[2].lower() in ("true", "false") for value in values)


def _is_recompute(given: object) -> bool:
    """True and False are on and off, for old command lines and for Python."""
    word = str(given).lower()
    return word in ("auto", "on", "off", "true", "false") or (word.isdecimal() and int(word) > 0)


BARRIER_EDGE = 1e-3  # how near to its bound the log barrier itself goes; see training/losses.py
Count = Annotated[int, Must("at least 1", lambda n: n >= 1)]
CountOrNone = Annotated[int | None, Must("at least 1", lambda n: n is None or n >= 1)]
PathOrWord = Annotated[str, Must("auto, never, or a path", lambda text: bool(text))]
AmountOrNone = Annotated[float | None, Must("at least 0, and finite", lambda x: x is None or 0 <= x < math.inf)]
Number = Annotated[int, Must("at least 0", lambda n: n >= 0)]
Amount = Annotated[float, Must("at least 0, and finite", lambda x: 0 <= x < math.inf)]
Positive = Annotated[float, Must("above 0, and finite", lambda x: 0 < x < math.inf)]
Share = Annotated[float, Must("from 0 to below 1", lambda x: 0 <= x < 1)]
SmallShare = Annotated[float, Must("from 0 to below 0.5", lambda x: 0 <= x < 0.5)]
Norm = Annotated[float, Must("at least 0", lambda x: x >= 0)]
Bound = Annotated[float, Must(f"above {BARRIER_EDGE}, and finite", lambda x: BARRIER_EDGE < x < math.inf)]
Switch = Annotated[list[str], Must("True or False, or NAME::True for one source", lambda given: _is_switch(given))]
PositiveOrNone = Annotated[float | None, Must("above 0, and finite", lambda x: x is None or 0 < x < math.inf)]
Recompute = Annotated[str, Must("auto, on, off, or every how many layers", lambda given: _is_recompute(given))]
Seed = Annotated[int, Must("from 0 to below 2**32", lambda n: 0 <= n < 2**32)]
