"""Our model as lm-evaluation-harness sees one: requests as text in, log-likelihoods and text out.

Tokenises as the harness's own `hf` model does, so that both answer the same questions.
"""

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from solar_mega.errors import UserError
from solar_mega.evaluate.generation import Decoding
from solar_mega.evaluate.model import ShardedModel
from solar_mega.evaluate.packing import Request

MAX_GEN_TOKENS = 256  # the harness's default


class ShardedLM(TemplateLM):
    """`ShardedModel` on rank 0 behind the harness's interface; the other ranks serve."""

    def __init__(self, model: ShardedModel, max_length: int | None = None, batch_tokens: int | None = None):
        super().__init__()
        from transformers import AutoTokenizer

        if max_length is not None and max_length > model.max_length:
            raise UserError(
                f"--max-length {max_length} exceeds the model's max_position_embeddings {model.max_length}"
            )
        self.model, self.batch_tokens = model, batch_tokens
        self._max_length = max_length or model.max_length
        model.max_length = self._max_length
        self.tokenizer = AutoTokenizer.from_pretrained(str(model.source.side_files), local_files_only=True)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        return self._max_length

    @property
    def max_gen_toks(self) -> int:
        return min(MAX_GEN_TOKENS, self._max_length // 2)

    @property
    def tokenizer_name(self) -> str:
        return str(self.model.source.side_files).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """A string that begins with the prefix token spelled out gets no second one."""
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        prefix = self.tokenizer.decode([self.prefix_token_id])
        if add_special_tokens is None and prefix and string.startswith(prefix):
            options = {"add_special_tokens": False}
        return self.tokenizer.encode(string, **options)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], label: str = "scoring", **_: Any
    ) -> list[tuple[float, bool]]:
        questions = [Request(context, continuation) for _, context, continuation in requests]
        scores = self.model.score(questions, self.batch_tokens, label)
        answers = [(score.total, score.greedy) for score in scores]
        for (text, _, _), answer in zip(requests, answers, strict=True):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """ln p of whole texts, in windows of the model's context that score each token once."""
        questions, owners = [], []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, windows):
                questions.append((None, context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (total, _) in zip(owners, self._loglikelihood_tokens(questions), strict=True):
            totals[owner] += total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations up to a stop text. Raises UserError for a task that samples."""
        answers: list[str | None] = [None] * len(requests)
        kinds: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            kinds.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        eos = self.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        for numbers in kinds.values():
            arguments = normalize_gen_kwargs(requests[numbers[0]].args[1], self.max_gen_toks)
            stop = handle_stop_sequences(arguments.pop("until", None), eos=eos)
            for number, text in zip(
                numbers, self._generate([requests[n].args[0] for n in numbers], arguments, stop), strict=True
            ):
                answers[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return answers  # type: ignore[return-value]

    def _generate(self, contexts: list[str], arguments: dict[str, Any], stop: list[str]) -> list[str]:
        if arguments.get("do_sample"):
            raise UserError(
                "tasks that sample (do_sample: true) are not supported; evaluation here is greedy"
            )
        limit = arguments["max_gen_toks"]
        room = self.max_length - limit
        if room < 1:
            raise UserError(
                f"the task generates up to {limit} tokens, which leaves no room in a context of "
                f"{self.max_length}; raise --max-length if the model allows it"
            )
        decoding = Decoding(
            max_tokens=limit,
            eos_id=self.eot_token_id,
            stop=tuple(text for text in stop if text),
            tokenizer=self.model.source.side_files,
            label="generating",
        )
        prompts = [self.tok_encode(context)[-room:] for context in contexts]
        return [
            postprocess_generated_text(
                self.tokenizer.decode(list(out.tokens), skip_special_tokens=True), stop, None
            )
            for out in self.model.generate(prompts, decoding)
        ]
