"""Training samples as text, with the loss mask made visible."""

from solar_mega.data.chat import ChatTemplate, encode
from solar_mega.data.instructions import Instruction
from solar_mega.data.tokenizer import Tokenizer

OPEN, CLOSE = "⟦", "⟧"


def preview(instruction: Instruction, template: ChatTemplate, tokenizer: Tokenizer) -> str:
    """The rendered conversation with OPEN and CLOSE around every stretch of tokens in the loss, as the tokens
    have it and not the template: what is marked is what is trained on.

    Raises BadConversation.
    """
    encoded = encode(instruction.messages, template, tokenizer)
    text, _ = template.render(instruction.messages)
    _, offsets = tokenizer.encode_with_offsets(text)
    marked, place = [], 0
    for begin, end in _runs(offsets, encoded.loss.tolist()):
        marked += [text[place:begin], OPEN, text[begin:end], CLOSE]
        place = end
    marked.append(text[place:])
    counted = int(encoded.loss.sum())
    shared = f", {encoded.boundary} shared by prompt and answer" if encoded.boundary else ""
    head = f"{instruction.where}  {len(encoded)} tokens, {counted} in the loss{shared}"
    return f"{head}\n{''.join(marked)}\n"


def _runs(offsets: list[tuple[int, int]], loss: list[bool]) -> list[tuple[int, int]]:
    """Characters [begin, end) of each unbroken run of tokens in the loss."""
    runs: list[tuple[int, int]] = []
    before = False
    for (begin, end), counted in zip(offsets, loss, strict=True):
        if counted and before:
            runs[-1] = (runs[-1][0], max(end, runs[-1][1]))
        elif counted:
            runs.append((begin, end))
        before = counted
    return runs
