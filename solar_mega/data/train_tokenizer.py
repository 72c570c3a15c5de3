"""A SentencePiece BPE tokenizer from text, and the same tokenizer as a Hugging Face directory.

Lossless: no normalisation, no dummy prefix, every space, tab and newline kept, bytes for unknown characters,
so that decode(encode(text)) == text, source code included. (One exception, in SentencePiece itself: U+2581,
its picture of a space, comes back as a space.)
"""

import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from solar_mega.data.tokenizer import Tokenizer, load_tokenizer
from solar_mega.errors import UserError
from solar_mega.runtime.files import atomic_directory

UNK, BOS, EOS = "<unk>", "<s>", "</s>"
_PASSAGE_BYTES = 2000
_MINIMUM_VOCABULARY = 3 + 256 + 16  # special tokens, bytes, and something to learn


def train_sentencepiece(
    texts: Iterable[str],
    vocab_size: int,
    out_dir: Path,
    *,
    max_bytes: int = 4_000_000,
    threads: int = 1,
) -> Tokenizer:
    """Trains BPE with byte fallback on the first `max_bytes` of `texts` and writes it to `out_dir`, a new
    directory: `tokenizer.model` (SentencePiece) and `tokenizer.json` with its configuration (transformers).
    Deterministic. 4096 tokens from 4 MB take one to two seconds.

    Raises:
        UserError: the vocabulary is too small or too large for the text, or there is no text.
    """
    if vocab_size < _MINIMUM_VOCABULARY:
        raise UserError(
            f"vocab_size = {vocab_size} is too small: 3 special tokens and 256 bytes come first, so "
            f"{_MINIMUM_VOCABULARY} or more"
        )
    passages = list(_passages(texts, max_bytes))
    if not passages:
        raise UserError("no text to train a tokenizer on: every document was empty")
    model = _train(passages, vocab_size, threads)
    with atomic_directory(Path(out_dir)) as directory:
        (directory / "tokenizer.model").write_bytes(model)
        write_hf_tokenizer(model, directory)
    return load_tokenizer(Path(out_dir) / "tokenizer.model")


def write_hf_tokenizer(model: bytes, directory: Path) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`: the BPE model of a SentencePiece proto as trained
    by `train_sentencepiece`, splitting any text into the same ids.

    The class is the generic PreTrainedTokenizerFast, which takes tokenizer.json as it stands;
    LlamaTokenizer would rebuild it with a prefix space.
    """
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken, decoders, models, normalizers
    from tokenizers import Tokenizer as Backend

    processor = SentencePieceProcessor(model_proto=model)
    vocabulary = {processor.id_to_piece(id): id for id in range(processor.get_piece_size())}
    backend = Backend(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(processor, vocabulary),
            unk_token=UNK,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in (UNK, BOS, EOS)]
    )
    backend.save(str(directory / "tokenizer.json"))
    configuration = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": UNK,
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (directory / "tokenizer_config.json").write_text(
        json.dumps(configuration, indent=2) + "\n", encoding="utf-8"
    )


def _passages(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    """Whole lines, newlines included, gathered into passages: fed line by line, SentencePiece would never see
    a newline and could not learn pieces such as "):\\n"."""
    remaining = max_bytes
    for text in texts:
        passage = ""
        for line in text.splitlines(keepends=True):
            passage += line
            if len(passage) >= _PASSAGE_BYTES:
                yield passage
                remaining -= len(passage.encode())
                passage = ""
            if remaining <= 0:
                return
        if passage:
            yield passage
            remaining -= len(passage.encode())


def _train(passages: list[str], vocab_size: int, threads: int) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(passages),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            num_threads=threads,
            byte_fallback=True,
            character_coverage=0.9995,  # rarer characters go through bytes
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,  # indentation: one token for four spaces
            split_digits=True,
            max_sentence_length=1 << 24,
            shuffle_input_sentence=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            unk_piece=UNK,
            bos_piece=BOS,
            eos_piece=EOS,
            minloglevel=2,
        )
    except RuntimeError as error:
        size = sum(len(passage) for passage in passages)
        raise UserError(
            f"vocab_size = {vocab_size} cannot be trained on {size:,} characters of text; "
            f"give more text or a smaller vocabulary (SentencePiece: {str(error).strip()[-160:]})"
        ) from error
    return model.getvalue()


def _merges(processor: Any, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """SentencePiece joins the adjacent pair whose union has the best score. As a merge list: every way to
    split a piece into two known ones, best-scored pieces first."""
    merges = []
    for piece, id in vocabulary.items():
        if processor.is_control(id) or processor.is_unknown(id) or processor.is_byte(id):
            continue
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [pair for pair in halves if pair[0] in vocabulary and pair[1] in vocabulary]
        known.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        merges += [(-processor.get_score(id), pair) for pair in known]
    merges.sort(key=lambda merge: merge[0])  # stable: pairs of one piece keep their order
    return [pair for _, pair in merges]
