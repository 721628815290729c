"""Numbers as people read them: shares in percent with one decimal, intervals behind them, a dash where there is none."""

NONE = "–"


def percent(share: float | None) -> str:
    return NONE if share is None else f"{_signed(100 * share, 1)} %"


def estimate(one: dict | None) -> str:
    """'62.3 % (57.6 to 66.8)' of a dict with value, low and high as shares."""
    if one is None or one.get("value") is None:
        return NONE
    return percent(one["value"]) + limits(one)


def limits(one: dict) -> str:
    """' (57.6 to 66.8)', or nothing where no interval is known."""
    if one.get("low") is None or one.get("high") is None:
        return ""
    return f" ({_signed(100 * one['low'], 1)} to {_signed(100 * one['high'], 1)})"


def points(one: dict) -> str:
    """A difference of two shares with its interval, in percentage points: '+3.1 (−1.2 to +7.4)'."""
    value, low, high = (one.get(key) for key in ("difference", "low", "high"))
    if value is None:
        return NONE
    said = [_signed(100 * number, 1, plus=True) for number in (value, low, high) if number is not None]
    return said[0] + (f" ({said[1]} to {said[2]})" if len(said) == 3 else "")


def number(value: float | None, digits: int = 4) -> str:
    """Counts whole, anything else with so many significant digits."""
    if value is None:
        return NONE
    if isinstance(value, int) or value == 0 or abs(value) >= 10_000:
        return _signed(value, 0, grouped=True)
    return f"{value:#.{digits}g}".rstrip(".").replace("-", "−")


def plain(one: dict | None, digits: int = 3) -> str:
    """An estimate that is no share: '0.412 (0.38 to 0.44)'."""
    if one is None or one.get("value") is None:
        return NONE
    behind = "" if one.get("low") is None else f" ({number(one['low'], digits)} to {number(one['high'], digits)})"
    return number(one["value"], digits) + behind


def p_value(p: float | None) -> str:
    if p is None:
        return NONE
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def place(share: float) -> str:
    """Where a share stands on a line from 0 to 100."""
    return f"{min(max(100 * share, 0), 100):.1f}"


def key(value: float | None) -> float | str:
    """What a table is sorted by; empty: nothing is there."""
    return "" if value is None else value


def _signed(value: float, digits: int, plus: bool = False, grouped: bool = False) -> str:
    """A minus sign as wide as the plus; none before a zero."""
    value = round(value, digits)
    said = f"{abs(value):,.{digits}f}" if grouped else f"{abs(value):.{digits}f}"
    return ("−" if value < 0 else "+" if plus and value > 0 else "") + said
