import json
import os
import pickle
import subprocess
import sys

import pytest

from solar_mega.data.tokenizer import check_vocabulary, load_tokenizer
from solar_mega.data.train_tokenizer import train_sentencepiece
from solar_mega.errors import UserError

AWKWARD = [
    "\t\tx = 1\n\n\n   \n",
    "  leading and trailing  ",
    "a\r\nb\r\n",
    "    " * 50 + "pass",
    "Größe naïve 你好 \U0001f642\U0001f642 \u200b\ufeff \u0000",
    "<s> </s> <unk> <0x41> [INST]",
    " ",
    "\n",
]


def test_source_code_comes_back_exactly_from_both_faces(tokenizer, hf_tokenizer, sources):
    for text in sources + AWKWARD:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert hf_tokenizer.decode(ids) == text


def test_transformers_and_sentencepiece_give_the_same_ids(tokenizer, hf_tokenizer, tokenizer_dir, sources):
    from transformers import AutoTokenizer

    automatic = AutoTokenizer.from_pretrained(tokenizer_dir, local_files_only=True)
    texts = sources + AWKWARD
    expected = tokenizer.encode_batch(texts)
    assert hf_tokenizer.encode_batch(texts) == expected
    for text, ids in zip(texts, expected, strict=True):
        plain = automatic.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert plain == ids
        assert automatic.decode(ids) == text
    assert len(automatic) == tokenizer.vocab_size == 1024
    assert (automatic.eos_token_id, automatic.bos_token_id) == (tokenizer.eos_id, tokenizer.bos_id) == (2, 1)


def test_the_directory_of_a_llama_model_is_read_the_same_way(tokenizer, tokenizer_dir, tmp_path):
    """transformers chooses the class by the model's type when it can; the ids must not depend on that."""
    for file in tokenizer_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 1024}))
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode("    return  x\n") == tokenizer.encode("    return  x\n")
    assert loaded.fingerprint == tokenizer.fingerprint


def test_special_tokens_in_text_are_text_unless_asked_for(hf_tokenizer, tokenizer_dir):
    text = "a</s>b"
    assert hf_tokenizer.eos_id not in hf_tokenizer.encode(text)
    assert load_tokenizer(tokenizer_dir, parse_special=True).encode(text).count(hf_tokenizer.eos_id) == 1
    with pytest.raises(UserError, match="--parse-special-tokens"):
        load_tokenizer(tokenizer_dir / "tokenizer.model", parse_special=True)


def test_training_is_deterministic_and_fingerprints_tell_tokenizers_apart(
    tokenizer, hf_tokenizer, tokenizer_dir, sources, tmp_path
):
    again = train_sentencepiece(sources, 1024, tmp_path / "again", max_bytes=500_000)
    for name in ("tokenizer.model", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tokenizer_dir / name).read_bytes()
    other = train_sentencepiece(sources[5:], 1024, tmp_path / "other", max_bytes=100_000)
    assert again.fingerprint == tokenizer.fingerprint == hf_tokenizer.fingerprint != other.fingerprint


def test_whitespace_is_learnt(tokenizer):
    """Indentation and line ends are what source code consists of."""
    assert len(tokenizer.encode("        ")) <= 2
    assert len(tokenizer.encode("):\n")) == 1


def test_workers_get_a_tokenizer_without_importing_transformers_or_torch(hf_tokenizer, tokenizer, tmp_path):
    for each in (hf_tokenizer, tokenizer):
        (tmp_path / "pickle").write_bytes(pickle.dumps(each))
        code = (
            "import pickle, sys; t = pickle.load(open(sys.argv[1], 'rb')); print(t.encode('def f():\\n'));"
            "assert not {'torch', 'transformers', 'megatron'} & set(sys.modules)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "pickle")],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == each.encode("def f():\n")


def test_vocabulary_mismatch_names_both_numbers(tokenizer):
    check_vocabulary(tokenizer, 1024)
    check_vocabulary(tokenizer, 1030)
    with pytest.raises(UserError, match=r"1024 tokens.*only 1000"):
        check_vocabulary(tokenizer, 1000)


def test_errors(tmp_path, tokenizer_dir):
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no tokenizer in this directory"):
        load_tokenizer(tmp_path)
    (tmp_path / "broken.model").write_bytes(b"not a proto at all")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path / "broken.model")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be loaded by transformers"):
        load_tokenizer(broken)
    with pytest.raises(UserError, match="vocab_size = 100 is too small"):
        train_sentencepiece(["abc"], 100, tmp_path / "t")
    with pytest.raises(UserError, match="cannot be trained on 3 characters"):
        train_sentencepiece(["abc"], 1000, tmp_path / "t")
    with pytest.raises(UserError, match="no text"):
        train_sentencepiece([""], 1000, tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_a_tokenizer_without_eos_is_refused(tmp_path, tokenizer_dir):
    for file in tokenizer_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.model").unlink()
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match='no end-of-sequence token.*"eos_token"'):
        load_tokenizer(tmp_path)
