"""`--preview` of the verbs that train on text: samples of each data set, as they are trained on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from solar_mega.config.command_line import RunOptions
from solar_mega.config.dpo import PairDataConfig
from solar_mega.config.schema import ModelConfig
from solar_mega.config.sft import SFTDataConfig
from solar_mega.runtime.console import say

if TYPE_CHECKING:
    from solar_mega.data.chat import ChatTemplate
    from solar_mega.data.rows import DatasetSpec
    from solar_mega.data.tokenizer import Tokenizer

Sample = TypeVar("Sample")


@dataclass(frozen=True)
class PreviewOptions(RunOptions):
    preview: int = 0
    """Print this many samples of each data set as they are trained on, what is in the loss between ⟦ and ⟧
    and what is cut between ✂ and ✂, and stop."""


def open_template(
    data: SFTDataConfig | PairDataConfig, model: ModelConfig
) -> "tuple[Tokenizer, ChatTemplate]":
    """What `data.tokenizer` and `data.template` name. Raises UserError."""
    from solar_mega.checkpoint.source import open_source
    from solar_mega.data.chat import load_template
    from solar_mega.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(data.tokenizer or open_source(model.path).side_files)
    return tokenizer, load_template(data.template, tokenizer)


def show(
    specs: "Sequence[DatasetSpec]",
    count: int,
    read: "Callable[[DatasetSpec], tuple[list[Sample], Any]]",
    draw: Callable[[Sample], str],
    name: Callable[[Sample], str],
) -> None:
    """The report on each data set that `read` gives, and its first `count` samples as `draw` has them; those
    that cannot be trained on with the reason. `name` tells a sample by its place."""
    from solar_mega.data.chat import BadConversation
    from solar_mega.data.preferences import Unusable

    for spec in specs:
        samples, report = read(spec)
        say(report.describe())
        for sample in samples[:count]:
            try:
                say("\n" + draw(sample))
            except (BadConversation, Unusable) as fault:
                say(f"\n{name(sample)}: left out: {fault}\n")
