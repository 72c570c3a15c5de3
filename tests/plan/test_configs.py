"""Every configuration in the repository: read by its verb, planned where it trains, and dry-run on inputs
that have the real shapes (weights are holes in sparse files)."""

import json
import re
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest

from solar_mega.__main__ import main
from solar_mega.config.kinds import KINDS, config_class, kind_of
from solar_mega.config.load import load_config

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = ("tiny", "solar_10_7b")
"""Directories of configurations; configs/ablations holds the data of `solar-mega tables`, tested there."""

CONFIGS = sorted(
    path.relative_to(ROOT / "configs")
    for family in FAMILIES
    for path in (ROOT / "configs" / family).glob("*.toml")
)
TRAININGS = [name for name in KINDS if "parallel" in config_class(name).__dataclass_fields__]
OVERRIDES = re.compile(r"^#\s+(\d+) GPUs:\s+(--.+)$", re.MULTILINE)
"""`#     8 GPUs:   --parallel.pp 4 ...` in a configuration's comment: another cluster's layout."""

CLUSTER = re.compile(r"\bon (\d+) (?:GPUs|H100s)")
"""The cluster that a configuration of the 10.7B model says it is for."""

DEPTH = {"tiny": (8, 12), "solar_10_7b": (32, 48)}
"""Layers before and after growth."""

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="sparse files")


def _model_directory(place: Path, family: str, layers: int, tokenizer: Path) -> None:
    """A Hugging Face directory of the family's shape: headers, a hole for the weights, a tokenizer."""
    from solar_mega.checkpoint.names import hf_shapes
    from solar_mega.model.architecture import Architecture

    if place.exists():
        return
    place.mkdir(parents=True)
    config = json.loads((ROOT / "configs" / family / "model" / "config.json").read_text())
    config["num_hidden_layers"] = layers
    (place / "config.json").write_text(json.dumps(config))
    for file in tokenizer.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    header, offset = {}, 0
    for name, shape in hf_shapes(Architecture.from_hf(config)).items():
        size = 2
        for extent in shape:
            size *= extent
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with open(place / "model.safetensors", "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + offset)


class Workspace:
    """A directory in which the configurations' relative paths are made as they are asked for."""

    def __init__(self, root: Path) -> None:
        from solar_mega.data.train_tokenizer import train_sentencepiece

        self.root = root
        text = (Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_text()
        (root / "text.txt").write_text(text * 4)
        self.tokenizer = train_sentencepiece([text], 512, root / "tokenizer")

    def prepare(self, config: Path, verb: str) -> None:
        """The inputs that `config` names."""
        cfg = load_config(config_class(verb), ROOT / "configs" / config)
        prepare = {
            "convert": self._convert,
            "pretrain": self._pretrain,
            "sft": self._tuning,
            "dpo": self._preferences,
            "merge": self._merge,
        }
        prepare[verb](config.parts[0], cfg)

    def _convert(self, family: str, cfg) -> None:
        self.model(cfg.src, family, DEPTH[family][0])
        shutil.rmtree(self.root / cfg.dst, ignore_errors=True)  # another configuration's input

    def _pretrain(self, family: str, cfg) -> None:
        grown = cfg.model.weights == "pretrained" and cfg.model.layer_map == "identity"
        self.model(cfg.model.path, family, DEPTH[family][grown])
        for corpus in (*cfg.data.train, *cfg.data.valid):
            self.corpus(Path(corpus.split()[-1]))

    def _tuning(self, family: str, cfg) -> None:
        self.model(cfg.model.path, family, DEPTH[family][1])
        for source in (*cfg.data.train, *cfg.data.valid):
            self.conversations(*source.split()[:2])

    def _preferences(self, family: str, cfg) -> None:
        self.model(cfg.model.path, family, DEPTH[family][1])
        for chunk in (*cfg.ladder.chunks, *cfg.data.train, *cfg.data.valid):
            for source in chunk.split(" + "):
                self.pairs(Path(source.split()[1]), source)

    def pairs(self, path: Path, source: str) -> None:
        """Preference pairs with the fields of every format, in the file or directory that is asked for."""
        question = {"role": "user", "content": "1 + 2?"}
        chosen, rejected = ([question, {"role": "assistant", "content": answer}] for answer in "34")
        listed = "ultrafeedback" in source.split()[0]
        rows = [
            {
                "id": str(i),
                "prompt_id": str(i),
                "prompt": f"{i} + 2?",
                "question": f"{i} + 2?",
                "system": "",
                "chosen": chosen if listed else "3",
                "rejected": rejected if listed else "4",
                "score_chosen": 2.0,
                "score_rejected": 1.0,
                "source": "sums",
            }
            for i in range(300)
        ]
        split = next((word[6:] for word in source.split() if word.startswith("split=")), None)
        place = self.root / path
        if split is not None:
            place.mkdir(parents=True, exist_ok=True)
            place = place / f"{split}.jsonl"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def _merge(self, family: str, cfg) -> None:
        for path in (*cfg.models, *([cfg.base] if cfg.base else [])):
            self.model(path, family, DEPTH[family][1])
        shutil.rmtree(self.root / cfg.out, ignore_errors=True)

    def conversations(self, kind: str, path: str) -> None:
        """A data set of the repository, or one of that format in its place."""
        place = self.root / path
        if place.exists():
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / path).exists():
            place.symlink_to(ROOT / path)
            return
        row = {
            "alpaca": {"instruction": "Add 1 and 2.", "input": "", "output": "3"},
            "openorca": {"system_prompt": "", "question": "1 + 2?", "response": "3"},
            "plain": {"prompt": "1 + 2?", "question": "1 + 2?", "response": "3", "answer": "3"},
            "metamath": {"type": "MATH_Rephrased", "query": "1 + 2?", "response": "3"},
        }[kind]
        rows = [{**row, "id": str(i)} for i in range(20)]
        if place.suffix == ".json":
            place.write_text(json.dumps(rows))
        elif place.suffix == ".jsonl":
            place.write_text("".join(json.dumps(one) + "\n" for one in rows))
        else:
            from datasets import Dataset

            Dataset.from_list(rows).to_parquet(place if place.suffix else place / "train.parquet")

    def model(self, path: Path, family: str, layers: int) -> None:
        _model_directory(self.root / path, family, layers, self.root / "tokenizer")

    def corpus(self, prefix: Path) -> None:
        from solar_mega.data.tokenize import tokenize

        place = self.root / prefix
        if not place.with_name(place.name + ".idx").exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            tokenize([str(self.root / "text.txt")], self.tokenizer, place, workers=1)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("workspace"))


def _name(path: Path) -> str:
    return path.as_posix()


def test_both_families_tell_the_same_story():
    """Each stage of the cluster has a twin that runs on a CPU; the base is only trained in the small."""
    stages = {family: {path.name[:2] for path in CONFIGS if path.parts[0] == family} for family in DEPTH}
    assert stages["solar_10_7b"] <= stages["tiny"]
    assert all(re.match(r"\d_[a-z0-9_]+\.toml$", path.name) for path in CONFIGS)


@pytest.mark.parametrize("config", CONFIGS, ids=_name)
def test_a_configuration_belongs_to_its_verb(config):
    path = ROOT / "configs" / config
    load_config(config_class(kind_of(path)), path)


def _plans() -> list[tuple[Path, int | None, list[str]]]:
    found = []
    for config in CONFIGS:
        if kind_of(ROOT / "configs" / config) not in TRAININGS:
            continue
        text = (ROOT / "configs" / config).read_text()
        gpus = CLUSTER.search(text) if config.parts[0] == "solar_10_7b" else None
        found.append((config, int(gpus[1]) if gpus else None, []))
        for gpus, words in OVERRIDES.findall(text):
            found.append((config, int(gpus), words.split()))
    return found


@pytest.mark.parametrize(("config", "gpus", "words"), _plans(), ids=lambda value: str(value))
def test_trainings_are_planned_and_fit(config, gpus, words, workspace, monkeypatch, capsys):
    monkeypatch.chdir(workspace.root)
    path = ROOT / "configs" / config
    workspace.prepare(config, kind_of(path))
    size = [] if gpus is None else ["--gpus", str(gpus)]
    assert main(["plan", "--config", str(path), *size, *words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] and plan["bubble"] < 0.25
    if config.parts[0] == "solar_10_7b":
        assert plan["parameters"] == 10_731_524_096


@pytest.mark.parametrize("config", CONFIGS, ids=_name)
def test_dry_runs(config, workspace, monkeypatch, capsys):
    monkeypatch.chdir(workspace.root)
    path = ROOT / "configs" / config
    verb = kind_of(path)
    if verb in ("evaluate", "contamination"):
        pytest.skip(f"{verb} has no dry run; its configuration is read by the test above")
    workspace.prepare(config, verb)
    assert main([verb, "--config", str(path), "--dry-run"]) == 0
    assert capsys.readouterr().out


def test_a_file_of_nobody_is_refused(tmp_path, capsys):
    (tmp_path / "x.toml").write_text("[kitchen]\nsink = 1\n")
    assert main(["plan", "--config", str(tmp_path / "x.toml")]) == 2
    assert "not a configuration of convert, pretrain, sft" in capsys.readouterr().err
