"""Text from a model directory on this machine, by transformers or vLLM.

Both get the same tokens: the question in the tokenizer's chat template. Sampling is by temperature alone;
top-k and the like of a model's generation_config.json are set aside, as an endpoint would.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from solar_mega.data.chat import stop_tokens
from solar_mega.data.generators import CUT_OFF, Completion, Request, Sampling
from solar_mega.data.tokenizer import load_tokenizer
from solar_mega.errors import UserError

_VLLM_ROOM = 4096
"""Tokens of a prompt that vLLM keeps memory for, beside those of an answer."""
_VLLM_AT_ONCE = 512
"""Requests handed over together: enough to keep the GPUs busy, few to lose when killed."""


class _Questions:
    """Requests as tokens of one model.

    Attributes:
        ends: ids that close an answer.
        window: positions that the model knows; None where its configuration does not say.
    """

    def __init__(self, model: Path) -> None:
        if not (model / "config.json").is_file():
            raise UserError(f"--model {model}: no config.json there; give a Hugging Face model directory")
        load_tokenizer(model)  # says what is missing
        from transformers import AutoConfig, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(str(model), local_files_only=True, padding_side="left")
        if self.tokenizer.chat_template is None:
            raise UserError(f"--model {model}: its tokenizer has no chat template to ask questions with")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.ends = stop_tokens(model, self.tokenizer.eos_token_id)
        config = AutoConfig.from_pretrained(str(model), local_files_only=True).get_text_config()
        self.window: int | None = getattr(config, "max_position_embeddings", None)

    def encode(self, request: Request) -> list[int]:
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": request.prompt}], tokenize=False, add_generation_prompt=True
        )
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def fitting(
        self, requests: Sequence[Request], room: int | None, refused: list[Completion]
    ) -> list[tuple[Request, list[int]]]:
        """The requests of at most `room` tokens, and these; the others go to `refused`."""
        encoded = [(request, self.encode(request)) for request in requests]
        for request, ids in encoded:
            if room is not None and len(ids) > room:
                refused.append(
                    Completion(request, "", len(ids), error="the question fills the model's context")
                )
        return [(request, ids) for request, ids in encoded if room is None or len(ids) <= room]


class TransformersGenerator:
    """A Hugging Face model, batch by batch, on the GPU if there is one."""

    def __init__(self, model: Path, sampling: Sampling, batch_size: int = 8) -> None:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        self.name = f"transformers {model} {sampling.name}"
        self.sampling, self.batch_size = sampling, batch_size
        self.questions = _Questions(model)
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = AutoModelForCausalLM.from_pretrained(str(model), local_files_only=True, dtype="auto")
        self.model.to(self.device).eval()

    def complete(self, requests: Sequence[Request]) -> Iterator[Completion]:
        window, batch = self.questions.window, self.batch_size
        for start in range(0, len(requests), batch):
            done: list[Completion] = []
            room = None if window is None else window - 1
            fitting = self.questions.fitting(requests[start : start + batch], room, done)
            yield from done
            if fitting:
                yield from self._batch(fitting)

    def _batch(self, batch: list[tuple[Request, list[int]]]) -> list[Completion]:
        """Prompts padded on the left, so that all answers begin at the same place."""
        import torch
        from transformers import GenerationConfig

        tokenizer, window = self.questions.tokenizer, self.questions.window
        inputs = tokenizer.pad({"input_ids": [ids for _, ids in batch]}, return_tensors="pt").to(self.device)
        width = inputs["input_ids"].shape[1]
        longest = (
            self.sampling.max_tokens if window is None else min(self.sampling.max_tokens, window - width)
        )
        drawn = self.sampling.temperature > 0
        draw = {"temperature": float(self.sampling.temperature), "top_k": 0, "top_p": 1.0} if drawn else {}
        settings = GenerationConfig(
            do_sample=drawn,
            max_new_tokens=longest,
            eos_token_id=self.questions.ends,
            pad_token_id=tokenizer.pad_token_id,
            **draw,
        )
        torch.manual_seed(_seed(self.sampling.seed, [request for request, _ in batch]))
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                generation_config=settings,
            )
        return [
            self._completion(request, row[width:].tolist(), len(ids))
            for (request, ids), row in zip(batch, output, strict=True)
        ]

    def _completion(self, request: Request, generated: list[int], prompt_tokens: int) -> Completion:
        end = next((i for i, token in enumerate(generated) if token in self.questions.ends), None)
        if end is None:
            return Completion(request, "", prompt_tokens, len(generated), CUT_OFF)
        text = self.questions.tokenizer.decode(generated[:end], skip_special_tokens=True)
        return Completion(request, text, prompt_tokens, end + 1)


def _seed(seed: int, requests: Sequence[Request]) -> int:
    """Of a batch: the same questions draw the same answers, other ones draw independently."""
    text = "\n".join([str(seed), *(f"{request.sample} {request.prompt}" for request in requests)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")


class VllmGenerator:
    """vLLM's own batching on the GPUs of this machine."""

    def __init__(self, model: Path, sampling: Sampling, tensor_parallel: int = 1) -> None:
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise UserError(
                f"--backend vllm: the package vllm cannot be imported ({error}). On a GPU machine, pip "
                "install vllm (in an environment of its own: it pins its own torch); or serve the model with "
                "`vllm serve` and use --backend openai --base-url"
            ) from None
        self.name = f"vllm {model} {sampling.name}"
        self.sampling, self._parameters = sampling, SamplingParams
        self.questions = _Questions(model)
        # Without a limit vLLM reserves memory for one sequence of the model's whole context.
        wanted = _VLLM_ROOM + sampling.max_tokens
        self.context = min(self.questions.window or wanted, wanted)
        self.model = LLM(
            model=str(model),
            tensor_parallel_size=tensor_parallel,
            seed=sampling.seed,
            max_model_len=self.context,
        )

    def complete(self, requests: Sequence[Request]) -> Iterator[Completion]:
        for start in range(0, len(requests), _VLLM_AT_ONCE):
            done: list[Completion] = []
            batch = requests[start : start + _VLLM_AT_ONCE]
            fitting = self.questions.fitting(batch, self.context - 1, done)
            yield from done
            # vLLM refuses all of them together for one that is too long.
            answers = self.model.generate(
                [{"prompt_token_ids": ids} for _, ids in fitting],
                [self._sampling(request) for request, _ in fitting],
                use_tqdm=False,
            )
            for (request, ids), answer in zip(fitting, answers, strict=True):
                yield _completion(request, len(ids), answer.outputs[0])

    def _sampling(self, request: Request) -> Any:
        return self._parameters(
            temperature=self.sampling.temperature,
            max_tokens=self.sampling.max_tokens,
            seed=self.sampling.seed + request.sample,
            stop_token_ids=self.questions.ends,
        )


def _completion(request: Request, prompt_tokens: int, output: Any) -> Completion:
    """Of one of vLLM's `CompletionOutput`."""
    tokens = prompt_tokens, len(output.token_ids)
    if output.finish_reason == "stop":
        return Completion(request, output.text, *tokens)
    reason = CUT_OFF if output.finish_reason == "length" else f"ended with {output.finish_reason}"
    return Completion(request, "", *tokens, error=reason)
