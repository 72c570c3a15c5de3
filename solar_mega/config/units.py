"""Sizes as people write them."""

import re

from solar_mega.errors import UserError

_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_bytes(text: str, name: str = "size") -> int:
    """Bytes in `5GB` (powers of 1000, as transformers counts), `5GiB` (powers of 1024) or `5000000`.
    `name` is the key or flag that an error is about. Raises UserError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*", text.upper())
    if match is None or (match[3] and not match[2]):
        raise UserError(f"{name} = {text!r} is not a size; write for example 5GB, 500MB or 2GiB")
    size = int(float(match[1]) * (1024 if match[3] else 1000) ** _POWERS[match[2]])
    if size < 1:
        raise UserError(f"{name} = {text!r} must be at least one byte")
    return size
