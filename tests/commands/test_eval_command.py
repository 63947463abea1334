"""`megavar eval`: its numbers recomputed from its records, and what it says of bad input."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from statistics import mean

import pyarrow.parquet as pq
import pytest

from megavar.cli import main

SAMPLING = ["--samples", 4, "--temperature", 2.5, "--max-tokens", 70]
RECIPE = """
[model]
path = "{inputs}/model"
[data.train]
kind = "jsonl"
path = "{inputs}/train.jsonl"
[data.eval]
kind = "jsonl"
path = "{questions}"
[templates]
policy = "qwen3_think"
posterior = "qwen3_think_posterior"
[evaluate]
samples = 4
temperature = 2.5
max_tokens = 70
"""


def numbers(printed: str) -> dict[str, list[float]]:
    """Metric -> value, low, high."""
    rows = {}
    for line in printed.splitlines():
        words = line.replace("[", " ").replace("]", " ").replace(",", " ").split()
        name = [w for w in words if not w.replace(".", "").isdigit()]
        if name and name[0] in ("accuracy", "pass@2", "pass@4", "majority"):
            rows[name[0]] = [float(w) for w in words if "." in w]
    return rows


def test_numbers_are_those_of_the_records(inputs: Path, megavar, finish, tmp_path, capsys) -> None:
    """References are set to what an untrained model says, so that the right numbers are neither 0 nor 1."""
    questions = [{"id": f"q{n}", "prompt": f"{n} + 1 =", "answer": "?"} for n in range(40)]
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    first.write_text("".join(json.dumps(q) + "\n" for q in questions))
    (tmp_path / "recipe.toml").write_text(RECIPE.format(inputs=inputs, questions=first))
    out = finish(
        megavar("eval", inputs / "model", "--data", tmp_path / "recipe.toml", "--out", tmp_path / "a.parquet")
    )
    assert numbers(out)["accuracy"][0] == 0
    rows = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert [(row["question_id"], row["index"]) for row in rows] == [
        (q["id"], k) for q in questions for k in range(4)
    ]
    assert len({row["seed"] for row in rows}) == 160 and not any(row["correct"] for row in rows)
    for row in rows:
        assert row["closed"] == ("</think>" in row["completion"])
        assert row["closed"] or row["answer"] == ""
        if row["answer"].strip():
            questions[int(row["question_id"][1:])]["answer"] = row["answer"]
    second.write_text("".join(json.dumps(q) + "\n" for q in questions))

    words = ["--template", "qwen3_think", *SAMPLING, "--out", tmp_path / "b.jsonl"]
    assert main(["eval", *map(str, [inputs / "model", "--data", second, *words])]) == 0
    out = capsys.readouterr().out
    again = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    assert [row["completion"] for row in again] == [row["completion"] for row in rows]
    answers = [[row["answer"] for row in rows[4 * n : 4 * n + 4]] for n in range(40)]
    correct = [
        [float(" ".join(a.split()) == " ".join(q["answer"].split())) for a in own]
        for own, q in zip(answers, questions, strict=True)
    ]
    assert [row["correct"] for row in again] == [bool(c) for own in correct for c in own]
    found, means = numbers(out), [mean(own) for own in correct]
    assert 0 < mean(means) < 1
    spread = (sum((m - mean(means)) ** 2 for m in means) / 39 / 40) ** 0.5 * 2.0226909
    assert found["accuracy"] == pytest.approx(
        [mean(means), max(0, mean(means) - spread), mean(means) + spread], abs=6e-5
    )
    pairs = [mean(max(pair) for pair in itertools.combinations(own, 2)) for own in correct]
    assert found["pass@2"][0] == pytest.approx(mean(pairs), abs=6e-5)
    assert found["pass@4"][0] == pytest.approx(mean(max(own) for own in correct), abs=6e-5)
    votes = [vote(own, right) for own, right in zip(answers, correct, strict=True)]
    assert found["majority"][0] == pytest.approx(mean(votes), abs=6e-5)


def vote(answers: list[str], correct: list[float]) -> float:
    given = [" ".join(a.split()) for a in answers]
    voters = [a for a in given if a]
    return correct[given.index(max(voters, key=voters.count))] if voters else 0.0


def test_bad_input_is_refused(inputs: Path, megavar, refused, tmp_path) -> None:
    model = inputs / "model"
    cases = [
        (["--data", "gym:chain_sum"], "--size N"),
        (["--data", tmp_path / "gone"], "give gym:NAME, a .jsonl"),
        (["--data", inputs / "train.jsonl", "--template", "qwen3_thinks"], "did you mean 'qwen3_think'?"),
        (["--data", inputs / "train.jsonl", "--template", "posterior_a"], "shows the solution"),
        (["--data", inputs / "train.jsonl", "--out", tmp_path / "x.txt"], "ends in .jsonl or .parquet"),
    ]
    for words, said in cases:
        assert said in refused(megavar("eval", model, *words))
