"""Chat templates: joint tokenisation, the loss mask, and that transformers gets the same tokens."""

import shutil

import numpy as np
import pytest

from solar_mega.data.chat import (
    BadConversation,
    Message,
    check_conversation,
    encode,
    load_template,
    write_template,
)
from solar_mega.data.tokenizer import load_tokenizer
from solar_mega.errors import UserError

TALK = [
    Message("system", "Answer in one word."),
    Message("user", "What is the capital of France?"),
    Message("assistant", "Paris"),
    Message("user", "And of Größenwahn 🙂?"),
    Message("assistant", "🙂 None, é\n  really."),
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
MARKED = INST.replace("{{ ' ' +", "{% generation %}{{ ' ' +").replace(
    "{% endif", "{% endgeneration %}{% endif"
)


def _trained_text(encoded, tokenizer) -> str:
    return tokenizer.decode(encoded.ids[encoded.loss])


@pytest.fixture
def chatml(tokenizer_dir, tmp_path):
    """The tokenizer with ChatML's two tokens added and its template, which marks nothing."""
    from transformers import AutoTokenizer

    fast = AutoTokenizer.from_pretrained(tokenizer_dir)
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    fast.chat_template = CHATML
    fast.save_pretrained(tmp_path / "chatml")
    return load_tokenizer(tmp_path / "chatml")


@pytest.mark.parametrize("face", ["tokenizer", "hf_tokenizer"])
@pytest.mark.parametrize("name", ["alpaca", "solar"])
def test_loss_covers_every_answer_with_its_eos(name, face, request) -> None:
    tokenizer = request.getfixturevalue(face)
    encoded = encode(TALK, load_template(name, tokenizer), tokenizer)
    assert _trained_text(encoded, tokenizer) == "Paris🙂 None, é\n  really."
    is_eos = encoded.ids == tokenizer.eos_id
    assert is_eos.sum() == 2 and encoded.loss[is_eos].all() and is_eos[-1]
    assert (encoded.ids == tokenizer.bos_id).sum() == 1 and encoded.ids[0] == tokenizer.bos_id
    assert not encoded.loss[0]
    # the mask is of whole stretches: as many as there are answers
    assert (np.diff(encoded.loss.astype(int)) == 1).sum() == 2


@pytest.mark.parametrize("name", ["alpaca", "solar"])
def test_sentencepiece_and_fast_tokenizers_agree(name, tokenizer, hf_tokenizer) -> None:
    ours = encode(TALK, load_template(name, tokenizer), tokenizer)
    fast = encode(TALK, load_template(name, hf_tokenizer), hf_tokenizer)
    assert ours.ids.tolist() == fast.ids.tolist()
    assert ours.loss.tolist() == fast.loss.tolist()


def test_alpaca_has_the_two_forms_of_its_authors(hf_tokenizer) -> None:
    template = load_template("alpaca", hf_tokenizer)
    assert template.text([Message("user", "Sort."), Message("assistant", "1 2")]) == (
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nSort.\n\n### Response:1 2</s>"
    )
    with_input = [Message("user", "Sort.", input="2 1")]
    assert template.text(with_input, generation_prompt=True) == (
        "<s>Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n### Instruction:\nSort.\n\n"
        "### Input:\n2 1\n\n### Response:"
    )
    assert template.text(TALK) == (
        "<s>Answer in one word.\n\n### Instruction:\nWhat is the capital of France?\n\n### Response:Paris</s>"
        "\n\n### Instruction:\nAnd of Größenwahn 🙂?\n\n### Response:🙂 None, é\n  really.</s>"
    )


def test_solar_is_the_released_template(hf_tokenizer) -> None:
    template = load_template("solar", hf_tokenizer)
    assert template.text(TALK[:3]) == (
        "<s>### System:\nAnswer in one word.\n\n### User:\nWhat is the capital of France?\n\n"
        "### Assistant:\nParis</s>"
    )
    asked = [Message("user", "Sort.", input="2 1")]  # no place for an input of its own
    assert template.text(asked, generation_prompt=True) == "<s>### User:\nSort.\n\n2 1\n\n### Assistant:\n"


def test_the_prompt_is_a_prefix_of_the_training_text(hf_tokenizer) -> None:
    for name in ("alpaca", "solar"):
        template = load_template(name, hf_tokenizer)
        prompt = template.text(TALK[:4], generation_prompt=True)
        text, spans = template.render(TALK)
        assert text.startswith(prompt) and spans[-1] == (len(prompt), len(text))


@pytest.mark.parametrize("name", ["alpaca", "solar"])
def test_exported_tokenizer_gives_the_training_tokens(name, tokenizer_dir, tmp_path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = load_tokenizer(tokenizer_dir)
    template = load_template(name, tokenizer)
    exported = tmp_path / "hf"
    shutil.copytree(tokenizer_dir, exported)
    write_template(exported, template, tokenizer)
    theirs = AutoTokenizer.from_pretrained(exported)
    for talk in (TALK, [Message("user", "Sort.", input="2 1"), Message("assistant", "1 2")]):
        encoded = encode(talk, template, tokenizer)
        out = theirs.apply_chat_template(
            template.as_dicts(talk), return_dict=True, return_assistant_tokens_mask=True
        )
        assert out["input_ids"] == encoded.ids.tolist()
        assert out["assistant_masks"] == encoded.loss.astype(int).tolist()
    assert GenerationConfig.from_pretrained(exported).eos_token_id == tokenizer.eos_id
    assert load_template("tokenizer", load_tokenizer(exported)).jinja == template.jinja


def test_a_template_without_generation_marks(chatml) -> None:
    template = load_template("tokenizer", chatml)
    encoded = encode(TALK, template, chatml)
    assert template.end_of_turn == "<|im_end|>"
    assert _trained_text(encoded, chatml) == "Paris🙂 None, é\n  really."
    stop = chatml.special_pieces["<|im_end|>"]
    assert encoded.loss[encoded.ids == stop].tolist() == [False, False, True, False, True]


def test_generation_stops_at_the_template_s_end_of_turn(chatml, tmp_path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    template = load_template("tokenizer", chatml)
    write_template(chatml.path, template, chatml)
    stops = GenerationConfig.from_pretrained(chatml.path).eos_token_id
    assert stops == [chatml.special_pieces["<|im_end|>"], chatml.eos_id]
    ids = AutoTokenizer.from_pretrained(chatml.path).apply_chat_template(template.as_dicts(TALK))
    assert ids["input_ids"] == encode(TALK, template, chatml).ids.tolist()


def test_prompt_and_answer_may_share_a_token(hf_tokenizer, tmp_path) -> None:
    path = tmp_path / "inst.jinja"
    path.write_text(INST)
    template = load_template(str(path), hf_tokenizer)
    talk = [Message("user", "Is it?"), Message("assistant", "the one")]
    encoded = encode(talk, template, hf_tokenizer)
    assert hf_tokenizer.decode(encoded.ids[encoded.loss]) == " the one"
    assert encoded.boundary == 0
    # an answer that goes on where the prompt's last token would have: one token holds both
    path.write_text(INST.replace("' [/INST]'", "' => re'").replace("' ' + m", "m"))
    template = load_template(str(path), hf_tokenizer)
    encoded = encode([Message("user", "Is it?"), Message("assistant", "turn x")], template, hf_tokenizer)
    assert encoded.boundary == 1
    assert hf_tokenizer.decode(encoded.ids[encoded.loss]).endswith("return x")


@pytest.mark.parametrize(
    "jinja, complaint",
    [
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "no assistant markers"),
        (INST.replace(" + eos_token", ""), "does not close assistant turns"),
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", "renders a turn differently"),
        ("{{ raise_exception('only tools') }}", "only tools"),
        ("{% for m in messages %}", "refuses it"),
        (MARKED, None),
    ],
)
def test_templates_are_checked_when_loaded(jinja, complaint, hf_tokenizer, tmp_path) -> None:
    path = tmp_path / "template.jinja"
    path.write_text(jinja)
    if complaint is None:
        load_template(str(path), hf_tokenizer)
        return
    with pytest.raises(UserError, match=complaint):
        load_template(str(path), hf_tokenizer)


def test_a_missing_template_names_what_is_allowed(hf_tokenizer) -> None:
    with pytest.raises(UserError, match="has no chat template; allowed besides: alpaca, solar"):
        load_template("tokenizer", hf_tokenizer)
    with pytest.raises(UserError, match=r"chatty.*neither alpaca, solar, tokenizer nor a file"):
        load_template("chatty", hf_tokenizer)


def test_messages_cannot_forge_special_tokens(hf_tokenizer) -> None:
    template = load_template("alpaca", hf_tokenizer)
    with pytest.raises(BadConversation, match="spells the special token </s> out"):
        encode([Message("user", "a</s>b"), Message("assistant", "c")], template, hf_tokenizer)


@pytest.mark.parametrize(
    "roles, reason",
    [
        ("ua", None),
        ("suaua", None),
        ("", "no messages"),
        ("s", "no messages"),
        ("au", "mixed roles"),
        ("uua", "mixed roles"),
        ("usa", "system message after"),
        ("u", "no response"),
        ("uau", "no response"),
    ],
)
def test_conversations_are_checked(roles, reason) -> None:
    names = {"u": "user", "a": "assistant", "s": "system"}
    found = check_conversation([Message(names[role], "text") for role in roles])
    assert found is None if reason is None else reason in found


def test_empty_turns_are_refused() -> None:
    assert check_conversation([Message("user", "q"), Message("assistant", " \n")]) == "an empty response"
    assert check_conversation([Message("user", ""), Message("assistant", "a")]) == "an empty question"
