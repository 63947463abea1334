"""Programs as answers: what passes a question's tests, and which tricks do not."""

from __future__ import annotations

import ctypes
import os

import pytest

from megavar.data.records import Question
from megavar.verifiers import verify_all
from megavar.verifiers.code import last_block, same_text, verify
from megavar.verifiers.sandbox_supervisor import KEYCTL, KEYCTL_JOIN_SESSION_KEYRING

ADD = "print(sum(map(int, input().split())))"


def fenced(code: str, language: str = "python") -> str:
    return f"So it is:\n```{language}\n{code}\n```\nThis adds them."


def question(**payload) -> Question:
    return Question(id="q", prompt="Add.", answer="", verifier="code", payload=payload)


def prints(**more) -> Question:
    return question(inputs=["1 2\n", ["10 20"]], outputs=["3\n", ["30"]], **more)


def calls(**more) -> Question:
    return question(inputs=[[1, [2]], [10, [20, 30]]], outputs=[[3], [60]], fn_name="add", **more)


ITS_OWN = f"""
import ctypes
keyctl = {KEYCTL.get(os.uname().machine)}
libc = ctypes.CDLL(None)
assert keyctl is None or libc.syscall(keyctl, 10, ctypes.c_int(-3), b"user", b"megavar-test", 0) < 0
try:
    score = open("/proc/self/oom_score_adj").read()
except OSError:  # where it has no /proc
    score = "1000"
assert int(score) == 1000
"""
METHOD = "class Solution:\n    def add(self, a: int, b: List[int]) -> int:\n        return a + sum(b)"
RIGHT = {
    "script": (prints(), ADD),
    "main guard": (prints(), f"def main():\n    {ADD}\nif __name__ == '__main__':\n    main()"),
    "exit": (prints(), f"import sys\n{ADD}\nsys.exit(0)\nprint('more')"),
    "method, typing names": (calls(), METHOD),
    "function": (calls(), "def add(a, b):\n    print('chatter')\n    return sum([a, *b])"),
    "demonstration": (calls(), METHOD + "\nif __name__ == '__main__':\n    print(input())"),
    "no keys of ours, first to go": (prints(), ITS_OWN + ADD),
    "numpy": (calls(), "import numpy as np\ndef add(a, b):\n    return np.int64(a) + np.sum(b)"),
    "deep": (prints(), f"def f(n): return n and 1 + f(n - 1)\nassert f(40000) == 40000\n{ADD}"),
}
WRONG = {
    "other number": (prints(), "print(4)"),
    "right, then a crash": (prints(), ADD + "\nraise RuntimeError"),
    "right, then a signal": (prints(), f"import os\n{ADD[:-1]}, flush=True)\nos.kill(os.getpid(), 9)"),
    "right, then exit(1)": (prints(), ADD + "\nexit(1)"),
    "does not parse": (prints(), "print((1)"),
    "exit before the call": (calls(), "import sys\nsys.exit(0)"),
    "no such function": (calls(), "def sub(a, b): return a"),
    "not a value": (calls(), "def add(a, b): return {1, 2}"),
    # Whoever compares is elsewhere: nothing in reach says what is expected.
    "patched equality": (
        calls(),
        "class Any(int):\n    __eq__ = lambda self, other: True\ndef add(a, b): return Any(0)",
    ),
    "patched json": (calls(), "import json\njson.loads = lambda text: 3\ndef add(a, b): return 0"),
    "patched harness": (
        calls(),
        "import builtins, sys\nsys.modules['__main__'].main = builtins.all = lambda *a: True\ndef add(a, b): return 0",
    ),
    "reads its caller": (
        calls(),
        "import sys\ndef add(a, b):\n    f = sys._getframe(1)\n    while f:\n"
        "        assert not [v for v in f.f_locals.values() if v in (3, 60) or 'outputs' in str(v)]\n"
        "        f = f.f_back\n    return 0",
    ),
    "written result": (
        calls(),
        "import os\nfor fd in range(3, 60):\n    try: os.write(fd, b'true')\n    except OSError: pass\nos._exit(0)",
    ),
}


@pytest.fixture(scope="module")
def scores():
    if (keyctl := KEYCTL.get(os.uname().machine)) is not None:
        libc = ctypes.CDLL(None)
        libc.syscall(keyctl, KEYCTL_JOIN_SESSION_KEYRING, None)
        libc.syscall(keyctl - 2, b"user", b"megavar-test", b"secret", 6, ctypes.c_int(-3))  # add_key
    cases = {("right", name): case for name, case in RIGHT.items()}
    cases |= {("wrong", name): case for name, case in WRONG.items()}
    items = [(key, fenced(code), asked) for key, (asked, code) in cases.items()]
    verdicts = verify_all(items, workers=2)
    assert verdicts.verified == len(items), verdicts.errors
    return verdicts.scores


@pytest.mark.parametrize("name", RIGHT)
def test_right_programs_pass(scores, name):
    assert scores["right", name] == 1.0


@pytest.mark.parametrize("name", WRONG)
def test_tricks_do_not_pass(scores, name):
    assert scores["wrong", name] == 0.0


def test_values_in_a_list_of_one_pass_unless_strict():
    [bare, wrapped] = [f"def add(a, b): return {value}" for value in ("a + sum(b)", "[a + sum(b)]")]
    assert verify(fenced(bare), calls()) == verify(fenced(wrapped), calls()) == 1.0
    assert (verify(fenced(bare), calls(strict=True)), verify(fenced(wrapped), calls(strict=True))) == (
        0.0,
        1.0,
    )


def test_an_answer_without_a_block_runs_nothing():
    assert verify(ADD, prints()) == 0.0
    with pytest.raises(ValueError, match="question 'q': 1 inputs and 0 outputs"):
        verify(fenced(ADD), question(inputs=["1"], outputs=[]))


def test_the_last_closed_block_counts():
    assert last_block("```py\na\n```\ntext\n  ```\n  b\n  ```  \n```python\nc") == "  b\n"
    assert last_block("```\na\n```python\nb\n```") == "b\n"
    assert last_block("no block") is None and last_block("```python\nx") is None
    assert last_block("```a\n" * 200_000) is None


@pytest.mark.parametrize(
    ("output", "wanted", "tolerant", "strict"),
    [
        ("1 2\n", "1  2", True, True),
        (" a b \n\n", "a b", True, True),
        ("1.0 2", "1 2.00", True, True),
        ("0.3333334", "0.33333333", True, False),
        ("0.34", "0.33", False, False),
        ("10000001", "10000000", False, False),
        ("x 1.0", "x 1", True, False),
        ("1\n2", "1 2", False, False),
        ("nan", "NaN", False, False),
        ("1e999999999", "1", False, False),
        ("", "0", False, False),
    ],
)
def test_texts_are_compared_by_line_and_value(output, wanted, tolerant, strict):
    assert same_text(output, wanted, strict=False) == tolerant
    assert same_text(output, wanted, strict=True) == strict
