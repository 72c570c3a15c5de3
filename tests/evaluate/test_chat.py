"""A conversation without a terminal."""

import io
import json
import shutil
import sys

import pytest

from solar_mega.errors import UserError
from solar_mega.evaluate.chat import ChatOptions, Conversation, chat


def test_every_line_is_a_turn(model_dir, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n\n/system Be brief.\nAgain\n/exit\nnever read\n"))
    assert chat([str(model_dir), "--template", "alpaca", "--max-new-tokens", "3"]) == 0
    # Two answers, each ended by a line feed of ours; the model is random, so whatever they say.
    assert capsys.readouterr().out.count("\n") >= 2


def test_answers_are_greedy_continuations_of_the_template(model_dir):
    import torch

    talk = Conversation(ChatOptions(model_dir, template="solar", max_new_tokens=6, system="Be kind."))
    stream = io.StringIO()
    answer = talk.say("Hi", stream)
    text = "<s>### System:\nBe kind.\n\n### User:\nHi\n\n### Assistant:\n"
    ids = talk.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    for _ in range(6):
        with torch.no_grad():
            token = talk.model(ids).logits[0, -1].argmax()
        ids = torch.cat([ids, token[None, None]], 1)
    expected = talk.tokenizer.decode(ids[0, -6:], skip_special_tokens=True)
    assert answer.strip() == expected.strip() and stream.getvalue().rstrip("\n") == answer.rstrip("\n")
    assert [turn["role"] for turn in talk.turns] == ["user", "assistant"]
    assert talk.command("/reset") and talk.turns == [] and not talk.command("/exit")


def test_a_base_model_needs_a_template(model_dir):
    with pytest.raises(UserError, match="has no chat template"):
        chat([str(model_dir), "--prompt", "Hi"])


def test_a_directory_that_is_no_model(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        chat([str(tmp_path)])


def test_a_long_conversation_forgets_its_oldest_turn(model_dir, capsys):
    talk = Conversation(ChatOptions(model_dir, template="solar", max_new_tokens=2))
    for _ in range(3):
        talk.say("many words " * 25, io.StringIO())
    assert len(talk.turns) < 6 and "forgotten" in capsys.readouterr().err
    before = list(talk.turns)
    with pytest.raises(UserError, match="the message is .* tokens long"):
        talk.say("many words " * 300, io.StringIO())
    assert talk.turns == before, "the message is taken back, the conversation stays"


def test_an_answer_ends_where_the_model_says(model_dir, tmp_path):
    """generation_config.json's ends, and those of a template that is named, not the tokenizer's EOS alone."""
    directory = shutil.copytree(model_dir, tmp_path / "model")
    first = Conversation(ChatOptions(directory, template="solar", max_new_tokens=6))
    text = first.say("Hi", io.StringIO())
    ids = first.tokenizer.encode(text, add_special_tokens=False)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [ids[-1], 2]}))
    again = Conversation(ChatOptions(directory, template="solar", max_new_tokens=6))
    assert again.ends[:2] == [ids[-1], 2] and len(again.say("Hi", io.StringIO())) < len(text)
