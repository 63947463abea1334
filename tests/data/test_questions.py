"""Questions load from every source, and bad input ends in one error that says where and what."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megavar.config.recipe import QuestionSource
from megavar.data.gym_questions import _questions
from megavar.data.questions import load_questions, require_solutions, require_traces
from megavar.data.records import Question
from megavar.errors import UserError

ROWS = [
    {"id": "a", "prompt": "1+1?", "answer": "2", "solution": "It is 2.", "payload": {"n": [1, {"m": None}]}},
    {"id": "b", "prompt": "Prüfe {solution} 😀", "answer": "3", "trace": "Hm.", "verifier": "math"},
    {"id": "c", "prompt": "2+2?", "answer": "4", "solution": "4", "source": "hand"},
]
EXPECTED = [Question(**{"verifier": "exact", **row}) for row in ROWS]


def jsonl(path: Path, rows: list) -> QuestionSource:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("\n".join(lines), encoding="utf-8")
    return QuestionSource(kind="jsonl", path=path)


def columns(rows: list[dict]) -> dict[str, list]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {
        name: [json.dumps(row[name]) if name == "payload" and name in row else row.get(name) for row in rows]
        for name in names
    }


def test_three_file_kinds_give_the_same_questions(tmp_path):
    assert load_questions(jsonl(tmp_path / "q.jsonl", ROWS)) == EXPECTED
    pq.write_table(pa.table(columns(ROWS)), tmp_path / "q.parquet", row_group_size=1)
    assert load_questions(QuestionSource(kind="parquet", path=tmp_path / "q.parquet")) == EXPECTED
    table = datasets.Dataset.from_dict(columns(ROWS))
    datasets.DatasetDict(train=table, test=table.select([2])).save_to_disk(tmp_path / "hf")
    assert load_questions(QuestionSource(kind="hf_dataset", path=tmp_path / "hf")) == EXPECTED
    assert (
        load_questions(QuestionSource(kind="hf_dataset", path=tmp_path / "hf", split="test")) == EXPECTED[2:]
    )
    with pytest.raises(UserError, match="no split 'tset'; did you mean 'test'"):
        load_questions(QuestionSource(kind="hf_dataset", path=tmp_path / "hf", split="tset"))
    state = tmp_path / "hf/test/state.json"
    for torn in (state.read_text()[:20], "{}"):
        state.write_text(torn)
        with pytest.raises(UserError, match="hf: a damaged data set .*; save it again"):
            load_questions(QuestionSource(kind="hf_dataset", path=tmp_path / "hf", split="test"))


def test_globs_and_directories_are_read_in_name_order_and_size_stops_reading(tmp_path):
    jsonl(tmp_path / "part-1.jsonl", ROWS[1:])
    jsonl(tmp_path / "part-0.jsonl", ROWS[:1])
    for path in (tmp_path, tmp_path / "part-*.jsonl"):
        assert load_questions(QuestionSource(kind="jsonl", path=path)) == EXPECTED
    # The third line is broken, and not reached.
    broken = jsonl(tmp_path / "broken.json", [*ROWS[:2], "{"])
    assert load_questions(broken.model_copy(update={"size": 2})) == EXPECTED[:2]
    with pytest.raises(UserError, match=rf"{len(ROWS)} questions in it, size = 9 asks for more"):
        load_questions(QuestionSource(kind="jsonl", path=tmp_path, size=9))


def test_columns_are_mapped_and_defaults_fill_in(tmp_path):
    source = jsonl(
        tmp_path / "q.jsonl", [{"text": "x?", "gold": 7}, {"text": "y?", "gold": 0.5, "solution": None}]
    )
    source = source.model_copy(update={"columns": {"prompt": "text", "answer": "gold"}, "verifier": "math"})
    first, second = load_questions(source)
    assert (first.id, first.prompt, first.answer, first.verifier) == ("0", "x?", "7", "math")
    assert (second.id, second.answer, second.solution, second.trace) == ("1", "0.5", "", None)


GOOD = {"prompt": "p", "answer": "a"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"q\.jsonl: no questions"),
        ([GOOD, {"promt": "p", "answer": "a"}], r"q\.jsonl:2: no column 'prompt' .* did you mean 'promt'\?"),
        ([{"prompt": "p"}], r"q\.jsonl:1: no column 'answer'"),
        ([{"prompt": "p", "answer": None}], r"q\.jsonl:1: field 'answer' .* is null"),
        ([{"prompt": ["p"], "answer": "a"}], r"q\.jsonl:1: field 'prompt' .* is list, expected text"),
        ([{"prompt": "p", "answer": True}], r"field 'answer' .* is bool, expected text"),
        ([{**GOOD, "solution": 3}], r"field 'solution' .* is int, expected text"),
        ([{**GOOD, "prompt": " \n"}], r"field 'prompt' is empty"),
        ([{**GOOD, "prompt": "\ud83d"}], r"lone surrogate at character 0"),
        (["", {**GOOD, "id": "x"}, {**GOOD, "id": "x"}], r":3: duplicate id 'x', first seen in .*q\.jsonl:2"),
        ([{**GOOD, "verifier": "maths"}], r":1: unknown verifier 'maths'; did you mean 'math'\?"),
        ([{**GOOD, "verifier": "reasoning_gym"}], r"needs payload keys \['dataset', 'entry', 'options'\]"),
        ([{**GOOD, "payload": [1]}], r"field 'payload' is list, expected an object"),
        ([{**GOOD, "payload": "{"}], r"field 'payload' is not JSON"),
        (["{"], r":1: not JSON"),
        (["[1]"], r":1: expected one JSON object a line, got list"),
    ],
)
def test_bad_rows_are_named(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        load_questions(jsonl(tmp_path / "q.jsonl", rows))


def test_bad_files_are_named(tmp_path):
    def error(kind: str, name: str) -> str:
        with pytest.raises(UserError) as caught:
            load_questions(QuestionSource(kind=kind, path=tmp_path / name))
        return str(caught.value)

    assert "nowhere.jsonl: no such file" in error("jsonl", "nowhere.jsonl")
    (tmp_path / "empty").mkdir()
    assert "no *.parquet file in it" in error("parquet", "empty")
    assert "not a directory written by datasets.save_to_disk" in error("hf_dataset", "nowhere")
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "ü"}'.encode("latin-1"))
    assert "latin.jsonl: not UTF-8" in error("jsonl", "latin.jsonl")
    assert "/proc/self/mem: cannot be read: Input/output error" in error("jsonl", "/proc/self/mem")
    pq.write_table(pa.table({"prompt": ["p"] * 5, "anwser": ["a"] * 5}), tmp_path / "q.parquet")
    assert "q.parquet row 0: no column 'answer'" in (message := error("parquet", "q.parquet"))
    assert "did you mean 'anwser'?" in message
    whole = (tmp_path / "q.parquet").read_bytes()
    (tmp_path / "q.parquet").write_bytes(whole[: len(whole) // 2])
    assert "q.parquet: not a readable Parquet file" in error("parquet", "q.parquet")
    with pytest.raises(UserError, match="'promt' is not a question field; did you mean 'prompt'"):
        load_questions(QuestionSource(kind="jsonl", path=tmp_path / "x", columns={"promt": "p"}))


def test_reasoning_gym_carries_its_oracle():
    source = QuestionSource(kind="reasoning_gym", name="chain_sum", size=5, seed=3, options={"min_terms": 3})
    questions = load_questions(source)
    assert [question.id for question in questions] == [f"chain_sum/3/{index}" for index in range(5)]
    expression = questions[0].prompt.split(":")[-1].rstrip(" =")
    assert eval(expression) == int(questions[0].answer) == int(questions[0].solution)
    assert json.loads(json.dumps(dict(questions[0].payload))) == questions[0].payload
    # In this process: the same, a prefix of the same, and others for another seed.
    prompts = [question.prompt for question in questions]
    for size, seed, same in ((5, 3, True), (2, 3, True), (5, 4, False)):
        again = [question.prompt for question in _questions("chain_sum", {"min_terms": 3}, size, seed)]
        assert (again == prompts[:size]) == same


@pytest.mark.parametrize("name", ["word_ladder", "list_functions"])
def test_generators_that_depend_on_the_process_are_pinned(name):
    """The first walks over sets of strings, the second draws from the global random state."""
    source = QuestionSource(kind="reasoning_gym", name=name, size=4, seed=1)
    assert load_questions(source) == load_questions(source)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("chain_summ", {}, "no dataset 'chain_summ'; did you mean 'chain_sum'"),
        ("chain_sum", {"min_term": 2}, "no option 'min_term'; did you mean 'min_terms'"),
        ("chain_sum", {"min_terms": 9, "max_terms": 2}, "refuses options .*max_terms must be >= min_terms"),
        ("chain_sum", {"seed": 2}, "set 'seed' beside `options`"),
    ],
)
def test_reasoning_gym_mistakes_are_named(name, options, message):
    with pytest.raises(UserError, match=message):
        list(_questions(name, options, 2, 0))


def test_reasoning_gym_mistakes_reach_the_caller():
    source = QuestionSource(kind="reasoning_gym", name="chain_summ", size=2)
    with pytest.raises(UserError, match="did you mean 'chain_sum'"):
        load_questions(source)
    with pytest.raises(UserError, match="grades by its own scorer"):
        load_questions(source.model_copy(update={"verifier": "exact"}))


def test_missing_solutions_and_traces_are_one_error_with_first_ids():
    questions = [
        Question(id=f"q{n}", prompt="p", answer="a", solution="s" if n < 3 else " ") for n in range(10)
    ]
    require_solutions(questions[:3])
    with pytest.raises(
        UserError, match=r"^7 of 10 questions have no reference solution \(ids q3, q4, q5, q6, q7, \.\.\.\)"
    ):
        require_solutions(questions)
    with pytest.raises(UserError, match="^3 of 3 questions have no reference trace"):
        require_traces(questions[:3])
