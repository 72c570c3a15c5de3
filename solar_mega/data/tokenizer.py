"""Any tokenizer behind one small face: text to ids without special tokens, ids to text.

A Hugging Face directory is read by AutoTokenizer once, in the process that asks for it; what travels to
worker processes is its Rust backend as a string, so that a worker imports neither transformers nor torch and
starts in a fraction of a second. A SentencePiece `.model` never needs transformers at all.
"""

import contextlib
import functools
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from solar_mega.errors import UserError

# Encoded as part of the fingerprint: equal vocabularies can still split text differently (prefix space,
# digits, newlines, byte fallback), and a corpus made by one is then wrong for the other.
_PROBE = "def f(x):\n    return  x\t+ 1234\r\n\n  Größe 你好 \U0001f642 </p> Don't"
_VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)


Offset = tuple[int, int]
"""Characters [begin, end) of the text that a token stands for."""


class _Engine(Protocol):
    """What Tokenizer asks of a library. Engines pickle by what they were loaded from."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[Offset]]: ...

    def special_pieces(self) -> dict[str, int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def pieces(self) -> dict[int, str]: ...


class _FastEngine:
    """A `tokenizers` backend.

    By default `<s>` or `<|endoftext|>` spelled out in a document stays text: a corpus must not be able to
    forge document boundaries. `parse_special` recognises them, as Megatron's own preprocessing does.
    """

    def __init__(self, definition: str, parse_special: bool) -> None:
        from tokenizers import Tokenizer as Backend

        self.definition, self.parse_special = definition, parse_special
        self.backend = Backend.from_str(definition)
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = not parse_special

    def __reduce__(self) -> tuple[Any, ...]:
        return _FastEngine, (self.definition, self.parse_special)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # "fast" leaves out character offsets, which nobody here asks for
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[Offset]]:
        self.backend.encode_special_tokens = False
        try:
            encoding = self.backend.encode(text, add_special_tokens=False)
        finally:
            self.backend.encode_special_tokens = not self.parse_special
        return encoding.ids, encoding.offsets

    def special_pieces(self) -> dict[str, int]:
        added = self.backend.get_added_tokens_decoder()
        return {token.content: id for id, token in added.items() if token.special}

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def pieces(self) -> dict[int, str]:
        return {id: piece for piece, id in self.backend.get_vocab(with_added_tokens=True).items()}


class _SentencePieceEngine:
    """A SentencePiece model. Control pieces spelled out in text are text; the library offers nothing else."""

    def __init__(self, proto: bytes) -> None:
        from sentencepiece import SentencePieceProcessor

        self.proto = proto
        self.processor = SentencePieceProcessor(model_proto=proto)

    def __reduce__(self) -> tuple[Any, ...]:
        return _SentencePieceEngine, (self.proto,)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.processor.encode(text) for text in texts]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[Offset]]:
        """Control pieces are recognised, and each stretch of text between them is encoded on its own."""
        special = self.special_pieces()
        ids: list[int] = []
        offsets: list[Offset] = []
        place = 0
        for part in re.split("(" + "|".join(map(re.escape, special)) + ")", text) if special else [text]:
            if part in special:
                ids.append(special[part])
                offsets.append((place, place + len(part)))
            elif part:
                encoded = self.processor.encode(part, return_type="offset_mapping")
                ids += encoded["ids"]
                offsets += self._offsets(encoded["ids"], encoded["offsets"], place)
            place += len(part)
        return ids, offsets

    def _offsets(self, ids: Sequence[int], offsets: Sequence[Offset], place: int) -> list[Offset]:
        """All bytes of a character stand for it; SentencePiece gives it to the last of them only."""
        found: list[Offset] = []
        character_end = 0
        for id, (begin, end) in zip(reversed(ids), reversed(offsets), strict=True):
            if begin == end and self.processor.is_byte(id):
                end = character_end
            character_end = end
            found.append((place + begin, place + end))
        return found[::-1]

    def special_pieces(self) -> dict[str, int]:
        control = filter(self.processor.is_control, range(self.processor.get_piece_size()))
        return {self.processor.id_to_piece(id): id for id in control}

    def decode(self, ids: Sequence[int]) -> str:
        return self.processor.decode(list(ids))

    def pieces(self) -> dict[int, str]:
        return {id: self.processor.id_to_piece(id) for id in range(self.processor.get_piece_size())}


class _SlowEngine:
    """A transformers tokenizer written in Python: no backend to send, so every process loads it again."""

    def __init__(self, path: Path, parse_special: bool) -> None:
        self.path, self.parse_special = path, parse_special
        self.tokenizer = _auto_tokenizer(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return _SlowEngine, (self.path, self.parse_special)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        options = dict(add_special_tokens=False, split_special_tokens=not self.parse_special)
        return [self.tokenizer.encode(text, **options) for text in texts]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[Offset]]:
        raise UserError(
            f"tokenizer {self.path} is written in Python and cannot tell which characters a token stands "
            "for, which loss masks are made of; give one with a tokenizer.json, or a SentencePiece model file"
        )

    def special_pieces(self) -> dict[str, int]:
        decoder = self.tokenizer.added_tokens_decoder
        return {token.content: id for id, token in decoder.items() if token.special}

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def pieces(self) -> dict[int, str]:
        return {id: piece for piece, id in self.tokenizer.get_vocab().items()}


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        path: what it was loaded from.
        vocab_size: ids run from 0 to vocab_size - 1, added tokens included.
        eos_id, bos_id: end and beginning of a document; bos_id is None where there is none.
        special_tokens: "bos_token", "eos_token", ... and how they are spelled, as chat templates name them.
        chat_template: the tokenizer's own (Jinja), None where it has none.
    """

    def __init__(
        self,
        path: Path,
        engine: _Engine,
        eos_id: int,
        bos_id: int | None,
        special_tokens: dict[str, str] | None = None,
        chat_template: str | None = None,
    ) -> None:
        self.path = path
        self.chat_template = chat_template
        self.eos_id = eos_id
        self.bos_id = bos_id
        self._engine = engine
        self._pieces = engine.pieces()
        self.vocab_size = max(self._pieces) + 1
        named = {"eos_token": eos_id} if bos_id is None else {"bos_token": bos_id, "eos_token": eos_id}
        self.special_tokens = special_tokens or {name: self._pieces[id] for name, id in named.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = (self.path, self._engine, self.eos_id, self.bos_id)
        return Tokenizer, (*arguments, self.special_tokens, self.chat_template)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without BOS, EOS or any other special token."""
        return self._engine.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._engine.encode_batch(texts)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[Offset]]:
        """Ids of `text` in which special tokens are recognised and none are added, as a chat template's
        rendering needs, and the characters that each stands for.

        Raises:
            UserError: the tokenizer cannot tell them.
        """
        return self._engine.encode_with_offsets(text)

    @functools.cached_property
    def special_pieces(self) -> dict[str, int]:
        """Special tokens by spelling."""
        return self._engine.special_pieces()

    def find_piece(self, id: int) -> str | None:
        """How the vocabulary spells a token; None for an id it does not have."""
        return self._pieces.get(id)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special tokens are left out."""
        return self._engine.decode([int(id) for id in ids])

    @property
    def fingerprint(self) -> str:
        """Hash of the vocabulary, the EOS id and how a probe text is split: what a corpus depends on, and
        nothing else. A SentencePiece model and its Hugging Face conversion share it when they agree."""
        digest = hashlib.sha256(f"{self.vocab_size} {self.eos_id}\n".encode())
        for id, piece in sorted(self._pieces.items()):
            digest.update(f"{id}\t{piece}\n".encode())
        digest.update(repr(self.encode(_PROBE)).encode())
        return digest.hexdigest()[:32]


def load_tokenizer(path: Path | str, parse_special: bool = False) -> Tokenizer:
    """The tokenizer of a Hugging Face directory or in a SentencePiece `.model` file; never from the network.

    Args:
        path: directory with tokenizer files, or a SentencePiece model.
        parse_special: recognise special tokens spelled out in text (Hugging Face tokenizers only).

    Raises:
        UserError: nothing there, nothing recognised, or no end-of-sequence token.
    """
    path = Path(path)
    if path.is_file():
        return _load_sentencepiece(path, parse_special)
    if not path.exists():
        raise UserError(
            f"tokenizer {path} does not exist; give a Hugging Face directory or a SentencePiece .model file"
        )
    if not any((path / name).exists() for name in (*_VOCABULARY_FILES, "tokenizer_config.json")):
        raise UserError(
            f"tokenizer {path}: no tokenizer in this directory; looked for {', '.join(_VOCABULARY_FILES)}"
        )
    return _load_directory(path, parse_special)


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, model: str = "the model") -> None:
    """Raises UserError when the tokenizer can produce ids that the model's `vocab_size` rows do not have.
    A smaller tokenizer is fine: vocabularies are often padded."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"tokenizer {tokenizer.path} has {tokenizer.vocab_size} tokens, but the vocabulary of {model} "
            f"has only "
            f"{vocab_size} (vocab_size in config.json); use the tokenizer the model was trained with "
            f"(data.tokenizer)"
        )


def _load_sentencepiece(path: Path, parse_special: bool) -> Tokenizer:
    if parse_special:
        raise UserError(
            f"tokenizer {path}: SentencePiece models cannot recognise special tokens in text "
            f"(--parse-special-tokens); "
            "give the Hugging Face directory of this tokenizer instead"
        )
    try:
        engine = _SentencePieceEngine(path.read_bytes())
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"tokenizer {path} is not a SentencePiece model ({_first_line(error)}); "
            "give a SentencePiece .model file or a Hugging Face directory"
        ) from error
    eos_id, bos_id = engine.processor.eos_id(), engine.processor.bos_id()
    return Tokenizer(
        path, engine, _require_eos(path, None if eos_id < 0 else eos_id), None if bos_id < 0 else bos_id
    )


def _load_directory(path: Path, parse_special: bool) -> Tokenizer:
    automatic = _auto_tokenizer(path)
    eos_id = _require_eos(path, automatic.eos_token_id)
    backend = getattr(automatic, "backend_tokenizer", None)
    engine: _Engine
    engine = _FastEngine(backend.to_str(), parse_special) if backend else _SlowEngine(path, parse_special)
    special = {name: token for name, token in automatic.special_tokens_map.items() if isinstance(token, str)}
    template = automatic.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return Tokenizer(path, engine, eos_id, automatic.bos_token_id, special, template)


def _auto_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    with _quiet_transformers():
        try:
            return AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        except Exception as error:  # transformers raises anything from KeyError to a bare Exception here
            raise UserError(
                f"tokenizer {path} cannot be loaded by transformers: {_first_line(error)}"
            ) from error


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Loading a tokenizer says nothing about deprecated defaults or missing model configurations."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _require_eos(path: Path, eos_id: int | None) -> int:
    if eos_id is None:
        raise UserError(
            f"tokenizer {path} has no end-of-sequence token, which separates documents; "
            'name one as "eos_token" in its tokenizer_config.json'
        )
    return int(eos_id)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def limit_to_one_thread() -> None:
    """Worker processes are the parallelism: keep the Rust thread pool of `tokenizers` out of it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
