"""The instruction-tuning configurations that come with the project."""

from pathlib import Path

import pytest

from solar_mega.config.load import load_config
from solar_mega.config.sft import SFTConfig
from solar_mega.data.instructions import specs_of

CONFIGS = Path(__file__).parents[2] / "configs"
SAMPLES = {"alpaca": 52_000, "openorca": 100_000, "plain": 52_000}
"""The paper's Table 1; plain is Synth. Math-Instruct."""
VERSIONS = {
    "v1": ["alpaca"],
    "v2": ["alpaca", "openorca"],
    "v3": ["alpaca", "openorca", "plain"],
    "v4": ["alpaca", "plain"],
}
"""Table 3."""


@pytest.mark.parametrize("version", VERSIONS)
def test_data_of_the_paper_s_versions(version) -> None:
    cfg = load_config(SFTConfig, CONFIGS / "solar_10_7b" / f"3_sft_{version}.toml")
    train, _ = specs_of(cfg.data.train, cfg.data.valid)
    assert {spec.format: spec.samples for spec in train} == {
        name: SAMPLES[name] for name in VERSIONS[version]
    }
    assert cfg.data.template == "alpaca" and cfg.output.dir.name == f"3_sft_{version}"


def test_the_tiny_twin_holds_out_what_it_does_not_train_on() -> None:
    cfg = load_config(SFTConfig, CONFIGS / "tiny" / "3_sft.toml")
    (train,), (valid,) = specs_of(cfg.data.train, cfg.data.valid)
    assert train.path == valid.path and train.rows[1] == valid.rows[0]
