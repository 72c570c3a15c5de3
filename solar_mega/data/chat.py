"""Conversations -> token ids and the loss mask over them.

A conversation is rendered by one chat template and tokenised once, as a whole; the loss mask comes from the
characters that the assistant's turns occupy. Tokenised apart, prompt and answer give other tokens where they
meet than the rendered whole does, which is what a model sees when it is used.

        <s>### User:\nHi\n\n### Assistant:\nHello!</s>
        rendered text          [span          ]         characters in the loss
        ids      1 835 4911 ... 29901 13 10994 29991 2
        loss     - -   -    ... -     -  x     x     x  token i is to be predicted

Templates are Jinja as transformers reads it (`transformers.utils.chat_template_utils`), so that
`apply_chat_template` of the exported tokenizer gives the tokens of training.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from solar_mega.data.templates import BUILT_IN
from solar_mega.data.tokenizer import Tokenizer
from solar_mega.errors import UserError
from solar_mega.runtime.files import atomic_file

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")
Span = tuple[int, int]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `input` is what Alpaca's instructions may carry besides; templates without a place for it get
    it appended to the content after an empty line."""

    role: Role
    content: str
    input: str = ""


Conversation = list[Message]


class BadConversation(ValueError):
    """A conversation that cannot be trained on; the message is the reason, counted in reports."""


@dataclass(frozen=True)
class Encoded:
    """A tokenised conversation."""

    ids: np.ndarray
    """[n] int32."""
    loss: np.ndarray
    """[n] bool: token i is to be predicted, from the tokens before it."""
    boundary: int = 0
    """Tokens, of those in the loss, that begin in text of the template or of another role: prompt and answer
    share them, so that a prompt on its own ends in other tokens."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template bound to a tokenizer's special tokens; `load_template` makes and checks one."""

    name: str
    jinja: str
    """What is written into an exported tokenizer."""
    special_tokens: Mapping[str, str]
    control: tuple[str, ...]
    """Special tokens as spelled: not allowed inside messages."""
    takes_input: bool = False
    end_of_turn: str = field(default="")
    """The special token that closes an assistant's turn."""

    @property
    def marked(self) -> bool:
        """Whether the template itself marks what the assistant generates."""
        return _GENERATION.search(self.jinja) is not None

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides how a conversation is rendered and masked."""
        facts = json.dumps([self.jinja, dict(self.special_tokens), self.takes_input, self.end_of_turn])
        return hashlib.sha256(facts.encode()).hexdigest()[:32]

    def text(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> str:
        """The conversation rendered; with `generation_prompt` up to where the assistant is to go on."""
        return self._render(messages, generation_prompt)[0]

    def render(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """(text, characters [begin, end) of every assistant turn, its end-of-turn token included).

        Raises:
            BadConversation: the template cannot render it, or not so that its turns can be found.
        """
        text, spans = self._render(messages, False)
        if not self.marked:
            spans = self._find_spans(messages, text)
        return text, [self._with_end_of_turn(text, span) for span in spans]

    def as_dicts(self, messages: Sequence[Message]) -> list[dict[str, str]]:
        """What the Jinja template, and so transformers' `apply_chat_template`, is given."""
        plain: list[dict[str, str]] = []
        for message in messages:
            turn = {"role": message.role, "content": message.content}
            if message.input and self.takes_input:
                turn["input"] = message.input
            elif message.input:
                turn["content"] = (
                    f"{message.content}\n\n{message.input}" if message.content else message.input
                )
            plain.append(turn)
        return plain

    def _render(self, messages: Sequence[Message], generation_prompt: bool) -> tuple[str, list[Span]]:
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        if not messages:
            raise BadConversation("no messages")
        try:
            texts, spans = render_jinja_template(
                conversations=[self.as_dicts(messages)],
                chat_template=self.jinja,
                return_assistant_tokens_mask=self.marked,
                add_generation_prompt=generation_prompt,
                **self.special_tokens,
            )
        except jinja2.TemplateError as error:
            raise BadConversation(f"the chat template refuses it ({str(error).strip()})") from error
        except (TypeError, ValueError, KeyError) as error:
            raise BadConversation(f"the chat template fails on it ({error})") from error
        return texts[0], (list(spans[0]) if self.marked else [])

    def _find_spans(self, messages: Sequence[Message], text: str) -> list[Span]:
        """An assistant turn begins where the prompt before it ends, and ends with its content."""
        spans = []
        for i, message in enumerate(self.as_dicts(messages)):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:i], True)[0] if i else ""
            through = self._render(messages[: i + 1], False)[0]
            content = message["content"].strip()
            at = through.find(content, len(before))
            end = at + len(content)
            if at < 0 or not text.startswith(before) or text[:end] != through[:end]:
                raise BadConversation("the chat template renders a turn differently once others follow it")
            spans.append((len(before), end))
        return spans

    def _with_end_of_turn(self, text: str, span: Span) -> Span:
        begin, end = span
        rest = text[end:]
        token = rest.lstrip()
        if (
            self.end_of_turn
            and self.end_of_turn not in text[begin:end]
            and token.startswith(self.end_of_turn)
        ):
            end += len(rest) - len(token) + len(self.end_of_turn)
        return begin, end


def load_template(spec: str, tokenizer: Tokenizer) -> ChatTemplate:
    """The chat template that `spec` names: "alpaca", "solar", "tokenizer" (the tokenizer's own) or the path
    of a Jinja file.

    Raises:
        UserError: there is none, it does not render, assistant turns cannot be told from the others, or they
            are not closed by a special token.
    """
    if spec in BUILT_IN:
        jinja = BUILT_IN[spec]
    elif spec == "tokenizer":
        if tokenizer.chat_template is None:
            raise UserError(
                f'template = "tokenizer", but {tokenizer.path} has no chat template; allowed besides: '
                f"{', '.join(BUILT_IN)}, or the path of a Jinja file"
            )
        jinja = tokenizer.chat_template
    else:
        jinja = _read_jinja(spec)
    template = ChatTemplate(
        name=spec,
        jinja=jinja,
        special_tokens=tokenizer.special_tokens,
        control=_control_tokens(jinja, tokenizer),
        takes_input=bool(re.search(r"message(\.input|\[['\"]input['\"]\])", jinja)),
    )
    return _checked(template)


def _read_jinja(spec: str) -> str:
    path = Path(spec)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f'template = "{spec}" is neither {", ".join(BUILT_IN)}, tokenizer nor a file that can be read '
            f"({error})"
        ) from error


def _control_tokens(jinja: str, tokenizer: Tokenizer) -> tuple[str, ...]:
    """Longest first, so that a token is found before those that it contains."""
    special = set(tokenizer.special_pieces) | set(tokenizer.special_tokens.values())
    return tuple(sorted(special, key=lambda piece: (-len(piece), piece)))


_PROBE = [
    Message("user", "first question"),
    Message("assistant", "first answer"),
    Message("user", "second question"),
    Message("assistant", "second answer"),
]


def _checked(template: ChatTemplate) -> ChatTemplate:
    """Tries the template on a conversation of two turns, and learns its end-of-turn token."""
    name = f"template {template.name}"
    try:
        text, spans = template.render(_PROBE)
    except BadConversation as error:
        raise UserError(f"{name}: on a plain conversation of two turns, {error}") from error
    answers = [message.content for message in _PROBE if message.role == "assistant"]
    if len(spans) != len(answers) or any(
        answer not in text[begin:end] for answer, (begin, end) in zip(answers, spans, strict=True)
    ):
        raise UserError(
            f"{name}: {{% generation %}} marks {len(spans)} stretches where the assistant speaks twice; "
            "mark every assistant message, or none at all"
        )
    questions = [message.content for message in _PROBE if message.role == "user"]
    for question, (begin, _) in zip(questions, spans, strict=True):
        if not text[:begin].split(question)[-1]:
            raise UserError(
                f"{name} has no assistant markers: nothing stands between a question and its answer; "
                "write one that marks the roles, or use alpaca or solar"
            )
    ends = {_closing_token(template, text, span) for span in spans}
    if None in ends or len(ends) != 1:
        raise UserError(
            f"{name} does not close assistant turns with a special token ({', '.join(template.control)}), so "
            "that a model could not learn to stop; add {{ eos_token }} after the assistant's content"
        )
    return ChatTemplate(**{**vars(template), "end_of_turn": ends.pop()})


def _closing_token(template: ChatTemplate, text: str, span: Span) -> str | None:
    inside = text[span[0] : span[1]].rstrip()
    after = text[span[1] :].lstrip()
    for token in template.control:
        if inside.endswith(token) or after.startswith(token):
            return token
    return None


# ---------------------------------------------------------------------------------------------- encoding


def check_conversation(messages: Sequence[Message]) -> str | None:
    """Why a conversation cannot be trained on, None where it can: at most one system message, first; then
    user and assistant in turn, the assistant last; nothing empty."""
    turns = [message for i, message in enumerate(messages) if i or message.role != "system"]
    for i, message in enumerate(turns):
        if message.role not in ROLES:
            return f'unknown role "{message.role}"'
        if message.role == "system":
            return "a system message after the first place"
        if message.role != ("user", "assistant")[i % 2]:
            return "mixed roles: user and assistant do not take turns, the user first"
        if not message.content.strip() and not message.input.strip():
            return "an empty response" if message.role == "assistant" else "an empty question"
    if not turns:
        return "no messages"
    if turns[-1].role != "assistant":
        return "no response: the last message is the user's"
    return None


def encode(messages: Sequence[Message], template: ChatTemplate, tokenizer: Tokenizer) -> Encoded:
    """Ids and loss mask of a conversation; BOS and end-of-turn tokens are the template's, none are added.

    Every assistant turn and the token that closes it are in the loss.

    Raises:
        BadConversation: a message spells a special token out, or the template cannot render the conversation.
    """
    for message in messages:
        for token in template.control:
            if token in message.content or token in message.input:
                raise BadConversation(f"a message spells the special token {token} out")
    text, spans = template.render(messages)
    if not spans:
        raise BadConversation("no response")
    ids, offsets = tokenizer.encode_with_offsets(text)
    loss, boundary = _mask(offsets, spans)
    return Encoded(np.array(ids, dtype=np.int32), loss, boundary)


def _mask(offsets: Iterable[Span], spans: Sequence[Span]) -> tuple[np.ndarray, int]:
    """(token overlaps a span [n] bool, how many of these begin before theirs). A token of no width, such as
    spaces whose offsets were trimmed, belongs to the text that ends where it stands."""
    begins, ends = np.array(list(offsets), dtype=np.int64).reshape(-1, 2).T
    loss, boundary = np.zeros(len(begins), dtype=bool), 0
    for begin, end in spans:
        inside = (ends > begin) & ((begins < end) | (begins == ends) & (ends == end))
        boundary += int((inside & (begins < begin)).sum())
        loss |= inside
    return loss, boundary


# ------------------------------------------------------------------------------------------------ export


def write_template(directory: Path, template: ChatTemplate, tokenizer: Tokenizer) -> None:
    """Makes `template` the chat template of the Hugging Face directory, and its end-of-turn token one at
    which generation stops."""
    directory = Path(directory)
    with atomic_file(directory / "chat_template.jinja") as stream:
        stream.write(template.jinja)
    configuration = _read_json(directory / "tokenizer_config.json")
    configuration["chat_template"] = template.jinja
    _write_json(directory / "tokenizer_config.json", configuration)
    generation = _read_json(directory / "generation_config.json")
    stops = list(dict.fromkeys([tokenizer.special_pieces[template.end_of_turn], tokenizer.eos_id]))
    generation["eos_token_id"] = stops[0] if len(stops) == 1 else stops
    if tokenizer.bos_id is not None:
        generation["bos_token_id"] = tokenizer.bos_id
    _write_json(directory / "generation_config.json", generation)


def stop_tokens(directory: Path, eos_id: int | None) -> list[int]:
    """Ids at which the model of a Hugging Face directory ends a turn: those that generation_config.json or
    else config.json names, and the tokenizer's EOS."""
    for name in ("generation_config.json", "config.json"):
        named = _read_json(Path(directory) / name).get("eos_token_id")
        if named is not None:
            break
    ids = [*(named if isinstance(named, list) else [named]), eos_id]
    return list(dict.fromkeys(id for id in ids if id is not None))


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with atomic_file(path) as stream:
        stream.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
