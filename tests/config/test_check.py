"""Static checks of a pretraining configuration: each mistake alone, then many at once."""

from pathlib import Path

import pytest

from solar_mega.config.check import RANGES, check_pretrain
from solar_mega.config.fields import fields_of
from solar_mega.config.load import load_config
from solar_mega.config.schema import PretrainConfig
from solar_mega.config.units import parse_bytes
from solar_mega.errors import UserError


@pytest.fixture
def config(tmp_path):
    (tmp_path / "base").mkdir()
    words = [f"--model.path={tmp_path}/base", f"--output.dir={tmp_path}/run", "--data.train=text"]
    words += ["--train.steps=100", "--train.seq_length=128", "--train.global_batch_size=64"]

    def config(*overrides: str) -> PretrainConfig:
        return load_config(PretrainConfig, None, [*words, *overrides])

    return config


@pytest.mark.parametrize(
    ("world", "words"),
    [
        (1, ""),
        (4, "--parallel.tp 2"),
        (8, "--parallel.tp 2 --parallel.pp 2 --parallel.dp 2 --parallel.sequence_parallel"),
        (4, "--parallel.pp 2 --parallel.vpp 2 --train.micro_batch_size 4"),
        (1, "--schedule.kind wsd --schedule.warmup_steps 90 --schedule.decay_steps 10"),
        (1, "--schedule.kind constant --schedule.warmup_steps 100"),
        (2, "--parallel.overlap_grad_reduce --parallel.overlap_param_gather --parallel.bucket_size 1000"),
        (1, "--kernels.linear te --kernels.fp8 tensorwise --kernels.gradient_accumulation_fusion"),
        (
            2,
            "--parallel.tp 2 --parallel.sequence_parallel --parallel.tp_comm_overlap --kernels.linear te",
        ),
        (1, "--data.split 1 0 --data.valid other"),
        (1, "--data.split 1 0 --train.eval_samples 0"),
    ],
)
def test_good_ones_pass(config, world, words):
    check_pretrain(config(*words.split()), world)


@pytest.mark.parametrize(
    ("world", "words", "complaint"),
    [
        (3, "--parallel.tp 2", "world size 3 is not a multiple of parallel.tp * parallel.pp = 2 * 1 = 2"),
        (4, "--parallel.tp 2 --parallel.dp 1", "world size 4 is not parallel.tp * parallel.pp * parallel.dp"),
        (1, "--parallel.sequence_parallel", "parallel.sequence_parallel = true needs parallel.tp above 1"),
        (1, "--parallel.vpp 2", "parallel.vpp = 2 needs parallel.pp above 1; given 1"),
        (
            2,
            "--parallel.tp 2 --parallel.sequence_parallel --train.seq_length 127",
            "train.seq_length = 127 is",
        ),
        (1, "--train.micro_batch_size 3", "train.global_batch_size = 64 is not a multiple of"),
        (1, "--train.micro_batch_size 3", "nearest: 63 or 66"),
        (3, "--train.global_batch_size 66", "train.eval_samples = 64 is not a multiple of"),
        (
            2,
            "--parallel.pp 2 --parallel.vpp 2 --train.global_batch_size 63",
            "train.global_batch_size = 63 makes 63 micro-batches per rank",
        ),
        (1, "--optimizer.lr 1e-5 --optimizer.min_lr 1e-4", "optimizer.min_lr = 0.0001 is above optimizer.lr"),
        (1, "--schedule.warmup_steps 101", "schedule.warmup_steps = 101 is above train.steps = 100"),
        (1, "--schedule.warmup_steps 100", "leaves 0 of train.steps = 100 for the decay of schedule.kind"),
        (1, "--schedule.warmup_steps 95 --schedule.kind wsd", "which takes 10 or more"),
        (1, "--schedule.warmup_steps 9 --schedule.decay_steps 9", "schedule.decay_steps = 9 must be above"),
        (
            1,
            "--schedule.kind wsd --schedule.warmup_steps 60 --schedule.decay_steps 41",
            "schedule.warmup_steps + schedule.decay_steps = 60 + 41 is above train.steps = 100",
        ),
        (1, "--data.train", "data.train = []: name at least one corpus"),
        (1, "--data.split 0.9 0.2", "data.split = [0.9, 0.2]: must be two shares that sum to 1"),
        (1, "--data.split nan 0.2", "data.split = [nan, 0.2]"),
        (1, "--data.split 1 0", "nothing to validate on"),
        (1, "--data.tokenizer nowhere", "data.tokenizer = nowhere: no such file or directory"),
        (1, "--output.shard_size 5GX", "output.shard_size = '5GX' is not a size"),
        (1, "--train.steps 0", "train.steps = 0: must be at least 1"),
        (1, "--optimizer.lr nan", "optimizer.lr = nan: must be above 0"),
        (1, "--optimizer.lr inf", "optimizer.lr = inf: must be above 0"),
        (1, "--optimizer.beta2 1", "optimizer.beta2 = 1.0: must be at least 0 and below 1"),
        (1, "--checkpoint.keep 1", "checkpoint.keep = 1: must be at least 2"),
        (
            2,
            "--parallel.overlap_param_gather --parallel.distributed_optimizer false",
            "parallel.overlap_param_gather = true needs parallel.distributed_optimizer = true and "
            "parallel.overlap_grad_reduce = true",
        ),
        (2, "--parallel.bucket_size 9", "parallel.bucket_size = 9 needs parallel.overlap_grad_reduce = true"),
        (1, "--parallel.bucket_size 0 --parallel.overlap_grad_reduce", "parallel.bucket_size = 0: must be"),
        (1, "--kernels.fp8 mxfp8", 'kernels.fp8 = "mxfp8" needs kernels.linear = "te"; given "local"'),
        (
            1,
            "--kernels.fp8 blockwise --kernels.linear te --train.precision fp32",
            'kernels.fp8 = "blockwise" needs train.precision = "bf16"; given "fp32"',
        ),
        (
            1,
            "--kernels.fp8 mxfp8 --kernels.linear te --train.seq_length 144",
            'kernels.fp8 = "mxfp8" needs a multiple of 32 tokens on a rank; train.micro_batch_size * '
            "train.seq_length = 144",
        ),
        (
            2,
            "--parallel.tp_comm_overlap --parallel.tp 2",
            'parallel.tp_comm_overlap = true needs kernels.linear = "te" and parallel.sequence_parallel = '
            "true",
        ),
        (
            1,
            "--kernels.attention flash --train.precision fp32",
            'kernels.attention = "flash" computes in bf16 only; train.precision is "fp32"',
        ),
    ],
)
def test_each_mistake_is_named(config, world, words, complaint):
    with pytest.raises(UserError) as caught:
        check_pretrain(config(*words.split()), world)
    assert complaint in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3  # one mistake does not cause a flood


def test_places(config, tmp_path):
    (tmp_path / "file").touch()
    words = ["--model.path", "gone", f"--output.dir={tmp_path}/file", f"--data.cache={tmp_path}/file"]
    with pytest.raises(UserError) as caught:
        check_pretrain(config(*words), 1)
    for expected in ("model.path = gone", "output.dir =", "data.cache =", "3 problems"):
        assert expected in str(caught.value)


def test_many_mistakes_at_once(config):
    words = "--parallel.tp 2 --parallel.vpp 2 --train.micro_batch_size 3 --schedule.warmup_steps 101"
    with pytest.raises(UserError, match="5 problems"):
        check_pretrain(config(*words.split(), "--data.split", ".5", ".4"), 2)


def test_ranges_name_real_numeric_settings():
    fields = fields_of(PretrainConfig)
    for key in RANGES:
        assert key in fields, key
    numeric = {key for key, field in fields.items() if field.type in (int, float)}
    assert numeric <= set(RANGES)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("5 gb", 5 * 10**9),
        ("2GiB", 2 * 2**30),
        ("1.5KB", 1500),
        ("77", 77),
        ("10M", 10**7),
    ],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "5iB", "five", "0", "0.1"])
def test_sizes_refused(text):
    with pytest.raises(UserError, match="output.shard_size"):
        parse_bytes(text, "output.shard_size")


def test_configs_in_the_repository_load():
    for path in sorted((Path(__file__).parents[2] / "configs").rglob("*pretrain*.toml")):
        load_config(PretrainConfig, path)
