"""Training samples as text, with the loss mask and what was cut made visible."""

from collections.abc import Sequence
from itertools import groupby

import numpy as np

from solar_mega.data.chat import ChatTemplate, Message, encode
from solar_mega.data.instruction_tokens import TokenOptions, fitted
from solar_mega.data.instructions import Instruction
from solar_mega.data.preference_tokens import SAME_CUT, Lengths, encode_response, kept_tokens
from solar_mega.data.preferences import Pair, Unusable
from solar_mega.data.tokenizer import Tokenizer

OPEN, CLOSE, CUT = "⟦", "⟧", "✂"


def preview(
    instruction: Instruction, template: ChatTemplate, tokenizer: Tokenizer, options: TokenOptions
) -> str:
    """The rendered conversation with OPEN and CLOSE around every stretch of tokens in the loss, as the tokens
    have it and not the template: what is marked is what is trained on. Cut tokens are a number.

    Raises BadConversation.
    """
    encoded = encode(instruction.messages, template, tokenizer)
    kept = np.arange(len(encoded)) < len(fitted(encoded, options))
    counted = int(encoded.loss[kept].sum())
    shared = f", {encoded.boundary} shared by prompt and answer" if encoded.boundary else ""
    head = f"{instruction.where}  {_of(kept)} tokens, {counted} in the loss{shared}"
    pieces = _pieces(instruction.messages, template, tokenizer, encoded.loss, kept)
    return f"{head}\n{_marked(pieces)}\n"


def preview_pair(pair: Pair, template: ChatTemplate, tokenizer: Tokenizer, lengths: Lengths) -> str:
    """The prompt and both responses, marked likewise; the prompt once where both responses see the same.

    Raises Unusable.
    """
    texts = {"chosen": pair.chosen, "rejected": pair.rejected}
    chosen, rejected = (encode_response(pair.prompt, text, template, tokenizer) for text in texts.values())
    kept = kept_tokens(chosen, rejected, lengths, tokenizer.bos_id)
    if np.array_equal(chosen.ids[kept[0]], rejected.ids[kept[1]]):
        raise Unusable(SAME_CUT)
    lines = [f"{pair.id}  from {pair.source}" if pair.source else pair.id]
    shown = None
    for (name, text), response, mask in zip(texts.items(), (chosen, rejected), kept, strict=True):
        turns = [*pair.prompt, Message("assistant", text)]
        pieces = _pieces(turns, template, tokenizer, response.loss, mask)
        first = next(i for i, (counted, _) in enumerate(pieces) if counted)
        prompt, answer = _marked(pieces[:first]), _marked(pieces[first:])
        if prompt != shown:
            lines.append(f"--- prompt: {_of(mask[~response.loss])} tokens\n{prompt}")
            shown = prompt
        lines.append(f"--- {name}: {_of(mask[response.loss])} tokens\n{answer}")
    return "\n".join([*lines, ""])


def _pieces(
    messages: Sequence[Message],
    template: ChatTemplate,
    tokenizer: Tokenizer,
    loss: np.ndarray,
    kept: np.ndarray,
) -> list[tuple[bool, str]]:
    """The rendered text up to the last token of `loss` in stretches, (in the loss, text); of tokens that are
    not kept their number."""
    text, _ = template.render(messages)
    _, offsets = tokenizer.encode_with_offsets(text)
    pieces: list[tuple[bool, str]] = []
    place = 0
    states = zip(offsets[: len(loss)], loss.tolist(), kept.tolist(), strict=True)
    for (counted, stays), tokens in groupby(states, key=lambda token: token[1:]):
        run = [offset for offset, *_ in tokens]
        begin, end = max(place, run[0][0]), max(place, *(end for _, end in run))
        if begin > place:  # characters that no token stands for
            pieces.append((False, text[place:begin]))
        pieces.append((counted and stays, text[begin:end] if stays else f"{CUT} {len(run)} tokens {CUT}"))
        place = end
    if len(loss) == len(offsets):
        pieces.append((False, text[place:]))
    return pieces


def _marked(pieces: Sequence[tuple[bool, str]]) -> str:
    return "".join(f"{OPEN}{text}{CLOSE}" if counted else text for counted, text in pieces)


def _of(kept: np.ndarray) -> str:
    """`48` or, where some were cut, `48 of 60`."""
    return f"{kept.sum()}" if kept.all() else f"{kept.sum()} of {len(kept)}"
