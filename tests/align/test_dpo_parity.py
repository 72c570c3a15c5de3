"""The same losses as TRL's DPOTrainer with its second model: same weights, tokens and optimizer."""

import numpy as np
import pytest

from solar_mega.align.objective import dpo_objective
from solar_mega.align.pair_batches import Loader, RowPlan
from solar_mega.align.reference import compute
from solar_mega.config.dpo import LossConfig
from solar_mega.config.schema import OptimizerConfig, ScheduleConfig
from solar_mega.data.preference_tokens import Response, TokenPair
from solar_mega.ops.dpo_loss import VARIANTS
from tests.train.test_gradients import _Weights, _weights
from tests.train.tiny import SEQUENCE, Case, architecture, one_rank, start

STEPS, BATCH, BETA = 10, 4, 0.5
CASE = Case(
    micro_batch_size=1,
    steps=STEPS,
    optimizer=OptimizerConfig(lr=1e-3, clip_grad=1.0, weight_decay=0.0),
    schedule=ScheduleConfig(kind="constant"),
)


def _pairs() -> list[TokenPair]:
    """Responses of different lengths to prompts of two to four tokens; some pairs share a row."""
    draw = np.random.default_rng(5)

    def response(prompt):
        answer = draw.integers(1, 90, draw.integers(1, 7))
        ids = np.concatenate([prompt, answer]).astype(np.int32)
        return Response(ids, np.arange(len(ids)) >= len(prompt))

    pairs = []
    for _ in range(STEPS * BATCH):
        prompt = draw.integers(1, 90, draw.integers(2, 5))
        pairs.append(TokenPair(response(prompt), response(prompt)))
    return pairs


def _ours(pairs: list[TokenPair], loss: LossConfig, steps: int) -> list[float]:
    with one_rank():
        chunks, trainer = start(CASE, _Weights(_weights(architecture())))
        trainer.objective = dpo_objective(loss)
        plan = RowPlan(SEQUENCE, packing=True, dp=1, dp_rank=0)
        reference = compute(chunks, pairs, range(len(pairs)), plan)
        loader, losses = Loader(pairs, reference, plan), []
        assert loader.count(range(len(pairs))) < len(pairs)  # some share a row
        for step in range(steps):
            numbers = list(range(step * BATCH, (step + 1) * BATCH))
            losses.append(trainer.step(loader.batches(numbers), loader.count(numbers)).loss)
        return losses


def _model():
    from transformers import LlamaConfig, LlamaForCausalLM

    arch = architecture()
    config = {key: value for key, value in arch.hf_config.items() if key != "architectures"}
    model = LlamaForCausalLM(LlamaConfig(**config, attn_implementation="eager"))
    model.load_state_dict(_weights(arch))
    return model


def _theirs(pairs: list[TokenPair], loss: LossConfig, steps: int, model_dir, out) -> list[float]:
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer

    c, losses = CASE.optimizer, []

    class Recording(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **options):
            return dataset  # it is tokens already

        def compute_loss(self, *args, **options):
            result = super().compute_loss(*args, **options)
            losses.append(float(result[0] if isinstance(result, tuple) else result))
            return result

    def part(pair: TokenPair, name: str) -> list[int]:
        response = getattr(pair, name)
        return response.ids[response.loss].tolist()

    rows = {
        "prompt_ids": [pair.chosen.ids[~pair.chosen.loss].tolist() for pair in pairs],
        "chosen_ids": [part(pair, "chosen") for pair in pairs],
        "rejected_ids": [part(pair, "rejected") for pair in pairs],
    }
    options = dict(
        output_dir=str(out),
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        learning_rate=c.lr,
        lr_scheduler_type="constant",
        adam_beta1=c.beta1,
        adam_beta2=c.beta2,
        adam_epsilon=c.eps,
        weight_decay=0.0,
        max_grad_norm=c.clip_grad,
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        beta=loss.beta,
        label_smoothing=loss.label_smoothing,
        loss_type=[loss.variant],
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Recording(
        model=_model(),
        ref_model=_model(),
        args=trl.DPOConfig(**options),
        train_dataset=Dataset.from_dict(rows),
        processing_class=AutoTokenizer.from_pretrained(model_dir, pad_token="<unk>"),
    )
    trainer.train()
    return losses


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    pytest.importorskip("trl", reason="needs trl (pip install 'solar-mega[parity]')")
    from solar_mega.data.train_tokenizer import train_sentencepiece

    directory = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    train_sentencepiece(["Below is an instruction. " * 50], 275, directory)
    return directory


def test_losses_of_ten_steps_are_those_of_trl(tokenizer_dir, tmp_path):
    """From ln 2 on."""
    pairs, loss = _pairs(), LossConfig(beta=BETA)
    ours, theirs = _ours(pairs, loss, STEPS), _theirs(pairs, loss, STEPS, tokenizer_dir, tmp_path)
    assert len(ours) == len(theirs) == STEPS
    assert ours[0] == pytest.approx(np.log(2), abs=1e-6)
    assert max(abs(one - np.log(2)) for one in ours[1:]) > 1e-2  # it moves
    assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "sigmoid"])
def test_every_variant_takes_the_steps_of_trl(tokenizer_dir, tmp_path, variant):
    pairs, loss = _pairs(), LossConfig(variant, BETA, label_smoothing=0.1 if variant == "robust" else 0.0)
    ours, theirs = _ours(pairs, loss, 3), _theirs(pairs, loss, 3, tokenizer_dir, tmp_path)
    assert ours == pytest.approx(theirs, abs=1e-4)
