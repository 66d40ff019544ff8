"""The final answer of a worked solution."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def answer_of(text: str) -> str | None:
    """The final answer of a worked solution: the number behind ``####``, else the last one; ``None`` without any.

    Thousands' commas and noughts behind the point are taken off, as GSM8K's answers are compared.

    >>> answer_of("She has 2 * 9 = <<2*9=18>>18 left. #### 1,018.0"), answer_of("none")
    ('1018', None)
    """
    found = _NUMBER.findall(text.rpartition("####")[2]) or _NUMBER.findall(text)
    if not found:
        return None
    number = (found[0] if "####" in text else found[-1]).replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number
