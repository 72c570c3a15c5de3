"""Whether two models number their tokens alike, judged from their tokenizer files alone."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from solar_mega.errors import UserError

_BINARY = ("tokenizer.model", "spiece.model", "tekken.json")


@dataclass(frozen=True)
class Vocabulary:
    """Token -> id where a file spells it out; otherwise the hash of the file that holds it."""

    tokens: Mapping[str, int] | None = None
    digest: str | None = None

    def difference(self, other: "Vocabulary") -> str | None:
        """What differs, in words. None when nothing does, or when the two cannot be compared."""
        if self.tokens is not None and other.tokens is not None:
            keys = self.tokens.keys() | other.tokens.keys()
            wrong = sorted(key for key in keys if self.tokens.get(key) != other.tokens.get(key))
            if not wrong:
                return None
            shown = ", ".join(
                f"{key!r} is {_number(self.tokens, key)} and {_number(other.tokens, key)}"
                for key in wrong[:2]
            )
            return f"{len(wrong)} tokens have other ids or none ({shown})"
        if self.digest and other.digest and self.digest != other.digest:
            return "their tokenizer files differ"
        return None


def _number(tokens: Mapping[str, int], key: str) -> str:
    return str(tokens[key]) if key in tokens else "absent"


def vocabulary_of(directory: Path) -> Vocabulary:
    """Reads tokenizer.json, or vocab.json, or hashes a SentencePiece file. Raises UserError for bad JSON."""
    digest = None
    for name in _BINARY:
        if (directory / name).is_file():
            digest = hashlib.sha256((directory / name).read_bytes()).hexdigest()
            break
    for name in ("tokenizer.json", "vocab.json"):
        if (directory / name).is_file():
            tokens = _tokens(_json(directory / name), name)
            return Vocabulary(tokens, digest)
    return Vocabulary(None, digest)


def _json(path: Path) -> object:
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def _tokens(content: object, name: str) -> dict[str, int] | None:
    if not isinstance(content, dict):
        return None
    if name == "vocab.json":
        return content
    vocabulary = (content.get("model") or {}).get("vocab")
    if isinstance(vocabulary, list):  # Unigram: [[token, score], ...], numbered by place
        tokens = {entry[0]: number for number, entry in enumerate(vocabulary)}
    elif isinstance(vocabulary, dict):
        tokens = dict(vocabulary)
    else:
        return None
    tokens |= {entry["content"]: entry["id"] for entry in content.get("added_tokens") or []}
    return tokens
