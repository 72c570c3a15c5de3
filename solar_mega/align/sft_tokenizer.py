"""The tokenizer that an instruction-tuned model is exported with: its own, with the chat template it was
tuned with."""

import shutil
from pathlib import Path

from solar_mega.artifact.hf import SIDE_FILES, HFDirectory
from solar_mega.checkpoint.source import Source
from solar_mega.data.chat import ChatTemplate, write_template
from solar_mega.data.tokenizer import Tokenizer, load_tokenizer
from solar_mega.errors import UserError


def check_same_vocabulary(tokenizer: Tokenizer, model_directory: Path) -> None:
    """Raises UserError when `tokenizer` gives an id to another piece than the tokenizer in the model's own
    directory does: the model would read other words. Added tokens beyond its own are fine. A directory
    without a tokenizer says nothing."""
    try:
        own = load_tokenizer(model_directory)
    except UserError:
        return
    for id in range(own.vocab_size):
        mine, its = tokenizer.find_piece(id), own.find_piece(id)
        if mine != its:
            raise UserError(
                f"data.tokenizer = {tokenizer.path} is not the model's: token {id} is {mine!r} there and "
                f"{its!r} in {model_directory}; use the tokenizer the model was trained with"
            )


def write_tokenizer(
    place: Path, source: Source, given: Path | None, template: ChatTemplate, tokenizer: Tokenizer
) -> None:
    """Fills the directory `place` with the source's side files, those of the tokenizer directory `given` over
    them, and the chat template. What was there is written over."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    if (source.side_files / "config.json").is_file():
        shutil.copyfile(source.side_files / "config.json", place / "config.json")
        HFDirectory(source.side_files).copy_side_files(place)
    if given is not None and given.is_dir():
        for pattern in SIDE_FILES:
            for file in given.glob(pattern):
                shutil.copyfile(file, place / file.name)
    write_template(place, template, tokenizer)
