"""The probe against models that were really grown and run by transformers."""

import json

import pytest
import torch

from solar_mega.__main__ import main
from solar_mega.artifact.grow import grow
from solar_mega.artifact.hf import HFDirectory
from solar_mega.checkpoint.items import CheckpointTensors
from solar_mega.checkpoint.source import open_source
from solar_mega.checkpoint.views import MegatronView
from solar_mega.depth.layer_map import LayerMap
from solar_mega.errors import UserError
from solar_mega.evaluate.probe import Probe, Text, probe, work
from solar_mega.evaluate.probe_layers import Layers
from solar_mega.evaluate.probe_report import suggest
from solar_mega.model.architecture import Architecture
from tests.families import make_family
from tests.train.tiny import one_rank

DEPTH, WINDOWS, LENGTH, VOCABULARY = 6, 3, 20, 96
MAPS = (
    *(f"dus:{m}" for m in range(4)),
    "stack:2",
    "interleave:2",
    "repeat:1-4x3",
    "llama-pro:3",
    "mean",
    "5,0,2~3,1,4",
    "dus:2+scale:0.5@copies",
    "dus:1+noise:0.02:7@copies",
)


def text() -> Text:
    ids = torch.randint(0, VOCABULARY, (WINDOWS, LENGTH + 1), generator=torch.Generator().manual_seed(5))
    return Text(ids[:, :-1], ids[:, 1:])


def run(directory, maps=MAPS, resident=DEPTH, micro_batch=2) -> tuple[Probe, list[LayerMap]]:
    source = HFDirectory(directory)
    arch = Architecture.from_hf(source.config)
    layer_maps = [LayerMap.parse(spelling, DEPTH) for spelling in maps]
    with one_rank():
        layers = Layers(source.tensors, arch, "fp32", resident, LENGTH)
        return probe(layers, text(), layer_maps, micro_batch), layer_maps


def by_transformers(directory) -> tuple[float, list[torch.Tensor]]:
    """(loss, the input of every layer and the output of the last, before the final norm)."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    last = []
    model.model.layers[-1].register_forward_hook(
        lambda module, args, output: last.append(output[0] if isinstance(output, tuple) else output)
    )
    words = text()
    with torch.no_grad():
        result = model(words.tokens, output_hidden_states=True)
    loss = torch.nn.functional.cross_entropy(result.logits.flatten(0, 1).double(), words.labels.flatten())
    return loss.item(), [*result.hidden_states[:-1], last[0]]


def _averages(spelling: str) -> bool:
    return "~" in spelling or spelling == "mean"


@pytest.fixture(scope="module", params=["llama_mha", "llama3", "mistral_window", "qwen2_windows", "qwen3"])
def family(request, tmp_path_factory):
    return make_family(request.param, tmp_path_factory.mktemp("probe"), layers=DEPTH)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_family("llama_mha", tmp_path_factory.mktemp("probe"), layers=DEPTH)


def test_losses_and_seams_are_those_of_grown_models(family, tmp_path):
    # means of a layer with a window and one without do not exist
    maps = [spelling for spelling in MAPS if family.name != "qwen2_windows" or not _averages(spelling)]
    found, layer_maps = run(family, maps)
    _, source_states = by_transformers(family)
    for facts, layer_map in zip(found.maps, layer_maps, strict=True):
        target = tmp_path / facts.spelling.replace(":", "_")
        grow(HFDirectory(family), target, layer_map)
        loss, states = by_transformers(target)
        assert facts.loss == pytest.approx(loss, abs=1e-4), facts.spelling
        expected = [seam for seam in layer_map.seams if seam.after is not None]
        assert [seam.position for seam in facts.seams] == [seam.position for seam in expected]
        for seam in facts.seams:
            arriving, seen = states[seam.position], source_states[seam.after]
            cosine = torch.cosine_similarity(arriving, seen, dim=-1).mean().item()
            ratio = (arriving.norm(dim=-1) / seen.norm(dim=-1)).mean().item()
            distance = ((arriving - seen).norm(dim=-1) / seen.norm(dim=-1)).mean().item()
            found_here = (seam.cosine, seam.norm_ratio, seam.distance)
            assert found_here == pytest.approx((cosine, ratio, distance), abs=1e-4, rel=1e-4)


def test_layers_of_the_source(family):
    found, _ = run(family, maps=())
    loss, states = by_transformers(family)
    assert found.loss == pytest.approx(loss, abs=1e-4)
    assert [layer.layer for layer in found.layers] == list(range(DEPTH))
    for layer in found.layers:
        before, after = states[layer.layer], states[layer.layer + 1]
        cosine = torch.cosine_similarity(before, after, dim=-1).mean().item()
        update = ((after - before).norm(dim=-1) / before.norm(dim=-1)).mean().item()
        assert (layer.cosine, layer.update) == pytest.approx((cosine, update), abs=1e-5, rel=1e-4)
        assert layer.norm == pytest.approx(before.norm(dim=-1).mean().item(), rel=1e-5)


def test_maps_that_keep_the_function_cost_nothing(llama):
    found, _ = run(llama, maps=("dus:3", "llama-pro:2", "identity"))
    assert [facts.loss for facts in found.maps] == [found.loss] * 3, "the same arithmetic, bit for bit"


@pytest.mark.parametrize("resident", [1, 2])
@pytest.mark.parametrize("kind", ["llama_mha", "qwen2_windows"])
def test_streaming_from_the_disk_changes_nothing(tmp_path, kind, resident):
    directory = make_family(kind, tmp_path, layers=DEPTH)
    maps = [spelling for spelling in MAPS if kind == "llama_mha" or not _averages(spelling)]
    whole, maps = run(directory, maps)
    streamed, _ = run(directory, maps=[str(layer_map) for layer_map in maps], resident=resident)
    assert (streamed.loss, streamed.layers, streamed.maps) == (whole.loss, whole.layers, whole.maps)
    assert whole.applied == streamed.applied == work(DEPTH, maps)


def test_a_scan_over_m_reads_the_weights_twice(llama):
    scan = tuple(f"dus:{m}" for m in range(DEPTH))
    streamed, maps = run(llama, maps=scan, resident=1)
    assert streamed.fetched <= 2 * DEPTH
    grown = sum(len(layer_map) for layer_map in maps)
    # dus:3 is the source: nothing is left to do. Every other m runs its second copy only.
    assert streamed.applied == DEPTH + sum(DEPTH - m for m in range(DEPTH) if m != 3) < grown


def test_fresh_layers_cannot_be_probed(llama):
    with one_rank(), pytest.raises(UserError, match="are fresh"):
        probe(None, text(), [LayerMap(DEPTH, (0, None, 1))])


def test_a_megatron_checkpoint_is_probed_alike(llama, tmp_path):
    """As `convert` writes it, and read through the packed parameters."""
    checkpoint = tmp_path / "megatron"
    assert main(["convert", str(llama), str(checkpoint), "--to", "megatron"]) == 0
    source = open_source(checkpoint)
    arch = Architecture.from_hf(source.config)
    maps = [LayerMap.parse(spelling, DEPTH) for spelling in MAPS]
    with one_rank():
        view = MegatronView(CheckpointTensors(source.path), arch)
        layers = Layers(view, arch, "fp32", 1, LENGTH)
        found = probe(layers, text(), maps)
    expected, _ = run(llama)
    for facts, other in zip(found.maps, expected.maps, strict=True):
        assert facts.loss == pytest.approx(other.loss, abs=1e-6), facts.spelling


class TestSuggestion:
    def test_the_knee(self):
        # excess 1, 0.9, 0.2, 0.1 for 8, 6, 4, 2 added layers: m = 2 keeps half the layers for a fifth
        found = suggest(8, 2.0, [(0, 3.0), (1, 2.9), (2, 2.2), (3, 2.1), (4, 2.0)])
        assert found.m == 2
        assert found.scores[2] == pytest.approx(0.5 - 0.2)
        assert "keeps 50%" in found.reason and "20% of its excess loss" in found.reason

    @pytest.mark.parametrize(
        "losses, said",
        [
            ([(0, 3.0)], "at least two m"),
            ([(0, 1.9), (1, 1.9)], "costs nothing"),
            ([(0, 3.0), (1, 2.95), (2, 2.9), (3, 2.8)], "every m is as good"),
        ],
    )
    def test_no_m_stands_out(self, losses, said):
        found = suggest(8, 2.0, losses)
        assert found.m is None and said in found.reason


@pytest.fixture(scope="module")
def tokenised(tmp_path_factory):
    """A model with a tokenizer, and a text."""
    from solar_mega.data.train_tokenizer import train_sentencepiece

    place = tmp_path_factory.mktemp("tokenised")
    words = [f"the {a} sees the {b} and the {c}\n" for a in "abcdef" for b in "ghij" for c in "klm"]
    directory = make_family("llama_mha", place, layers=DEPTH)
    trained = train_sentencepiece(words, 280, place / "tokenizer")
    config = json.loads((directory / "config.json").read_text())
    assert trained.vocab_size > config["vocab_size"], "so that the model's own would be refused"
    (place / "text.txt").write_text("".join(words))
    return directory, place / "tokenizer", place / "text.txt"


def test_command_line(tmp_path, capsys, tokenised):
    import transformers

    _, tokenizer, sample = tokenised
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    words = ["probe", str(tmp_path / "model"), "--text", str(sample), "--tokenizer", str(tokenizer)]
    words += ["--rivals", "stack:2,slices:0-3,1-4", "--m", "0,1,2", "--tokens", "300", "--seq-length", "32"]
    words += ["--threads", "1", "--out", str(tmp_path / "probe.json")]
    threads = torch.get_num_threads()
    try:
        assert main(words) == 0
    finally:
        torch.set_num_threads(threads)
    report = json.loads((tmp_path / "probe.json").read_text())
    assert [entry["m"] for entry in report["dus"]] == [0, 1, 2]
    assert [entry["map"] for entry in report["rivals"]] == ["stack:2", "slices:0-3,1-4"]
    assert report["dus"][0]["loss"] == report["rivals"][0]["loss"], "dus:0 is stack:2"
    assert report["dus"][1]["loss"] == report["rivals"][1]["loss"]
    assert report["windows"] * report["seq_length"] <= 300 and report["seq_length"] == 32
    assert (tmp_path / "probe.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "loss at step 0" in printed and "before any training" in printed


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--m", "0,9"], "--m 9: must be whole numbers from 0 to 5"),
        (["--rivals", "interlave:2"], "did you mean"),
        (["--tokens", "1"], "--tokens 1"),
        (["--text", "none.txt"], "none.txt"),
    ],
)
def test_bad_input(tokenised, flags, said, capsys):
    directory, tokenizer, sample = tokenised
    words = ["probe", str(directory), "--text", str(sample), "--tokenizer", str(tokenizer), *flags]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert said in error or "has only 96" in error, error


def test_a_tokenizer_of_another_model(tokenised, capsys):
    directory, tokenizer, sample = tokenised
    assert main(["probe", str(directory), "--text", str(sample), "--tokenizer", str(tokenizer)]) == 2
    assert "vocab_size" in capsys.readouterr().err
