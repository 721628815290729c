"""Headers and calls of their own for long ranges on and off in this process, to measure what they are worth."""

import dataclasses

from open_rm.batching import attention, layouts
from open_rm.data.pairs import PairTable

NEVER = 1 << 60  # tokens
LEAST_HEADER, LEAST_STRETCH = layouts.LEAST_HEADER, attention.LEAST_STRETCH


def look_for_headers(looks: bool) -> None:
    """Whether layouts look for them; dealing does where the table has an order of prompts (`without_order`)."""
    layouts.LEAST_HEADER = LEAST_HEADER if looks else NEVER
    for function in (layouts.lay_out, layouts.lay_out_sequences):
        function.__kwdefaults__["least_header"] = layouts.LEAST_HEADER


def without_order(table: PairTable) -> PairTable:
    """The same pairs, whose prompts are not known to begin alike."""
    return dataclasses.replace(table, prompt_order=None)


def compute_apart(apart: bool) -> None:
    """Whether a long range that many segments continue is a call of its own."""
    attention.LEAST_STRETCH = LEAST_STRETCH if apart else NEVER
