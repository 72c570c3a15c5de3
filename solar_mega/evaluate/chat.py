"""`solar-mega chat DIR`: talk to an exported model in the terminal, through transformers' generate."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any, Literal

from tyro.conf import Positional

from solar_mega.config.command_line import parse_options
from solar_mega.errors import Problems, UserError

_COMMANDS = """  /reset         forget the conversation
  /system TEXT   set the system message (no TEXT: remove it) and start anew
  /exit          leave (so does Ctrl-D); Ctrl-C stops an answer"""


@dataclass(frozen=True)
class ChatOptions:
    """Talk to a Hugging Face directory in its chat template, answers streaming. Without a terminal every line
    of the input is a turn, and only answers are printed."""

    model: Positional[Path]
    """Hugging Face directory, such as a run's hf."""

    prompt: str | None = None
    """Answer this and stop."""

    system: str | None = None
    """System message."""

    template: str | None = None
    """Chat template: alpaca, solar or a jinja file; default: the tokenizer's own."""

    max_new_tokens: int = 512
    """Longest answer."""

    temperature: float = 0.0
    """0 always takes the most probable token."""

    top_p: float = 1.0
    """Sampling from the most probable tokens that make up this share."""

    seed: int = 0

    device: Literal["auto", "cpu", "cuda"] = "auto"


def chat(argv: Sequence[str]) -> int:
    options = parse_options(ChatOptions, argv, "chat")
    _check(options)
    terminal = options.prompt is None and sys.stdin.isatty()
    if terminal:
        print(f"loading {options.model} ...", flush=True)
    talk = Conversation(options)
    if options.prompt is not None:
        talk.say(options.prompt, sys.stdout)
        return 0
    if terminal:
        print(f"{talk.describe()}\n{_COMMANDS}")
    for line in _lines(terminal):
        if line.startswith("/"):
            if not talk.command(line):
                break
        elif line.strip():
            try:
                talk.say(line, sys.stdout)
            except (UserError, KeyboardInterrupt) as error:
                if not terminal:
                    raise
                _note(str(error) or "stopped")  # a message beyond the context is no reason to leave
    return 0


def _check(o: ChatOptions) -> None:
    problems = Problems()
    if not (o.model / "config.json").is_file():
        problems.add(f"{o.model} is no Hugging Face directory: it has no config.json")
    if o.max_new_tokens < 1:
        problems.add(f"--max-new-tokens {o.max_new_tokens}: must be 1 or more")
    if o.temperature < 0:
        problems.add(f"--temperature {o.temperature}: must be 0 or more")
    if not 0 < o.top_p <= 1:
        problems.add(f"--top-p {o.top_p}: must be above 0 and at most 1")
    problems.raise_if_any("chat")


def _lines(terminal: bool) -> Iterator[str]:
    if not terminal:
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history in input()
    while True:
        print()  # not in the prompt, whose width readline counts
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print()
            _note("Ctrl-D or /exit leaves")
        except EOFError:
            print()
            return


def _note(text: str) -> None:
    """Beside the conversation, so that a pipe gets answers only."""
    print(f"({text})", file=sys.stderr, flush=True)


class Conversation:
    """A model, its tokenizer and the turns so far."""

    def __init__(self, o: ChatOptions) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        from solar_mega.data.chat import load_template, stop_tokens
        from solar_mega.data.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(o.model)  # says what is missing
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.options = o
        self.tokenizer = AutoTokenizer.from_pretrained(str(o.model), local_files_only=True)
        self.ends = stop_tokens(o.model, self.tokenizer.eos_token_id)
        if o.template is not None:
            template = load_template(o.template, tokenizer)
            self.tokenizer.chat_template = template.jinja
            self.ends.append(tokenizer.special_pieces[template.end_of_turn])
        if not self.tokenizer.chat_template:
            raise UserError(
                f"{o.model} has no chat template (a base model); name one: --template alpaca, solar or a file"
            )
        chosen = ("cuda" if torch.cuda.is_available() else "cpu") if o.device == "auto" else o.device
        if chosen == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: PyTorch sees no GPU; allowed here: auto, cpu")
        self.model = AutoModelForCausalLM.from_pretrained(str(o.model), dtype="auto", local_files_only=True)
        self.model.to(chosen).eval()
        torch.manual_seed(o.seed)
        self.system = o.system
        self.turns: list[dict[str, str]] = []

    def describe(self) -> str:
        count = sum(p.numel() for p in self.model.parameters())
        return f"{count / 1e6:.1f}M parameters, {self.model.dtype}, on {self.model.device}"

    def command(self, line: str) -> bool:
        """False to leave."""
        name, _, text = line.partition(" ")
        if name in ("/exit", "/quit"):
            return False
        if name == "/system":
            self.system, self.turns = text.strip() or None, []
            _note(f"a new conversation, {'with this' if self.system else 'without'} system message")
        elif name == "/reset":
            self.turns = []
            _note("a new conversation")
        else:
            if name != "/help":
                _note(f"{name} is no command")
            print(_COMMANDS, file=sys.stderr)
        return True

    def say(self, text: str, stream: Any) -> str:
        """Answers as one more turn, writing as it goes. Ctrl-C ends the answer, and what is written stays.
        Raises UserError for a message that fills the context alone; the conversation is as it was."""
        before = list(self.turns)
        try:
            return self._say(text, stream)
        except BaseException:
            self.turns = before
            raise

    def _say(self, text: str, stream: Any) -> str:
        self.turns.append({"role": "user", "content": text})
        answer, stop = "", _Stop()
        with self._answering(self._encode(), stop) as pieces:
            try:
                for piece in pieces:
                    piece = piece if answer else piece.lstrip()
                    answer += piece
                    stream.write(piece)
                    stream.flush()
            except KeyboardInterrupt:
                stop.asked = True
        stream.write("\n")
        stream.flush()
        if stop.asked:
            _note("stopped")
        self.turns.append({"role": "assistant", "content": answer})
        return answer

    def _encode(self) -> Any:
        """Token ids of the conversation; the oldest turns go when the context is full. Raises UserError."""
        limit = self.model.config.max_position_embeddings - 1
        room = min(self.options.max_new_tokens, max(limit // 4, 1))
        head = [{"role": "system", "content": self.system}] if self.system else []
        turns = self.turns
        while True:
            batch = self.tokenizer.apply_chat_template(
                head + turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            length = batch["input_ids"].shape[1]
            if length + room <= limit:
                break
            if len(turns) == 1:
                raise UserError(
                    f"the message is {length} tokens long; the model's context of {limit + 1} leaves "
                    f"{limit - room}"
                )
            turns = turns[2:]
        if len(turns) < len(self.turns):
            _note("the conversation is too long; its oldest turn was forgotten")
            self.turns = turns
        return batch.to(self.model.device)

    @contextlib.contextmanager
    def _answering(self, batch: Any, stop: "_Stop") -> Iterator[Iterator[str]]:
        """Pieces of the answer as they come, from a thread that is gone in the end; raises what it raised."""
        from transformers import StoppingCriteriaList, TextIteratorStreamer

        o = self.options
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        room = self.model.config.max_position_embeddings - batch["input_ids"].shape[1]
        sampling: dict[str, Any] = {"do_sample": False}
        if o.temperature > 0:
            sampling = {"do_sample": True, "temperature": o.temperature, "top_p": o.top_p, "top_k": 0}
        pad = self.tokenizer.pad_token_id
        arguments = dict(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=min(o.max_new_tokens, room),
            eos_token_id=self.ends,
            pad_token_id=self.tokenizer.eos_token_id if pad is None else pad,
            stopping_criteria=StoppingCriteriaList([stop]),
            streamer=streamer,
            **sampling,
        )
        errors: list[BaseException] = []

        def work() -> None:
            try:
                self.model.generate(**arguments)
            except BaseException as error:
                errors.append(error)
                streamer.end()

        thread = Thread(target=work, daemon=True)
        thread.start()
        try:
            yield streamer
        finally:
            stop.asked = stop.asked or sys.exc_info()[0] is not None
            thread.join()
        if errors:
            raise errors[0]


class _Stop:
    """A stopping criterion of transformers."""

    asked = False

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        import torch

        return torch.full((input_ids.shape[0],), self.asked, device=input_ids.device, dtype=torch.bool)
