"""Text from a language model, whichever is at hand: an OpenAI-compatible endpoint or a file of recorded
answers; models on this machine are in local_generators.py.

A generator takes requests and gives back completions as they are done, in any order; failures too, so that
one bad request does not end a night's work.
"""

import json
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from solar_mega.errors import UserError

_RETRIED = {408, 409, 425, 429, 500, 502, 503, 504}
_LONGEST_PAUSE = 60.0


@dataclass(frozen=True)
class Request:
    prompt: str
    sample: int = 0
    """Tells several answers to one prompt apart; a seed where the model takes one."""


@dataclass(frozen=True)
class Completion:
    request: Request
    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None
    """Why there is no text."""


CUT_OFF = "cut off at --max-tokens"


class Generator(Protocol):
    name: str
    """Model and settings: answers of different names are never mixed up."""

    def complete(self, requests: Sequence[Request]) -> Iterator[Completion]: ...


@dataclass(frozen=True)
class Sampling:
    temperature: float = 0.7
    max_tokens: int = 1024
    seed: int = 1234

    @property
    def name(self) -> str:
        return f"t{self.temperature} max{self.max_tokens} seed{self.seed}"


# --------------------------------------------------------------------------- OpenAI-compatible endpoints


class RateLimit:
    """At most so many starts per minute, evenly spread. Thread-safe."""

    def __init__(self, per_minute: float | None) -> None:
        self._gap = 60.0 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self) -> None:
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next)
            self._next = start + self._gap
        if start > now:
            time.sleep(start - now)


class EndpointGenerator:
    """`POST {base_url}/chat/completions`, several at a time, with retries.

    Refusals that repeating cannot mend (a wrong key or model) raise UserError at once.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str | None,
        sampling: Sampling,
        *,
        concurrency: int = 8,
        requests_per_minute: float | None = None,
        retries: int = 5,
        timeout: float = 120.0,
        first_pause: float = 1.0,
    ) -> None:
        self.url = base_url.rstrip("/") + "/chat/completions"
        self.model, self.sampling = model, sampling
        self.name = f"endpoint {model} {sampling.name}"
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._concurrency, self._limit = concurrency, RateLimit(requests_per_minute)
        self._retries, self._timeout, self._pause = retries, timeout, first_pause

    def complete(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """At most twice `concurrency` requests are in the pool, so that stopping wastes few."""
        waiting, running = iter(requests), set()
        with ThreadPoolExecutor(self._concurrency) as pool:
            try:
                while True:
                    for request in _take(waiting, 2 * self._concurrency - len(running)):
                        running.add(pool.submit(self._one, request))
                    if not running:
                        return
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            except BaseException:
                _cancel(running)
                raise

    def _one(self, request: Request) -> Completion:
        pause = self._pause
        for attempt in range(self._retries + 1):
            self._limit.wait()
            try:
                return self._ask(request)
            except urllib.error.HTTPError as error:
                reason, wanted = _reason(error), _retry_after(error)
                if error.code not in _RETRIED:
                    if error.code in (401, 403, 404):
                        raise UserError(f"{self.url} refuses model {self.model!r}: {reason}") from None
                    return Completion(request, "", error=reason)
            except (urllib.error.URLError, TimeoutError, ConnectionError, ValueError, KeyError) as error:
                reason, wanted = f"{type(error).__name__}: {error}", None
            if attempt < self._retries:
                time.sleep(min(wanted or pause * (0.5 + random.random()), _LONGEST_PAUSE))
                pause *= 2
        return Completion(request, "", error=f"{self._retries + 1} attempts failed, the last with {reason}")

    def _ask(self, request: Request) -> Completion:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": request.prompt}],
            "temperature": self.sampling.temperature,
            "max_tokens": self.sampling.max_tokens,
            "seed": self.sampling.seed + request.sample,
        }
        call = urllib.request.Request(self.url, json.dumps(body).encode(), self._headers)
        with urllib.request.urlopen(call, timeout=self._timeout) as answer:
            content = json.loads(answer.read().decode("utf-8"))
        choice, usage = content["choices"][0], content.get("usage") or {}
        if choice.get("finish_reason") == "length":
            return Completion(request, "", *_tokens(usage), error=CUT_OFF)
        return Completion(request, choice["message"]["content"] or "", *_tokens(usage))


def _take(items: Iterator[Request], count: int) -> Iterable[Request]:
    return [item for _, item in zip(range(count), items, strict=False)]


def _cancel(running: set[Future]) -> None:
    for future in running:
        future.cancel()


def _tokens(usage: dict[str, Any]) -> tuple[int, int]:
    return int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)


def _reason(error: urllib.error.HTTPError) -> str:
    text = error.read(300).decode("utf-8", "replace").strip()
    return f"HTTP {error.code} {error.reason}" + (f": {text}" if text else "")


def _retry_after(error: urllib.error.HTTPError) -> float | None:
    value = error.headers.get("Retry-After", "")
    return float(value) if value.replace(".", "", 1).isdigit() else None


# ------------------------------------------------------------------------------------------------ replay


class ReplayGenerator:
    """Answers recorded earlier: JSON lines of {prompt, text, sample?}. What is not recorded is a failure."""

    def __init__(self, file: Path) -> None:
        if not file.is_file():
            raise UserError(f"--replay {file}: no such file")
        self.name = f"replay {file}"
        self.answers: dict[tuple[str, int], str] = {}
        for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                self.answers[record["prompt"], int(record.get("sample", 0))] = str(record["text"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{file}:{number}: not a recorded answer {{prompt, text}}: {error}") from None

    def complete(self, requests: Sequence[Request]) -> Iterator[Completion]:
        for request in requests:
            text = self.answers.get((request.prompt, request.sample))
            yield Completion(request, text or "", error=None if text is not None else "not recorded")
