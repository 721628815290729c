"""Rows as lines of strict JSON: what JSON cannot hold is written as the nearest that it can, and that is said."""

import base64
import datetime
import json
import math
from decimal import Decimal


class Lines:
    """Makes lines, and remembers what it had to write otherwise."""

    def __init__(self) -> None:
        self._otherwise: dict[str, None] = {}
        how = {"allow_nan": False, "default": self._plain}
        self._encoder = json.JSONEncoder(ensure_ascii=False, **how)
        self._ascii = json.JSONEncoder(ensure_ascii=True, **how)

    def of(self, rows: list[dict]) -> bytes:
        """The rows, a line each, in UTF-8."""
        return b"".join(map(self._line, rows))

    def said(self) -> list[str]:
        """What was written otherwise, for the log."""
        return list(self._otherwise)

    def _line(self, row: dict) -> bytes:
        try:
            text = self._encoder.encode(row)
        except ValueError:
            self._note("numbers that are not finite are written as null, because JSON has none")
            row = _without_nan(row)
            text = self._encoder.encode(row)
        try:
            return text.encode() + b"\n"
        except UnicodeEncodeError:  # half a surrogate pair in a column that is not read; as it stood, escaped
            return self._ascii.encode(row).encode() + b"\n"

    def _plain(self, value: object) -> object:
        if isinstance(value, datetime.date | datetime.time):
            self._note("dates and times are written as ISO 8601 text")
            return value.isoformat()
        if isinstance(value, bytes):
            self._note("bytes are written as base64 text")
            return base64.b64encode(value).decode()
        if isinstance(value, Decimal):
            self._note("decimal numbers are written as text")
        else:
            self._note(f"values of type {type(value).__name__} are written as text")
        return str(value)

    def _note(self, line: str) -> None:
        self._otherwise[line] = None


def _without_nan(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return [_without_nan(item) for item in value] if isinstance(value, list | tuple) else value
