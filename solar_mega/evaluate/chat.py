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
  /exit          leave (so do Ctrl-D and an empty pipe); Ctrl-C stops an answer"""


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
    talk = Conversation(options)
    if options.prompt is not None:
        talk.say(options.prompt, sys.stdout)
        return 0
    terminal = sys.stdin.isatty()
    if terminal:
        print(f"{options.model}: {talk.describe()}\n{_COMMANDS}")
    for line in _lines(terminal):
        if line.startswith("/"):
            if not talk.command(line):
                break
        elif line.strip():
            talk.say(line, sys.stdout)
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
        try:
            yield input("\n> ")
        except EOFError:
            print()
            return


class Conversation:
    """A model, its tokenizer and the turns so far."""

    def __init__(self, o: ChatOptions) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        from solar_mega.data.tokenizer import load_tokenizer

        load_tokenizer(o.model)  # says what is missing
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.options = o
        self.tokenizer = AutoTokenizer.from_pretrained(str(o.model), local_files_only=True)
        if o.template is not None:
            self.tokenizer.chat_template = _template(o.template, o.model)
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
            self.system = text.strip() or None
        if name in ("/reset", "/system"):
            self.turns = []
        else:
            print(_COMMANDS)
        return True

    def say(self, text: str, stream: Any) -> str:
        """Answers as one more turn, writing as it goes. Ctrl-C ends the answer, which stays."""
        self.turns.append({"role": "user", "content": text})
        ids = self._encode()
        answer, interrupted = [], _Stop()
        for piece in self._stream(ids, interrupted):
            answer.append(piece)
            stream.write(piece)
            stream.flush()
        stream.write("\n")
        stream.flush()
        self.turns.append({"role": "assistant", "content": "".join(answer)})
        return self.turns[-1]["content"]

    def _encode(self) -> Any:
        """Token ids of the conversation; the oldest turns go when the context is full."""
        limit = self.model.config.max_position_embeddings - 1
        while True:
            head = [{"role": "system", "content": self.system}] if self.system else []
            batch = self.tokenizer.apply_chat_template(
                head + self.turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            length = batch["input_ids"].shape[1]
            room = min(self.options.max_new_tokens, max(limit // 4, 1))
            if length + room <= limit:
                return batch.to(self.model.device)
            if len(self.turns) == 1:
                self.turns = []
                raise UserError(
                    f"the message is {length} tokens long; the model's context of {limit + 1} leaves "
                    f"{limit - room}"
                )
            self.turns = self.turns[2:]
            print("(the conversation is too long; its oldest turn was forgotten)", file=sys.stderr)

    def _stream(self, batch: Any, stop: "_Stop") -> Iterator[str]:
        from transformers import StoppingCriteriaList, TextIteratorStreamer

        o = self.options
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        room = self.model.config.max_position_embeddings - batch["input_ids"].shape[1]
        sampling: dict[str, Any] = {"do_sample": False}
        if o.temperature > 0:
            sampling = {"do_sample": True, "temperature": o.temperature, "top_p": o.top_p}
        pad = self.tokenizer.pad_token_id
        arguments = dict(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=min(o.max_new_tokens, room),
            eos_token_id=self.tokenizer.eos_token_id,
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
            yield from streamer
        except KeyboardInterrupt:
            stop.asked = True
            yield from streamer
        finally:
            thread.join()
        if errors:
            raise errors[0]


class _Stop:
    """A stopping criterion of transformers."""

    asked = False

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        import torch

        return torch.full((input_ids.shape[0],), self.asked, device=input_ids.device, dtype=torch.bool)


def _template(spec: str, directory: Path) -> str:
    from solar_mega.data.chat import load_template
    from solar_mega.data.tokenizer import load_tokenizer

    return load_template(spec, load_tokenizer(directory)).jinja
