"""Preference pairs -> tokens, cut to length as Zephyr's trainer does, and the hash to keep a cache under.

<s> system user ... user  ### Assistant:  answer </s>        each response with its own copy of the
└────────── prompt ─────────────────────┘└─ response ─┘      prompt: tokenised as a whole, the last
                                                             prompt token can depend on the answer
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from solar_mega.data.chat import BadConversation, ChatTemplate, Encoded, Message, encode
from solar_mega.data.preferences import Pair, PairReport, Unusable
from solar_mega.data.tokenizer import Tokenizer

SAME_CUT = "chosen and rejected are the same after cutting to length"


@dataclass(frozen=True, slots=True)
class Response:
    """A prompt and one response to it."""

    ids: np.ndarray
    """[n] int32, BOS to end of turn."""
    loss: np.ndarray
    """[n] bool, True on the response's tokens, which are to be predicted."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class TokenPair:
    chosen: Response
    rejected: Response

    def __len__(self) -> int:
        """Tokens of both."""
        return len(self.chosen) + len(self.rejected)


@dataclass(frozen=True)
class Lengths:
    max_length: int = 1024
    """Tokens of a prompt and one response."""
    max_prompt_length: int = 512
    """Where those are too many, the prompt keeps this many of its last ones."""


@dataclass
class TokenReport:
    """What tokenising did to the pairs of one data set."""

    pairs: int = 0
    prompts_cut: int = 0
    responses_cut: int = 0
    tokens: int = 0
    chosen_tokens: int = 0
    rejected_tokens: int = 0
    """Of the responses alone."""

    def describe(self) -> str:
        """One line for the console."""
        count = max(self.pairs, 1)
        return (
            f"  {self.tokens:,} tokens in {self.pairs:,} pairs; responses of "
            f"{self.chosen_tokens / count:.0f} (chosen) and {self.rejected_tokens / count:.0f} (rejected) "
            f"tokens; cut to length: {self.prompts_cut:,} prompts, {self.responses_cut:,} responses"
        )


def tokenize_pairs(
    pairs: Sequence[Pair], template: ChatTemplate, tokenizer: Tokenizer, lengths: Lengths, report: PairReport
) -> tuple[list[TokenPair], TokenReport]:
    """Tokens of every pair that has some; what has none is counted in `report`."""
    done, counts = [], TokenReport()
    for pair in pairs:
        try:
            chosen, rejected = (
                encode_response(pair.prompt, response, template, tokenizer)
                for response in (pair.chosen, pair.rejected)
            )
        except Unusable as fault:
            report.drop(str(fault), pair.id, fault.detail)
            report.kept -= 1
            continue
        tokens = cut_to_length(chosen, rejected, lengths, tokenizer.bos_id, counts)
        if np.array_equal(tokens.chosen.ids, tokens.rejected.ids):
            report.drop(SAME_CUT, pair.id)
            report.kept -= 1
            continue
        done.append(tokens)
        counts.pairs += 1
        counts.tokens += len(tokens)
        counts.chosen_tokens += int(tokens.chosen.loss.sum())
        counts.rejected_tokens += int(tokens.rejected.loss.sum())
    return done, counts


def encode_response(
    prompt: Sequence[Message], response: str, template: ChatTemplate, tokenizer: Tokenizer
) -> Response:
    """Prompt and response, at whatever length. Raises Unusable."""
    try:
        encoded = encode([*prompt, Message("assistant", response)], template, tokenizer)
    except BadConversation as error:
        raise Unusable(str(error)) from None
    return last_turn(encoded)


def last_turn(encoded: Encoded) -> Response:
    """The conversation with only its last assistant turn in the loss. Raises Unusable where that is empty."""
    counted = np.flatnonzero(encoded.loss)
    if not len(counted):
        raise Unusable("empty response")
    end = counted[-1] + 1
    # The last turn is the last run of counted tokens: between two of the assistant's turns lies the user's.
    gaps = np.flatnonzero(np.diff(counted) > 1)
    start = counted[gaps[-1] + 1] if len(gaps) else counted[0]
    if start == 0:
        raise Unusable("no prompt before the response")
    return Response(encoded.ids[:end], np.arange(end) >= start)


def cut_to_length(
    chosen: Response, rejected: Response, lengths: Lengths, bos_id: int | None, report: TokenReport
) -> TokenPair:
    """Both within `max_length`, of each its `kept_tokens`."""
    parts, prompt_cut = [], False
    kept = kept_tokens(chosen, rejected, lengths, bos_id)
    for response, mask in zip((chosen, rejected), kept, strict=True):
        prompt_cut |= not mask[~response.loss].all()
        report.responses_cut += not mask[response.loss].all()
        parts.append(Response(response.ids[mask], response.loss[mask]))
    report.prompts_cut += prompt_cut
    return TokenPair(*parts)


def kept_tokens(
    chosen: Response, rejected: Response, lengths: Lengths, bos_id: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens of each stay [n] bool. As TRL's trainer did for Zephyr: where either is too long, the
    prompts of both lose their beginning, down to `max_prompt_length`, and what is still too long loses its
    end. Unlike there, BOS stays in front, and responses may fill the room that a short prompt leaves.
    """
    masks = np.ones(len(chosen), dtype=bool), np.ones(len(rejected), dtype=bool)
    if max(len(chosen), len(rejected)) <= lengths.max_length:
        return masks
    for response, mask in zip((chosen, rejected), masks, strict=True):
        start = int(response.loss.argmax())
        keep = lengths.max_prompt_length
        if start > keep:
            head = int(bos_id is not None and response.ids[0] == bos_id and keep > 1)
            mask[head : start - keep + head] = False
        mask[np.flatnonzero(mask)[lengths.max_length :]] = False
    return masks


def fingerprint(pairs: Sequence[TokenPair]) -> str:
    """Hash of all tokens and which of them count: changes with the data, the template and the tokenizer."""
    digest = hashlib.sha256()
    for pair in pairs:
        for response in (pair.chosen, pair.rejected):
            digest.update(len(response).to_bytes(8, "little"))
            digest.update(response.ids.astype("<i4").tobytes())
            digest.update(np.packbits(response.loss).tobytes())
    return digest.hexdigest()
