import json
import sysconfig
from pathlib import Path

import pytest

from solar_mega.data.tokenizer import Tokenizer, load_tokenizer
from solar_mega.data.train_tokenizer import train_sentencepiece

LIBRARY = Path(sysconfig.get_paths()["stdlib"])


@pytest.fixture(scope="session")
def sources() -> list[str]:
    """Real Python source: the top-level modules of the standard library, about 5 MB."""
    return [path.read_text(encoding="utf-8") for path in sorted(LIBRARY.glob("*.py"))]


@pytest.fixture(scope="session")
def tokenizer_dir(sources, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer") / "tok"
    train_sentencepiece(sources, 1024, directory, max_bytes=500_000)
    return directory


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir) -> Tokenizer:
    """The SentencePiece face: no transformers import."""
    return load_tokenizer(tokenizer_dir / "tokenizer.model")


@pytest.fixture(scope="session")
def hf_tokenizer(tokenizer_dir) -> Tokenizer:
    return load_tokenizer(tokenizer_dir)


@pytest.fixture
def write_jsonl(tmp_path):
    def write(name: str, texts: list[str]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        return path

    return write


from tests.align.conftest import pair_inputs  # noqa: E402, F401 (a fixture)
