"""Recipe files: layers, overrides, paths, messages, and the way back to TOML."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from megavar.config import recipe as r
from megavar.config import schema
from megavar.config.diff import changes
from megavar.config.load import dump_recipe, load_recipe
from megavar.errors import UserError

MINIMAL = """
[model]
path = "base"
[data.train]
kind = "reasoning_gym"
name = "chain_sum"
size = 10
[data.eval]
kind = "jsonl"
path = "held_out/*.jsonl"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(MINIMAL)
    return path


def complaint(path: Path, *overrides: tuple[str, str]) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


def test_config_imports_neither_torch_nor_megatron() -> None:
    code = (
        "import pkgutil, sys, megavar.config as c\n"
        "for m in pkgutil.iter_modules(c.__path__): __import__(f'megavar.config.{m.name}')\n"
        "import megavar.runs, megavar.metrics, megavar.launch, megavar.report.show\n"
        "print([m for m in ('torch', 'megatron', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_section_defaults_survive_a_partly_set_section(file: Path) -> None:
    file.write_text(MINIMAL + "[posterior.fit]\nlr = 2\n[final]\nsteps = 7\n")
    recipe = load_recipe(file)
    assert recipe.posterior.fit == r.Posterior().fit.model_copy(update={"lr": 2.0})
    assert recipe.posterior.fit.questions_per_step == 16  # the posterior's own default, not Fit's 96
    assert (recipe.final.questions_per_step, recipe.final.steps) == (192, 7)


def test_paths_are_relative_to_the_layer_they_stand_in(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sub, here = tmp_path / "sub", tmp_path / "here"
    sub.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    (sub / "top.toml").write_text('base = "../recipe.toml"\nout = "mine"\n')
    recipe = load_recipe(sub / "top.toml", [("data.eval.path", "x.jsonl")])
    assert recipe.model.path == tmp_path / "base"  # named in ../recipe.toml
    assert recipe.out == sub / "mine"
    assert recipe.data.eval.path == here / "x.jsonl"
    assert load_recipe(file).out == here / "runs/run"  # a default: relative to the current directory
    assert load_recipe(file).data.eval.path == tmp_path / "held_out/*.jsonl"


def test_bases_merge_by_key_and_replace_lists(tmp_path: Path, file: Path) -> None:
    file.write_text(MINIMAL + '[[arms]]\nname = "a"\n[[arms]]\nname = "b"\n[rollout]\nseed = 5\ntraces = 3\n')
    (tmp_path / "mid.toml").write_text('base = "recipe.toml"\n[rollout]\nseed = 6\n[[arms]]\nname = "c"\n')
    (tmp_path / "top.toml").write_text('base = "mid.toml"\n[rollout]\nanswers = 2\n')
    recipe = load_recipe(tmp_path / "top.toml")
    assert (recipe.rollout.seed, recipe.rollout.traces, recipe.rollout.answers) == (6, 3, 2)
    assert [arm.name for arm in recipe.arms] == ["c"]


def test_overrides(file: Path) -> None:
    recipe = load_recipe(
        file,
        [
            ("trainer.ranks", "4"),
            ("trainer.tp", "2"),
            ("trainer.packing", "false"),
            ("final.betas", "[0.8, 0.9]"),
            ("name", "2026"),  # text stays text, though it reads as a number
            ("templates.policy", '"quoted"'),
            ("arms.variational.mix", "false"),
            ("arms.0.name", "other"),
            ("data.train.options.min_terms", "3"),
            ("rollout.context_length", "100"),
            ("rollout.context_length", "none"),
        ],
    )
    assert (recipe.trainer.ranks, recipe.trainer.tp, recipe.trainer.packing) == (4, 2, False)
    assert recipe.final.betas == (0.8, 0.9)
    assert (recipe.name, recipe.templates.policy) == ("2026", "quoted")
    (arm,) = recipe.arms
    assert (arm.name, arm.mix, arm.selection) == ("other", False, "argmax")  # the rest of the default
    assert recipe.data.train.options == {"min_terms": 3}
    assert recipe.rollout.context_length is None


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("trainer.rank", "2", "--trainer.rank: unknown key; did you mean trainer.ranks?"),
        ("trainer.micro-batch", "2", "--trainer.micro-batch: unknown key; "),
        ("lr", "2", "did you mean initial.lr or posterior.fit.lr or posterior.tune.lr"),
        ("rollot.seed", "1", "--rollot.seed: rollot: unknown key; did you mean rollout?"),
        ("trainer.ranks", "two", '--trainer.ranks: must be a valid integer, got "two"'),
        ("trainer.ranks", "2.0", "--trainer.ranks: must be a valid integer, got 2.0"),
        ("trainer.packing", "1", "--trainer.packing: must be a valid boolean, got 1"),
        ("final.lr", "nan", "--final.lr: must be a finite number"),
        ("final.lr", "-1", "--final.lr: must be greater than 0, got -1"),
        ("arms.0.objective", "sftt", "latro, jepo; did you mean sft?"),
        (
            "arms.0.baseline",
            "mean",
            'baseline has no meaning for objective = "variational"; its keys: all_zero',
        ),
        ("arms.0.temper", "0.3", 'temper needs ratio = "tempered"'),
        ("posterior.kl", "0.5", 'kl has no meaning for objective = "sft"; its keys: none'),
        ("arms.7.name", "x", "--arms.7.name: no element '7'; there are: 0 (variational)"),
        ("arms.0.name", "a/b", "--arms.0.name: must match pattern"),
        ("trainer.ranks.x", "3", "trainer.ranks is a value, not a section"),
        ("trainer.tp", "2", "--trainer.tp: trainer: ranks=1 is not a multiple of tp*cp*pp=2"),
        ("trainer.ranks", "1\ntp = 2", "must be a valid integer"),  # no smuggling of a second key
        ("data.train.options.day", "[2026-01-01]", "dates and times"),
        (
            "final.betas",
            "[0.9, 1.0]",
            "--final.betas: final: betas must be at least 0 and below 1, got [0.9, 1.0]",
        ),
        ("final.min_lr", "0.5", "--final.min_lr: final: min_lr = 0.5 is above the peak, lr = 1e-05"),
        ("final.betas", "[0.9]", "--final.betas: final.betas.1: missing; number"),
        ("trainer.seed", "-1", "--trainer.seed: must be greater than or equal to 0"),
        ("rollout.seed", "-1", "--rollout.seed: must be greater than or equal to 0"),
        ("arms", "[]", "--arms: arms: there must be at least one"),
        ("rollout.servers.urls", "['host:3000']", "'host:3000' is no URL of a server"),
        ("rollout.servers.router_url", "http://host", "`urls`, which are missing"),
        ("rollout.servers.devices", "[['0', '1']]", "devices must name 1 for each of 1 servers (tp, count)"),
    ],
)
def test_one_clear_line_for_a_bad_option(file: Path, key: str, value: str, expected: str) -> None:
    message = complaint(file, (key, value))
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("arm", "posterior"),
    [
        ({"objective": "mixture", "estimator": "gml"}, {}),
        ({"objective": "covrl"}, {}),
        ({"objective": "grpo"}, {}),
        ({"objective": "reinforce", "baseline": "mean"}, {}),
        ({}, {"objective": "trajectory_balance", "traces": 1}),
    ],
)
def test_what_compares_traces_needs_several(arm: dict, posterior: dict) -> None:
    source = {"kind": "jsonl", "path": "p"}
    said = {"model": {"path": "m"}, "data": {"train": source, "eval": source}, "posterior": posterior}
    said["arms"] = ({"name": "a", **arm},)
    with pytest.raises(ValidationError, match=r"(rollout|posterior)\.traces to 2 or more"):
        r.Recipe.model_validate(said | {"rollout": {"traces": 1}})
    assert r.Recipe.model_validate(said | {"rollout": {"traces": 2}, "posterior": {}}).arms[0].name == "a"


def test_every_mistake_is_listed_with_the_file_it_is_in(tmp_path: Path, file: Path) -> None:
    file.write_text(MINIMAL + '[trainer]\nrannks = 2\nseed = "x"\n')
    top = tmp_path / "top.toml"
    top.write_text('base = "recipe.toml"\nwarm_start = "initail"\n')
    lines = sorted(complaint(top).splitlines())
    assert lines == [
        f"{file}: trainer.rannks: unknown key; did you mean trainer.ranks?",
        f'{file}: trainer.seed: must be a valid integer, got "x"',
        f'{top}: warm_start: "initail" is not one of base, initial; did you mean initial?',
    ]


def test_missing_and_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text("[data.train]\nname = 'x'\n")
    lines = complaint(path).splitlines()
    assert f"{path}: model: missing; add the section with model.path" in lines
    assert f"{path}: data.eval: missing; add the section with data.eval.kind" in lines
    assert any(line.startswith(f"{path}: data.train.kind: missing; jsonl | parquet") for line in lines)
    path.write_text("a = 1\nb = \n")
    assert complaint(path).startswith(f"{path}: not valid TOML: Invalid value (at line 2")
    path.write_bytes(b"name = '\xff'")
    assert "not UTF-8" in complaint(path)
    path.write_text("base = 'gone.toml'")
    assert complaint(path) == (
        f"{path}: base: {tmp_path / 'gone.toml'}: cannot read the recipe: No such file or directory"
    )
    path.write_text("base = 'r.toml'")
    assert "already in this chain" in complaint(path)
    path.write_text("base = ['a', 'b']")
    assert "must be the path of one recipe" in complaint(path)


def leaf(key: schema.Key) -> str:
    return key.dotted.rpartition(".")[2]


def test_none_is_the_default_of_every_key_that_may_be_none() -> None:
    """`dump_recipe` leaves None out, so it must come back as None."""
    may_be_none = [key for key in schema.keys() if schema.optional(schema.child(key.section, leaf(key)))[1]]
    assert len(may_be_none) >= 7
    assert all(key.default is None for key in may_be_none)


def test_every_key_is_documented() -> None:
    assert [key.dotted for key in schema.keys() if not key.doc] == []


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
BETAS = st.floats(0, 1, exclude_max=True)
PLAIN = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | FLOATS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
POSITIVE = st.floats(1e-300, 1e300)
ABSOLUTE = TEXT.map(lambda t: Path("/data") / t.replace("\0", "").replace("/", "").strip("."))
SOURCE = st.one_of(
    st.builds(
        r.QuestionSource,
        kind=st.just("reasoning_gym"),
        name=TEXT.filter(bool),
        size=st.integers(1, 10**6),
        seed=st.integers(0, 2**40),
        options=st.dictionaries(TEXT, PLAIN, max_size=3),
    ),
    st.builds(
        r.QuestionSource,
        kind=st.sampled_from(["jsonl", "parquet", "hf_dataset"]),
        path=ABSOLUTE,
        size=st.none() | st.integers(1, 9),
        columns=st.dictionaries(TEXT, TEXT, max_size=3),
    ),
)
FIT = st.builds(
    r.Fit,
    lr=POSITIVE,
    epochs=POSITIVE,
    steps=st.none() | st.integers(1, 9),
    betas=st.tuples(BETAS, BETAS),
)
TEMPLATE = st.builds(r.TemplateSpec, prompt=TEXT, thought_end=TEXT, answer_start=TEXT, answer_end=TEXT)
ARM = st.builds(
    r.Arm,
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,6}", fullmatch=True),
    mix=st.booleans(),
    all_zero=st.sampled_from(["skip", "original", "gml"]),
)
RECIPE = st.builds(
    r.Recipe,
    name=TEXT,
    out=ABSOLUTE,
    model=st.builds(r.Model, path=ABSOLUTE),
    data=st.builds(r.Data, train=SOURCE, eval=SOURCE),
    templates=st.builds(r.Templates, policy=TEXT, custom=st.dictionaries(TEXT, TEMPLATE, max_size=2)),
    rollout=st.builds(r.Rollout, temperature=POSITIVE, context_length=st.none() | st.integers(1, 9)),
    initial=FIT,
    posterior=st.builds(r.Posterior, fit=FIT),
    final=FIT,
    arms=st.lists(ARM, min_size=1, max_size=3, unique_by=lambda arm: arm.name).map(tuple),
)


@settings(max_examples=60, deadline=None)
@given(recipe=RECIPE)
def test_dump_loads_back_to_an_equal_recipe(tmp_path_factory, recipe: r.Recipe) -> None:
    path = tmp_path_factory.getbasetemp() / "round_trip.toml"
    text = dump_recipe(recipe)
    path.write_text(text, encoding="utf-8")
    again = load_recipe(path)
    assert again == recipe
    assert dump_recipe(again) == text
    assert changes(text, text) == []


def test_none_inside_free_options_is_refused(file: Path) -> None:
    recipe = load_recipe(file)
    train = recipe.data.train.model_copy(update={"options": {"a": {"b": None}}})
    bad = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": train})})
    with pytest.raises(UserError, match=r"data\.train\.options\.a\.b"):
        dump_recipe(bad)


def test_changes_are_told_by_key_and_neutral_ones_are_not(file: Path) -> None:
    old = dump_recipe(load_recipe(file))
    options = [("final.lr", "0.5"), ("final.steps", "3"), ("arms.0.mix", "false"), ("name", "n")]
    neutral = [
        ("initial.checkpoint_every", "1"),
        ("out", "/elsewhere"),
        ("trainer.ranks", "4"),
        ("trainer.tp", "2"),
    ]
    new = dump_recipe(load_recipe(file, [*options, *neutral]))
    assert changes(old, new) == [
        "arms.0.mix: true -> false",
        "final.lr: 1e-05 -> 0.5",
        "final.steps: (none) -> 3",
    ]
