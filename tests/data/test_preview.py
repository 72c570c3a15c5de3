"""What a preview marks is what is trained on: the loss mask, and what is cut."""

import re

import pytest

from solar_mega.data.chat import BadConversation, Message, load_template
from solar_mega.data.instruction_tokens import TOO_LONG, TokenOptions, fitted
from solar_mega.data.instructions import Instruction
from solar_mega.data.preference_tokens import SAME_CUT, Lengths, tokenize_pairs
from solar_mega.data.preferences import Pair, PairReport, Unusable
from solar_mega.data.preview import preview, preview_pair

TURNS = [
    Message("user", "a"),
    Message("assistant", "b"),
    Message("user", "c"),
    Message("assistant", "d and more of it"),
]
SYSTEM = Message("system", "")


@pytest.fixture(scope="module")
def template(hf_tokenizer):
    return load_template("solar", hf_tokenizer)


def test_conversations_mark_every_assistant_turn(hf_tokenizer, template) -> None:
    shown = preview(Instruction(TURNS, "x:1"), template, hf_tokenizer, TokenOptions(96))
    assert re.match(r"x:1  \d+ tokens, \d+ in the loss\n", shown)
    assert (
        "### User:\na\n\n### Assistant:\n⟦b</s>⟧\n\n### User:\nc\n\n### Assistant:\n⟦d and more of it</s>⟧\n"
        in shown
    )


def test_overlong_conversations_are_cut_or_refused(hf_tokenizer, template) -> None:
    from solar_mega.data.chat import encode

    whole = encode(TURNS, template, hf_tokenizer)
    options = TokenOptions(len(whole) - 4, "truncate")
    assert len(fitted(whole, options)) == len(whole) - 3
    shown = preview(Instruction(TURNS, "x:1"), template, hf_tokenizer, options)
    assert f"{len(whole) - 3} of {len(whole)} tokens, {int(whole.loss.sum()) - 3} in the loss" in shown
    assert shown.endswith("⟧✂ 3 tokens ✂\n") and "⟦d" in shown
    with pytest.raises(BadConversation, match=TOO_LONG):
        preview(Instruction(TURNS, "x:1"), template, hf_tokenizer, TokenOptions(len(whole) - 4))


def test_pairs_show_the_prompt_once(hf_tokenizer, template) -> None:
    pair = Pair((SYSTEM, *TURNS[:3]), "yes ⟦sic⟧", "no", "x:1", "flan")
    shown = preview_pair(pair, template, hf_tokenizer, Lengths())
    assert shown.startswith("x:1  from flan\n--- prompt: ") and shown.count("### User:\na") == 1
    # The assistant's earlier turn is not in the loss of a pair.
    assert "### Assistant:\nb</s>" in shown
    assert re.search(r"--- chosen: \d+ tokens\n⟦yes ⟦sic⟧</s>⟧\n--- rejected: ", shown)
    assert shown.endswith("⟦no</s>⟧\n")


def test_cut_pairs_show_what_is_left(hf_tokenizer, template) -> None:
    """The same numbers as the tokens that are trained on, whose text is what is not cut."""
    pair = Pair((SYSTEM, Message("user", "first " * 30 + "last")), "yes " * 30, "no", "x:1", "")
    lengths = Lengths(40, 24)
    (tokens,), _ = tokenize_pairs([pair], template, hf_tokenizer, lengths, PairReport("x", kept=1))
    shown = preview_pair(pair, template, hf_tokenizer, lengths)
    head, prompt, chosen, rejected = re.split(r"^--- ", shown, flags=re.M)
    assert prompt.startswith("prompt: 24 of ") and chosen.startswith("chosen: 16 of ")
    assert rejected.startswith(f"rejected: {int(tokens.rejected.loss.sum())} tokens")
    assert re.search(r"\n<s>✂ \d+ tokens ✂", prompt) and "last\n\n### Assistant:\n" in prompt
    left = re.fullmatch(r"chosen: .*\n⟦(.*)⟧✂ \d+ tokens ✂\n", chosen).group(1)
    assert left.strip() == hf_tokenizer.decode(tokens.chosen.ids[tokens.chosen.loss]).strip()


def test_pairs_that_cutting_makes_equal_are_refused(hf_tokenizer, template) -> None:
    same = "yes " * 40
    pair = Pair((SYSTEM, Message("user", "a")), same + "1", same + "2", "x:1", "")
    with pytest.raises(Unusable, match=SAME_CUT):
        preview_pair(pair, template, hf_tokenizer, Lengths(40, 24))
