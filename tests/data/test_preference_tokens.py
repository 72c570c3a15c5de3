"""Which tokens of a pair count, and how pairs beyond the window are cut."""

import numpy as np
import pytest

from solar_mega.data.chat import Encoded, Message, load_template
from solar_mega.data.preference_tokens import (
    Lengths,
    Response,
    TokenReport,
    cut_to_length,
    fingerprint,
    last_turn,
    tokenize_pairs,
)
from solar_mega.data.preferences import Pair, PairReport, Unusable
from solar_mega.data.tokenizer import load_tokenizer

BOS = 1


def response(prompt: int, answer: int, bos: bool = True) -> Response:
    ids = np.arange(100, 100 + prompt + answer, dtype=np.int32)
    if bos:
        ids[0] = BOS
    return Response(ids, np.arange(len(ids)) >= prompt)


def cut(chosen, rejected, lengths=None):
    report = TokenReport()
    return cut_to_length(chosen, rejected, lengths or Lengths(20, 8), BOS, report), report


def test_what_fits_stays():
    pair, report = cut(response(15, 5), response(10, 2))
    assert (len(pair.chosen), len(pair.rejected)) == (20, 12)
    assert (report.prompts_cut, report.responses_cut) == (0, 0)


def test_a_long_prompt_keeps_bos_and_its_end():
    chosen = response(15, 6)
    pair, report = cut(chosen, response(15, 2))
    assert pair.chosen.ids.tolist() == [BOS, *range(108, 115), *range(115, 121)]
    assert pair.chosen.loss.tolist() == [False] * 8 + [True] * 6
    assert len(pair.rejected) == 8 + 2  # both responses see the same prompt
    assert (report.prompts_cut, report.responses_cut) == (1, 0)


def test_a_prompt_without_bos_keeps_only_its_end():
    pair, _ = cut(response(15, 6, bos=False), response(15, 6, bos=False))
    assert pair.chosen.ids.tolist() == list(range(107, 121))


def test_a_long_response_loses_its_end_and_fills_the_room():
    pair, report = cut(response(5, 30), response(15, 30))
    assert [len(pair.chosen), len(pair.rejected)] == [20, 20]
    assert [int(part.loss.sum()) for part in (pair.chosen, pair.rejected)] == [15, 12]
    assert (report.prompts_cut, report.responses_cut) == (1, 2)


def test_only_the_last_turn_counts():
    loss = np.array([0, 0, 1, 1, 0, 0, 1, 1, 1, 0], bool)
    last = last_turn(Encoded(np.arange(10, dtype=np.int32), loss))
    assert last.ids.tolist() == list(range(9))  # what follows the end of turn predicts nothing
    assert np.flatnonzero(last.loss).tolist() == [6, 7, 8]
    for empty in (np.zeros(4, bool), np.ones(4, bool)):
        with pytest.raises(Unusable):
            last_turn(Encoded(np.arange(4, dtype=np.int32), empty))


def test_pairs_become_the_templates_tokens(pair_inputs):
    """Decoded, prompt and response are the conversation; EOS ends it and counts."""
    tokenizer = load_tokenizer(pair_inputs.model)
    template = load_template("solar", tokenizer)
    prompt = (
        Message("system", ""),
        Message("user", "red?"),
        Message("assistant", "no"),
        Message("user", "blue?"),
    )
    pairs = [Pair(prompt, "yes", "no", "1", ""), Pair(prompt, "a </s>", "b", "2", "")]
    report = PairReport("test", kept=2)
    (pair,), counts = tokenize_pairs(pairs, template, tokenizer, Lengths(), report)
    text = tokenizer.decode(pair.chosen.ids)
    assert text == "### User:\nred?\n\n### Assistant:\nno\n\n### User:\nblue?\n\n### Assistant:\nyes"
    counted = pair.chosen.ids[pair.chosen.loss]
    assert tokenizer.decode(counted).strip() == "yes" and counted[-1] == tokenizer.eos_id
    assert report.kept == 1 and sum(report.dropped.values()) == 1
    assert (counts.pairs, counts.chosen_tokens) == (1, len(counted))


def test_fingerprint_sees_ids_and_what_counts():
    pair, _ = cut(response(5, 5), response(5, 4))
    moved, _ = cut(response(6, 4), response(5, 4))
    assert fingerprint([pair]) == fingerprint([pair])
    assert len({fingerprint(pairs) for pairs in ([pair], [moved], [pair, pair], [])}) == 4
