"""The same losses as TRL's SFTTrainer, step by step: same weights, conversations and optimizer."""

import numpy as np
import pytest

from solar_mega.config.schema import OptimizerConfig, ScheduleConfig
from solar_mega.data.chat import Encoded
from solar_mega.data.packing import packed_batch
from tests.train.test_gradients import _Weights, _weights
from tests.train.tiny import SEQUENCE, VOCABULARY, Case, architecture, one_rank, start

STEPS, BATCH = 10, 4
CASE = Case(
    micro_batch_size=1,
    steps=STEPS,
    optimizer=OptimizerConfig(lr=2e-3, clip_grad=1.0, weight_decay=0.0),
    schedule=ScheduleConfig(kind="constant"),
)


def _conversations() -> list[Encoded]:
    """Short ones, two to a row, of several turns."""
    draw = np.random.default_rng(3)
    made = []
    for _ in range(STEPS * BATCH):
        ids = (draw.integers(0, 12) + np.arange(draw.integers(6, 13))) % 12 * 8
        loss = draw.random(len(ids)) < 0.5
        loss[0], loss[-1] = False, True
        made.append(Encoded(ids.astype(np.int32), loss))
    return made


def _ours(conversations: list[Encoded]) -> list[float]:
    with one_rank():
        _, trainer = start(CASE, _Weights(_weights(architecture())))
        steps = [conversations[i : i + BATCH] for i in range(0, len(conversations), BATCH)]
        rows = [[packed_batch(step[i : i + 2], SEQUENCE, 0) for i in (0, 2)] for step in steps]
        return [trainer.step(iter(row), 2).loss for row in rows]


def _theirs(conversations: list[Encoded], model_dir, out) -> list[float]:
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    arch, c = architecture(), CASE.optimizer
    config = {key: value for key, value in arch.hf_config.items() if key != "architectures"}
    model = LlamaForCausalLM(LlamaConfig(**config, attn_implementation="eager"))
    model.load_state_dict(_weights(arch))
    rows = {
        "input_ids": [one.ids.tolist() for one in conversations],
        "labels": [np.where(one.loss, one.ids, -100).tolist() for one in conversations],
    }
    losses: list[float] = []

    class Recording(trl.SFTTrainer):
        def compute_loss(self, *args, **options):
            result = super().compute_loss(*args, **options)
            losses.append(float(result[0] if isinstance(result, tuple) else result))
            return result

    options = dict(
        output_dir=str(out),
        per_device_train_batch_size=BATCH,
        max_steps=STEPS,
        learning_rate=c.lr,
        lr_scheduler_type="constant",
        adam_beta1=c.beta1,
        adam_beta2=c.beta2,
        adam_epsilon=c.eps,
        weight_decay=0.0,
        max_grad_norm=c.clip_grad,
        train_sampling_strategy="sequential",
        max_length=SEQUENCE,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(model_dir, pad_token="<unk>")
    trainer = Recording(
        model=model,
        args=trl.SFTConfig(**options),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    return losses


def test_losses_of_ten_steps_are_those_of_trl(tmp_path_factory, tmp_path) -> None:
    pytest.importorskip("trl", reason="needs trl (pip install trl)")
    from solar_mega.data.train_tokenizer import train_sentencepiece

    directory = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    train_sentencepiece(["Below is an instruction. " * 50], 275, directory)
    conversations = _conversations()
    assert max(one.ids.max() for one in conversations) < VOCABULARY
    ours, theirs = _ours(conversations), _theirs(conversations, directory, tmp_path)
    assert len(ours) == len(theirs) == STEPS and ours[-1] < 0.9 * ours[0]
    assert ours == pytest.approx(theirs, abs=1e-4)
