"""Budgets as a user writes them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from effllm.errors import UsageError

Unit = Literal["bytes", "bpw", "x"]


def in_bytes(number: str, prefix: str) -> float:
    """`number` of kilo-, mega-, giga- or terabytes, by the letter in front of the B; powers of 1000."""
    return float(number) * float(1000 ** " KMGT".index(prefix.upper() or " "))


@dataclass(frozen=True)
class Budget:
    """`2GB` of weight files, `4.25bpw` (bits per weight of all sites not excluded), or `0.25x` of the original."""

    value: float
    unit: Unit

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Reads `2GB`, `500MB`, `4.25bpw` or `0.25x`.

        Raises:
            UsageError: anything else, or a value that is not above zero.
        """
        found = re.fullmatch(r"(\d+(?:\.\d+)?) *(?:(bpw|x)|([kMGT]?)B)", text.strip(), re.IGNORECASE)
        if found is None or float(found[1]) <= 0:
            raise UsageError(
                "a budget is written as 2GB or 500MB (weight files, GB is 10**9 bytes), 4.25bpw (bits per weight) or 0.25x "
                f"(of the original), not {text!r}"
            )
        if found[2]:
            return cls(float(found[1]), "bpw" if found[2].lower() == "bpw" else "x")
        return cls(in_bytes(found[1], found[3]), "bytes")
