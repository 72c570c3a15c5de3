"""Our model from a Hugging Face directory computes what transformers computes, on one rank and on TP2 x
PP2.
"""

import pytest
import torch

from solar_mega.artifact.grow import grow
from solar_mega.artifact.hf import HFDirectory
from solar_mega.artifact.verify import verify
from solar_mega.depth.layer_map import LayerMap
from tests.distributed import run_ranks
from tests.families import FAMILIES, make_family, transformers_logits
from tests.ranks import layout, pipeline_logits

TOLERANCE = 1e-4
MAPS = ("identity", "dus:1")


def _on_ranks(directories, out, tp, pp):
    """For each family and map: logits, bytes read against bytes held; each family exported again."""
    from solar_mega.artifact.hf import HFDirectory
    from solar_mega.checkpoint.from_hf import check_source, load_weights
    from solar_mega.checkpoint.to_hf import export_hf
    from solar_mega.model.architecture import Architecture
    from solar_mega.model.builder import build_model

    results = {}
    with layout(tp, pp) as parallel:
        for family, path in directories.items():
            for spelling in MAPS:
                reader = HFDirectory(path).tensors
                base = Architecture.from_hf(HFDirectory(path).config)
                check_source(reader, base, str(path))
                layer_map = LayerMap.parse(spelling, base.num_layers)
                arch = base.grown(layer_map)
                if arch.num_layers % pp:
                    continue
                chunks = build_model(arch, parallel, "fp32")
                load_weights(chunks, reader, base, layer_map, parallel)
                held = sum(p.numel() * p.element_size() for chunk in chunks for p in chunk.parameters())
                logits = pipeline_logits(chunks, parallel)
                results[family, spelling] = (logits, reader.bytes_read, held)
                export_hf(
                    chunks,
                    arch,
                    parallel,
                    out / f"{family}-{spelling}-tp{tp}pp{pp}",
                    side_files=path,
                    dtype=torch.float32,
                    shard_size="30KB",
                    lineage={"stage": "test", "parent": str(path), "layer_map": layer_map.to_json()},
                )
    return results


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {name: make_family(name, root) for name in FAMILIES}


@pytest.fixture(scope="module")
def grown(directories, tmp_path_factory):
    """Every family through every map by moving bytes: what transformers is asked to load."""
    root, result = tmp_path_factory.mktemp("grown"), {}
    for name, path in directories.items():
        for spelling in MAPS:
            result[name, spelling] = root / f"{name}-{spelling}"
            grow(HFDirectory(path), result[name, spelling], LayerMap.parse(spelling, 4))
    return result


@pytest.fixture(scope="module")
def expected(grown):
    return {key: transformers_logits(path) for key, path in grown.items()}


@pytest.fixture(scope="module", params=[(1, 1), (2, 2)], ids=["tp1", "tp2pp2"])
def runs(request, directories, tmp_path_factory):
    tp, pp = request.param
    out = tmp_path_factory.mktemp(f"exports-tp{tp}pp{pp}")
    return tp, pp, out, run_ranks(_on_ranks, tp * pp, directories, out, tp, pp)


def test_logits_equal_transformers(runs, expected):
    tp, pp, _, results = runs
    for key, reference in expected.items():
        logits = [result[key][0] for result in results if result[key][0] is not None]
        assert len(logits) == tp, key
        for mine in logits:
            assert mine.shape == reference.shape
            assert (mine - reference).abs().max() < TOLERANCE, key
    spread = torch.stack([logits.std() for logits in expected.values()])
    assert spread.min() > 0.1  # the tolerance means something


def test_each_rank_reads_exactly_what_it_holds(runs):
    for result in runs[3]:
        for key, (_, read, held) in result.items():
            assert read == held, key


def test_round_trip_is_bit_identical(runs, directories):
    tp, pp, out, _ = runs
    for family, path in directories.items():
        for spelling in MAPS:
            exported = HFDirectory(out / f"{family}-{spelling}-tp{tp}pp{pp}")
            report = verify(HFDirectory(path), exported, LayerMap.parse(spelling, 4))
            assert report.ok, report.describe()
            assert report.tensors == len(exported.tensors.infos)
            assert exported.config["dtype"] == "float32"


def test_exports_load_in_transformers(runs, expected):
    tp, pp, out, _ = runs
    for key in (("llama3", "dus:1"), ("mistral_window", "identity")):
        again = transformers_logits(out / f"{key[0]}-{key[1]}-tp{tp}pp{pp}")
        assert torch.equal(again, expected[key])
