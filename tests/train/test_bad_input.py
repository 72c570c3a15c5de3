"""What is wrong with a run is said on one screen, with exit code 2, before anything is written."""

import json
import shutil

import pytest

from solar_mega.__main__ import main
from solar_mega.config.command_line import RunOptions, parse_run
from solar_mega.config.schema import PretrainConfig
from solar_mega.data.tokenize import tokenize
from solar_mega.data.tokenizer import load_tokenizer
from solar_mega.data.train_tokenizer import train_sentencepiece
from solar_mega.errors import UserError
from solar_mega.train.pretrain import prepare


@pytest.fixture
def refused(inputs, tmp_path, capsys):
    """Runs the verb with overrides and returns its message. A world of several is only imagined: `prepare`
    knows its size and starts nothing."""

    def refused(*more: str, world: int = 1, exists: bool = False) -> str:
        out = tmp_path / "run"
        words = inputs.words(out, *more)
        capsys.readouterr()
        if world > 1:
            _, cfg = parse_run(RunOptions, PretrainConfig, words[1:], "pretrain")
            with pytest.raises(UserError) as caught:
                prepare(cfg, world)
            error = str(caught.value)
        else:
            assert main(words) == 2
            error = capsys.readouterr().err
            assert error.startswith("solar-mega: ") and "Traceback" not in error
        assert len(error.splitlines()) <= 40
        assert exists or not out.exists()
        return error

    return refused


@pytest.fixture
def model(inputs, tmp_path):
    """A copy of the model to damage."""
    return shutil.copytree(inputs.model, tmp_path / "model")


def _edit_config(model, **changes) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))


def test_unknown_key(refused):
    error = refused("--train.stpes 5")
    assert "train.stpes" in error and "did you mean" in error and "train.steps" in error


@pytest.mark.parametrize(
    ("spelling", "given"),
    [("dus:4", "m = 4"), ("dus:9", "m = 9"), ("dus:-1", "dus:-1"), ("stack:0", "stack:0")],
)
def test_impossible_layer_map(refused, spelling, given):
    error = refused(f"--model.layer_map={spelling}")
    assert "model.layer_map" in error and given in error and "4" in error


@pytest.mark.parametrize(
    ("layout", "world", "complaint"),
    [
        ("--parallel.tp 3", 3, "parallel.tp = 3 does not divide the model's 4 attention heads"),
        ("--parallel.tp 3", 3, "parallel.tp = 3 does not divide the vocabulary of 512 tokens"),
        ("--parallel.pp 3", 3, "= 3 does not divide the grown model's 4 layers"),
        ("--parallel.pp 2 --parallel.vpp 3", 2, "parallel.pp * parallel.vpp = 2 * 3 = 6 does not divide"),
        ("--parallel.tp 2", 3, "world size 3 is not a multiple of parallel.tp * parallel.pp"),
        ("--parallel.dp 2 --parallel.tp 2", 2, "= 2 * 1 * 2 = 4; start 4 processes"),
        (
            "--train.seq_length 65",
            1,
            "train.seq_length = 65 exceeds the model's max_position_embeddings = 64",
        ),
    ],
)
def test_layouts_that_do_not_fit(refused, layout, world, complaint):
    assert complaint in refused("--train.global_batch_size 12 --train.eval_samples 12", layout, world=world)


def test_all_that_does_not_fit_is_said_at_once(refused):
    error = refused(
        "--train.global_batch_size 30 --train.eval_samples 30 --parallel.tp 3 --parallel.pp 3", world=9
    )
    for part in ("attention heads", "vocabulary", "layers", "key/value heads"):
        assert part in error


def test_missing_shard(refused, model):
    shard = sorted(model.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refused(f"--model.path {model}")


def test_truncated_shard(refused, model):
    shard = sorted(model.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-5])
    error = refused(f"--model.path {model}")
    assert shard.name in error and "5" in error


def test_wrong_shapes(refused, model):
    _edit_config(model, intermediate_size=56)
    error = refused(f"--model.path {model}")
    assert "gate_proj.weight has shape [48, 32]; config.json says [56, 32]" in error


def test_unsupported_architecture(refused, model):
    _edit_config(model, architectures=["GPT2LMHeadModel"], model_type="gpt2")
    error = refused(f"--model.path {model}")
    assert "GPT2LMHeadModel" in error and "LlamaForCausalLM" in error and "MistralForCausalLM" in error


def test_tokenizer_larger_than_the_vocabulary(refused, model, inputs):
    _edit_config(model, vocab_size=300)
    error = refused(f"--model.path {model} --model.weights random")
    assert "512 tokens" in error and "300" in error


def test_corpus_of_another_tokenizer(refused, inputs, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("def other(text): return text\n" * 400)
    other = train_sentencepiece([text.read_text()], 300, tmp_path / "other")
    tokenize([str(text)], other, tmp_path / "foreign", workers=1)
    error = refused(f"--data.train {tmp_path}/foreign")
    assert "data.train" in error and "another tokenizer" in error


def test_corpus_that_is_not_there(refused):
    error = refused("--data.train nowhere/text")
    assert "data.train" in error and "nowhere/text" in error


def test_corpus_shorter_than_a_sample(refused, inputs, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("x = 1\n")
    tokenize([str(text)], load_tokenizer(inputs.model), tmp_path / "short", workers=1)
    assert "fewer than one sample needs" in refused(f"--data.train {tmp_path}/short")


def test_empty_corpus_cannot_be_made(inputs, tmp_path, capsys):
    (tmp_path / "empty.txt").touch()
    words = f"tokenize {tmp_path}/empty.txt --tokenizer {inputs.model} --output {tmp_path}/empty"
    assert main(words.split()) == 2
    assert "solar-mega: no documents" in capsys.readouterr().err
    assert not list(tmp_path.glob("empty.bin")) and not list(tmp_path.glob("empty.idx"))


def test_model_that_is_not_there(refused, tmp_path):
    (tmp_path / "nothing").mkdir()
    assert "no such directory" in refused("--model.path gone")
    error = refused(f"--model.path {tmp_path}/nothing")
    assert "config.json" in error and "Megatron" in error


def test_never_over_a_run(refused, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    error = refused("--checkpoint.resume never", exists=True)
    assert "output.dir" in error and "already holds a run" in error
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_resume_must_find_something(refused):
    assert "holds no complete checkpoint" in refused("--checkpoint.resume must")


def test_dry_run_writes_nothing(inputs, tmp_path, capsys):
    words = inputs.words(tmp_path / "run", "--model.layer_map dus:1 --parallel.pp 2 --dry-run")
    assert main(words) == 0
    output = capsys.readouterr().out
    assert "6 layers" in output and "pp 2" in output and "[train]" in output
    assert not (tmp_path / "run").exists()
