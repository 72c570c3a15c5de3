"""Synthetic mathematics against a real HTTP server on this machine, and from recorded answers."""

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from solar_mega.__main__ import main
from solar_mega.data import math_prompts as prompts
from solar_mega.data.generators import EndpointGenerator, Request, Sampling
from solar_mega.data.math_answers import boxed_answer, normalized_answer, same_answer
from solar_mega.data.synthesize import hide_a_number

pytest.importorskip("math_verify")

QUESTION = "What are five apples and 4 more?"
SEEDS = [
    {
        "problem": "What are five apples and 4 more?",
        "solution": r"It is $5+4=\boxed{9}$.",
        "type": "Prealgebra",
    },
    {"problem": "Halve 1.", "solution": r"Half of 1 is $\boxed{\frac{1}{2}}$.", "type": "Algebra"},
    {"problem": "No box here.", "solution": "Nothing.", "type": "Algebra"},
    {"problem": "What is 10 minus 3?", "solution": r"\boxed{7}", "type": "Algebra"},
]


class Model:
    """What the server answers: rephrases everything, solves all but the last seed rightly, and is at times
    not to be reached."""

    def __init__(self) -> None:
        self.calls, self.lock = Counter(), threading.Lock()
        self.troubles = [503, 429]
        self.broken = False

    def answer(self, prompt: str) -> str:
        if "in other words:" in prompt:
            question = prompt.split("Problem:\n")[1].split("\n\n")[0]
            return f'Rephrased problem: "In other words, {question}"'
        if "Statements:" in prompt:
            return "There are five apples and 4 more, 9 in all."
        if "X" in prompt:
            return r"X is \boxed{4}."
        if "Halve" in prompt:
            return r"One of two equal parts: \boxed{0.5}"
        return r"Together \boxed{9}." if "apples" in prompt else r"I think \boxed{6}."


@pytest.fixture
def server():
    model = Model()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with model.lock:
                model.calls[self.headers.get("Authorization")] += 1
                trouble = 401 if model.broken else (model.troubles.pop() if model.troubles else 200)
            prompt = body["messages"][0]["content"]
            if trouble != 200:
                self.send_response(trouble)
                self.send_header("Retry-After", "0.01")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            choice = {"message": {"content": model.answer(prompt)}, "finish_reason": "stop"}
            usage = {"prompt_tokens": len(prompt) // 4, "completion_tokens": 7}
            answer = json.dumps({"choices": [choice], "usage": usage}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    service = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=service.serve_forever, daemon=True)
    thread.start()
    model.url = f"http://127.0.0.1:{service.server_port}/v1"
    yield model
    service.shutdown()
    service.server_close()


@pytest.fixture
def seeds(tmp_path):
    file = tmp_path / "math.jsonl"
    file.write_text("".join(json.dumps(seed) + "\n" for seed in SEEDS))
    return file


def words(seeds, out, url, *more):
    given = ["--backend", "openai", "--base-url", url, "--model", "m", "--api-key-env", "TEST_KEY", *more]
    return ["synthesize", str(seeds), "--output", str(out), *given]


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_both_sets_are_made_of_right_answers_only(server, seeds, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TEST_KEY", "secret")
    out = tmp_path / "out"
    assert main(words(seeds, out, server.url, "--price-out", "1000000")) == 0
    instruct, alignment = read(out / "instruct.jsonl"), read(out / "alignment.jsonl")
    assert [row["original_id"] for row in instruct] == ["math-0", "math-1"]
    assert instruct[0] == {
        "id": "math-0/rephrased/0",
        "type": "MATH_rephrased",
        "prompt": "In other words, What are five apples and 4 more?",
        "response": r"Together \boxed{9}.",
        "answer": "9",
        "original_id": "math-0",
        "original_question": SEEDS[0]["problem"],
        "original_answer": SEEDS[0]["solution"],
    }
    assert instruct[1]["answer"] == "0.5"  # equal to 1/2 in value
    pair = {"prompt": instruct[0]["prompt"], "chosen": instruct[0]["response"]}
    assert alignment[0].items() >= {**pair, "rejected": SEEDS[0]["solution"]}.items()
    report = json.loads((out / "report.json").read_text())
    assert report["dropped"] == {"seed: no boxed answer": 1, "rephrased: another answer than the seed's": 1}
    assert report["kept"] == {"rephrased": 2} and report["completion_tokens"] == 6 * 7
    assert server.calls == {"Bearer secret": 8}  # 3 questions, 3 answers, 2 refusals
    output = capsys.readouterr()
    assert "cost 42.00" in output.out
    assert "secret" not in output.out + output.err + (out / "report.json").read_text()


def test_work_goes_on_where_it_was(server, seeds, tmp_path):
    out = tmp_path / "out"
    assert main(words(seeds, out, server.url)) == 0
    first, calls = (out / "instruct.jsonl").read_text(), sum(server.calls.values())
    lines = (out / "completions.jsonl").read_bytes().splitlines(keepends=True)
    (out / "completions.jsonl").write_bytes(b"".join(lines[:-1]) + lines[-1][:20])  # killed while writing
    (out / "instruct.jsonl").unlink()
    assert main(words(seeds, out, server.url)) == 0
    assert sum(server.calls.values()) == calls + 1
    assert (out / "instruct.jsonl").read_text() == first
    assert main(words(seeds, out, server.url, "--temperature", "0.1", "--limit", "1")) == 0
    assert sum(server.calls.values()) == calls + 3  # other settings are other answers


def test_the_other_ways_to_a_question(server, seeds, tmp_path):
    kinds = ("--kinds", "answer_augmentation", "fobar", "self_verification", "--limit", "1")
    out = tmp_path / "out"
    assert main(words(seeds, out, server.url, *kinds)) == 0
    rows = {row["type"]: row for row in read(out / "instruct.jsonl")}
    assert rows["MATH_answer_augmentation"]["prompt"] == SEEDS[0]["problem"]
    assert rows["MATH_self_verification"]["prompt"].startswith("There are five apples and X more, 9 in all.")
    for row in rows.values():
        assert row["original_id"] == "math-0"
    assert read(out / "alignment.jsonl") == []


def test_a_wrong_key_ends_the_work_at_once(server, seeds, tmp_path, capsys):
    server.broken = True
    assert main(words(seeds, tmp_path / "out", server.url)) == 2
    assert "refuses model 'm': HTTP 401" in capsys.readouterr().err


def test_what_never_answers_is_counted(server):
    server.troubles = [503] * 9
    generator = EndpointGenerator(server.url, "m", None, Sampling(), retries=2, first_pause=0.001)
    (completion,) = generator.complete([Request("p")])
    assert completion.error.startswith("3 attempts failed, the last with HTTP 503")
    assert server.calls == {None: 3}
    generator = EndpointGenerator("http://127.0.0.1:9", "m", None, Sampling(), retries=0)
    (completion,) = generator.complete([Request("p")])
    assert "1 attempts failed" in completion.error


def test_recorded_answers(seeds, tmp_path, capsys):
    file = tmp_path / "replay.jsonl"
    question = "One half of 1 is?"
    records = [
        {"prompt": prompts.rephrase(SEEDS[1]["problem"]), "text": question},
        {"prompt": prompts.solve(question), "text": r"$\boxed{\dfrac12}$"},
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    given = ["--backend", "replay", "--replay", str(file)]
    assert main(["synthesize", str(seeds), "--output", str(tmp_path / "out"), *given]) == 0
    (row,) = read(tmp_path / "out" / "instruct.jsonl")
    assert (row["prompt"], row["original_id"]) == (question, "math-1")
    assert "2 dropped: rephrase: not recorded" in capsys.readouterr().out


def test_only_math_is_a_seed(tmp_path, capsys):
    file = tmp_path / "gsm8k.jsonl"
    file.write_text(json.dumps({"question": "q", "answer": "#### 3"}) + "\n")
    (tmp_path / "replay.jsonl").write_text("")
    given = ["--backend", "replay", "--replay", str(tmp_path / "replay.jsonl")]
    assert main(["synthesize", str(file), "--output", str(tmp_path / "out"), *given]) == 2
    assert "fields problem and solution; this row has question, answer" in capsys.readouterr().err
    assert (
        main(["synthesize", str(file), "--output", str(tmp_path), "--backend", "openai", "--samples", "0"])
        == 2
    )
    error = capsys.readouterr().err
    assert "--backend openai needs --model" in error and "--samples 0: must be at least 1" in error


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (r"\frac12", "0.5", True),
        (r"\dfrac{3}{4}", "3/4", True),
        (r"2\sqrt3", r"\sqrt{12}", True),
        ("x^2+2x+1", "(x+1)^2", True),
        (r"\{1,2\}", r"\{2,1\}", True),
        ("(1,2)", "(2,1)", False),
        ("1,000", "1000", True),
        (r"5\text{ cm}", "5", True),
        (r"\text{even}", "even", True),
        ("7", "8", False),
        ("red", "blue", False),
    ],
)
def test_answers_are_compared_by_what_they_say(first, second, same):
    assert same_answer(first, second) is same
    assert same_answer(second, first) is same


def test_boxes():
    assert boxed_answer(r"so \boxed{1}, no: \boxed{\frac{a}{\{b\}}}.") == r"\frac{a}{\{b\}}"
    assert boxed_answer(r"\boxed 5, surely") == "5"
    assert boxed_answer(r"\fbox{x}") == "x"
    assert (
        boxed_answer(r"\boxed{5") is None and boxed_answer("5") is None and boxed_answer(r"\boxed{}") is None
    )
    assert normalized_answer(r"\$\dfrac12 \text{ cm}") == r"\frac{1}{2}"


def test_hidden_numbers():
    text, number = hide_a_number("There are 12 of 3.5 and 1,000 x^2 or \\frac{7}{8} in 5x", "draw")
    assert number in ("12", "3.5") and text.count("X") == 1 and number not in text.split()
    assert hide_a_number("none", "draw") is None
    assert hide_a_number("2 and 4", "draw", only={"4"}) == ("2 and X", "4")


def test_cleaned():
    assert prompts.cleaned('  Rephrased question: "How many?" ') == "How many?"
    assert prompts.cleaned("The problem is: easy") == "The problem is: easy"
