"""What each verifier accepts, and that every reasoning-gym scorer works from a stored payload."""

from __future__ import annotations

import ast
import inspect
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reasoning_gym.factory import DATASETS

from megavar.data.gym_questions import _questions
from megavar.data.records import Question
from megavar.errors import UserError
from megavar.verifiers import NAMES, gym, is_correct, load_verifier
from megavar.verifiers.choice import settled
from megavar.verifiers.gym_answers import EVALUATED, PARSED, UNREADABLE, is_program
from megavar.verifiers.mathematics import last_box


def score(name: str, answer: str, reference: str, **fields) -> float:
    return load_verifier(name)(
        answer, Question(id="q", prompt="p", answer=reference, verifier=name, **fields)
    )


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("42", "42", 1),
        ("  a\n b ", "a b", 1),
        ("a b", "ab", 0),
        ("A", "a", 0),
        ("1,000.50", "1000.5", 1),
        ("1,00", "100", 0),
        ("+3", "3.0", 1),
        ("-3e2", "-300", 1),
        ("0.75", "3/4", 1),
        ("3 / 4", "6/8", 1),
        ("1/0", "1/0", 1),
        ("1/0", "2/0", 0),
        ("0.1", "0.10000000000000000001", 0),
        (".", "0", 0),
        ("e5", "0", 0),
        ("", "0", 0),
        ("", "", 1),
        ("nan", "nan", 1),
        ("1e99999999", "1", 0),
    ],
)
def test_exact(answer, reference, expected):
    assert score("exact", answer, reference) == expected


def test_exact_is_cheap_whatever_is_written():
    start = time.perf_counter()
    for answer in (
        "9" * 200_000,
        "1e9999",
        "1e" + "9" * 10_000,
        "1," * 100_000,
        "1/" * 1000,
        "0." + "1" * 100_000,
    ):
        assert score("exact", answer, "3/7") == 0
    assert time.perf_counter() - start < 2


@settings(max_examples=100, deadline=None)
@given(numerator=st.integers(-(10**20), 10**20), shift=st.integers(0, 15))
def test_exact_compares_numbers_by_value(numerator, shift):
    sign, digits = "-" * (numerator < 0), str(abs(numerator)).rjust(shift + 1, "0")
    decimal = sign + digits[: len(digits) - shift] + ("." + digits[len(digits) - shift :] if shift else "")
    assert score("exact", decimal, f"{numerator}/{10**shift}") == 1
    assert score("exact", f"{numerator}e-{shift}", decimal) == 1
    assert score("exact", f"{numerator + 1}/{10**shift}", decimal) == 0


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("**B**", "B"),
        ("The answer is B.", "B"),
        ("The answer is (B), not A or C", "B"),
        ("Answer: B", "B"),
        ("answer: A ... no. Final answer: **B**", "B"),
        ("First I thought \\boxed{A} but \\boxed{\\text{B}}", "B"),
        ("the answer is A but boxed \\boxed{B.}", "B"),
        ("B. because it is so", "B"),
        ("I choose option B", "B"),
        ("A man saw (B) there", "B"),
        ("A cat sat on the mat", None),
        ("The answer is Because", None),
        ("", None),
    ],
)
def test_choice(answer, expected):
    for letter in "ABCD":
        assert score("choice", answer, letter) == (letter == expected)
        assert score("choice", answer, f"({letter})") == (letter == expected)


@pytest.mark.parametrize(
    "text",
    ["\n", ".\n", " ", "\\boxed{", "answer ", "answer is option *", "(", "A.x\n", "** ", "A \n", "- "],
)
def test_a_model_that_repeats_itself_is_read_in_no_time(text):
    """A pattern that backtracks takes seconds over the short texts, and would take hours over the long ones."""
    for repeats in (5_000, 50_000):
        start = time.process_time()
        for before in ("", "answer", "\\boxed{", "\\boxed{A", "answer is", "answer option "):
            settled(before + text * repeats + "!", 4)
        seconds = time.process_time() - start
        assert seconds < 4e-5 * repeats, seconds


def test_choice_is_bounded_by_its_options_and_needs_a_reference_letter():
    assert score("choice", "(B) or (Z)", "B", payload={"choices": ["x", "y", "z"]}) == 1
    with pytest.raises(ValueError, match="'q': the reference answer 'both' names no choice"):
        score("choice", "B", "both")


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("so \\boxed{\\frac{1}{2}}", "0.5", 1),
        ("\\boxed{0.5}", "\\frac{1}{2}", 1),
        ("\\boxed{\\dfrac{\\sqrt{8}}{2}}", "$\\sqrt{2}$", 1),
        ("\\boxed{x^2+2x+1}", "(x+1)^2", 1),
        ("\\boxed{(1, 2)}", "(1,2)", 1),
        ("\\boxed{\\{3, 1\\}}", "\\{1,3\\}", 1),
        ("\\boxed{4} no, \\boxed{5}", "5", 1),
        ("\\boxed{4} no, \\boxed{5}", "4", 0),
        ("\\boxed{5}. That took 6 steps.", "5", 1),
        ("the final answer is $42$", "42", 1),
        ("\\boxed{42", "41", 0),
        ("\\boxed{}", "42", 0),
        ("", "42", 0),
        ("\\boxed{\\text{east}}", "east", 1),
    ],
)
def test_math(answer, reference, expected):
    assert score("math", answer, reference) == expected


def test_math_reads_a_reference_from_the_box_of_the_solution():
    assert score("math", "\\boxed{7}", "", solution="Thus $3+4=\\boxed{7}$.") == 1
    assert score("math", "\\boxed{7}", "Thus \\boxed{7}.") == 1
    with pytest.raises(ValueError, match="'q': cannot parse the reference"):
        score("math", "\\boxed{7}", "")


def test_the_last_balanced_box_counts():
    assert last_box("\\boxed{1} \\boxed {\\frac{a}{\\{b\\}}} \\boxed{cut") == "\\boxed {\\frac{a}{\\{b\\}}}"
    assert last_box("{{ \\boxed{a \\boxed{b}}") == "\\boxed{b}"
    assert last_box("\\boxed 3 }}") is None
    start = time.perf_counter()
    assert last_box("\\boxed{" * 50_000) is None
    assert time.perf_counter() - start < 2


def deep_types(value):
    if isinstance(value, dict):
        return {(type(key), key): deep_types(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value), [deep_types(item) for item in value]
    return value


NEEDS_OPTIONS = {"composite": {"datasets": [{"name": "gcd", "weight": 1, "config": {}}]}}


@pytest.mark.parametrize("name", gym.dataset_names())
def test_every_reasoning_gym_scorer_grades_from_a_stored_payload(name):
    """The stored entry is the dataset's own down to tuples and integer keys; an oracle scores 1."""
    options = {**NEEDS_OPTIONS.get(name, {}), "seed": 5, "size": 1}
    dataset = gym.dataset(name, options)
    entry = dataset[0]
    payload = json.loads(json.dumps(gym.payload(name, options, entry)))
    stored = Question(id="q", prompt="p", answer="", verifier="reasoning_gym", payload=payload)
    assert deep_types(gym._untag(stored.payload["entry"])) == deep_types(entry)
    if entry["answer"] is not None:
        assert is_correct(gym.verify(f"\n{entry['answer']}\n", stored))
    wrong = gym.verify("certainly not this", stored)
    if name == "prime_factorization":  # its scorer raises on what is not a product
        with pytest.raises(ValueError):
            dataset.score_answer("certainly not this", entry)
        assert wrong == 0
    else:
        assert wrong == dataset.score_answer("certainly not this", entry)
    # Its scorer compares truth values of strings: any text is correct.
    assert not is_correct(wrong) or name == "game_of_life_halting"


def test_partial_credit_is_passed_on_and_is_not_correct():
    question = next(_questions("countdown", {}, 1, 0))
    assert gym.verify("1 + 1", question) == 0.05 and not is_correct(0.05)
    assert is_correct(1.0) and not is_correct(0.999)


def test_the_registry_loads_each_name_and_refuses_others():
    assert all(callable(load_verifier(name)) for name in NAMES)
    with pytest.raises(UserError, match="unknown verifier 'proof'; known: exact, math"):
        load_verifier("proof")


def executes(function: ast.FunctionDef) -> bool:
    calls = (node.func for node in ast.walk(function) if isinstance(node, ast.Call))
    names = {getattr(call, "id", getattr(call, "attr", None)) for call in calls}
    return bool(names & {"eval", "exec", "compile", "parse_expr", "sympify", "nsimplify", "lambdify"})


def test_every_scorer_that_executes_answers_is_known():
    found = set()
    for name, (kind, _) in DATASETS.items():
        source = inspect.getsource(inspect.getmodule(kind))
        functions = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef))
        if any(f.name == "score_answer" and executes(f) for f in functions):
            found.add(name)
    assert found == EVALUATED | PARSED | {"number_sorting"}  # which evaluates its own


PROGRAMS = (
    "open({path!r}, 'w').close()",
    "[open({path!r}, 'w')]",
    "().__class__.__base__.__subclasses__()",
    "1 or exit()",
    "eval(chr(49))",
    "x.subs",
    "lambda: 0",
    "[c for c in 'ab']",
    "f'{{1}}'",
    "S('1')",
    "exit()!",
)


@pytest.mark.parametrize("name", sorted(EVALUATED | PARSED))
def test_answers_are_not_executed(name, tmp_path):
    (asked,) = _questions(name, {}, 1, 0)
    for program in PROGRAMS:
        answer = program.format(path=str(tmp_path / "made"))
        assert is_program(answer, name, asked.answer) or name in EVALUATED
        assert gym.verify(answer, asked) == gym.verify(UNREADABLE, asked) < 0.1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("spiral_matrix", "[1, -2, [3, 'a']]"),
        ("string_insertion", "ABCD"),
        ("binary_matrix", "0 1\n1 0"),
        ("intermediate_integration", "-exp(2*x)*asinh(x)/2 + sqrt(x)*log(x)**1.5e1 + pi*x! + C"),
        ("countdown", "(7 + 3)*4 - 2^3"),
        ("propositional_logic", "(P and Q).x"),
    ],
)
def test_values_and_formulas_are_no_programs(name, answer):
    assert not is_program(answer, name, "x")
