"""Bad input ends in one clear error before any rank starts, or, where only training can tell, with nothing lost."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from small_recipe import megavar, visible_files

from megavar.cli import main


@pytest.fixture
def spoiled(plain_run, inputs: Path, tmp_path: Path) -> Path:
    """A recipe with inputs of its own; nothing has run."""
    shutil.copytree(inputs, tmp_path / "inputs")
    recipe = tmp_path / "run.toml"
    text = plain_run.recipe.read_text().replace(str(plain_run.path), str(tmp_path / "run"))
    recipe.write_text(text.replace(str(inputs), str(tmp_path / "inputs")))
    return recipe


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_questions(inputs: Path, change: Callable[[list[dict]], list[dict]]) -> None:
    path = inputs / "train.jsonl"
    questions = change([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text("".join(json.dumps(q) + "\n" for q in questions))


def without(field: str) -> Callable[[Path], None]:
    return lambda inputs: edit_questions(inputs, lambda qs: [qs[0], {**qs[1], field: ""}, *qs[2:]])


def longer(field: str) -> Callable[[Path], None]:
    return lambda inputs: edit_questions(inputs, lambda qs: [{**qs[0], field: "1 + 2 = " * 60}, *qs[1:]])


def truncate(inputs: Path) -> None:
    weights = inputs / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def unlink(*names: str) -> Callable[[Path], None]:
    def remove(inputs: Path) -> None:
        for name in names:
            (inputs / "model" / name).unlink()

    return remove


def nothing(inputs: Path) -> None: ...


@pytest.mark.parametrize(
    ("spoil", "options", "said"),
    [
        (unlink("model.safetensors"), [], ["model holds neither", "model.safetensors", "download"]),
        (truncate, [], ["model.safetensors is truncated", "download it again"]),
        (
            lambda inputs: edit_json(inputs / "model" / "config.json", model_type="gpt2"),
            [],
            ["config.json: model_type: 'gpt2' is not supported", "qwen3"],
        ),
        (unlink("config.json"), [], ["config.json does not exist"]),
        (unlink("tokenizer.json", "tokenizer_config.json"), [], ["inputs/model: no tokenizer", "copy"]),
        (
            lambda inputs: (inputs / "model/tokenizer.json").write_text("{}"),
            [],
            ["inputs/model: its tokenizer cannot be loaded", "copy"],
        ),
        (
            nothing,
            ["--trainer.tp", "8", "--trainer.ranks", "8"],
            ["tp=8 does not divide", "heads", "nearest valid tp: 2"],
        ),
        (
            nothing,
            ["--trainer.tp", "4", "--trainer.ranks", "4"],
            ["tp=4 does not divide the model's 2 KV heads"],
        ),
        (
            nothing,
            ["--trainer.pp", "3", "--trainer.ranks", "3"],
            ["pp=3 does not divide the model's 2 layers"],
        ),
        (lambda inputs: edit_questions(inputs, lambda _: []), [], ["train.jsonl: no questions in it"]),
        (
            without("solution"),
            [],
            ["1 of 48 questions have no reference solution", "chain_sum/0/1", "columns"],
        ),
        (without("trace"), [], ["1 of 48 questions have no reference trace", "chain_sum/0/1", "columns"]),
        (longer("prompt"), [], ["1 of 48 questions do not fit a context of 128 tokens", "chain_sum/0/0"]),
        (
            longer("trace"),
            [],
            ["question 'chain_sum/0/0': its prompt, trace and solution take", "context is 128"],
        ),
        (nothing, ["--rollout.max_thought_tokens", "120"], ["set rollout.max_thought_tokens to at most"]),
        (
            nothing,
            ["--rollout.max_thought_tokens", "40", "--rollout.context_length", "50"],
            ["leave no room for an answer in 50 tokens", "set rollout.max_thought_tokens to at most"],
        ),
        (
            nothing,
            ["--rollout.context_length", "129"],
            ["rollout.context_length is 129: the model's context is 128; leave it out"],
        ),
        (
            nothing,
            ["--data.train.size", "49"],
            ["data.train: ", "48 questions in it, size = 49 asks for more"],
        ),
        (
            nothing,
            ["--data.eval.name", "chain_sums"],
            ["data.eval: reasoning_gym has no dataset", "did you mean 'chain_sum'?"],
        ),
        (
            nothing,
            ["--rollout.engine", "sglang", "--rollout.servers.venv", "/nowhere"],
            ["no engine environment at /nowhere; build it with `make engine-env`"],
        ),
        (
            nothing,
            ["--trainer.tokens_per_micro_batch", "40", "--rollout.max_thought_tokens", "30"],
            ["trainer.tokens_per_micro_batch is 40: a trace of question", "set it to at least"],
        ),
        (
            nothing,
            ["--trainer.scoring_tokens_per_micro_batch", "40", "--rollout.max_thought_tokens", "30"],
            ["trainer.scoring_tokens_per_micro_batch is 40: a trace of question", "leave it out, or lower"],
        ),
        (
            lambda inputs: edit_questions(
                inputs, lambda qs: [*qs[:3], {**qs[3], "trace": "9" * 60}, *qs[4:]]
            ),
            ["--trainer.tokens_per_micro_batch", "70", "--rollout.max_thought_tokens", "10"],
            ["trainer.tokens_per_micro_batch is 70: the data set's trace of question 'chain_sum/0/3' has"],
        ),
        (
            nothing,
            ["--trainer.megatron.fp8_recipie", "delayed"],
            ["trainer.megatron.fp8_recipie: no field of Megatron-Core", "did you mean 'fp8_recipe'?"],
        ),
        (
            nothing,
            ["--trainer.megatron.fp8", "hybrid"],
            ['trainer.megatron.fp8 needs model.dtype = "bfloat16"'],
        ),
        (
            nothing,
            ["--rollout.engine", "sglang", "--rollout.replay_experts", "true"],
            ["rollout.replay_experts: a qwen3 model has no experts; set it to false"],
        ),
        (nothing, ["--rollout.replay_experts", "true"], ['needs engine = "sglang"', "records no experts"]),
        (
            nothing,
            ["--until", "initial/fitt"],
            ["--until initial/fitt: no such phase; did you mean 'initial/fit'?"],
        ),
        (nothing, ["--rounds", "2"], ["rounds=2 needs exactly one arm"]),
        (nothing, ["--rollout.staleness", "1"], ["rollout.staleness", "needs rounds > 1"]),
        (nothing, ["--rollout.servers.transport", "direct"], ['"direct" needs engine = "sglang"']),
        (nothing, ["--arms.acc.name", "initial"], ['arms: the name "initial"']),
        (nothing, ["--templates.policy", "qwen3_thinking"], ["no template 'qwen3_thinking'; did you mean"]),
    ],
)
def test_refused_before_a_rank_starts(
    spoil: Callable[[Path], None],
    options: list[str],
    said: list[str],
    spoiled: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(spoiled.parent / "inputs")
    status = main(["run", str(spoiled), *options])
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert all(text in error for text in said), error
    assert not (spoiled.parent / "run").exists()


def test_a_run_directory_that_cannot_be_written(spoiled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (spoiled.parent / "file").write_text("")
    assert main(["run", str(spoiled), "--out", str(spoiled.parent / "file" / "run")]) == 2
    error = capsys.readouterr().err
    assert "file/run: cannot write to it: Not a directory; set --out" in error


def test_a_loss_that_is_not_a_number_loses_no_finished_phase(plain_run, tmp_path: Path) -> None:
    run = shutil.copytree(plain_run.path, tmp_path / "run")
    kept = {
        n: f for n, f in visible_files(run).items() if n.startswith(("initial", "posterior", "proposals"))
    }
    options = ["--out", run, "--final.lr", "1e30", "--force"]
    done = megavar("run", plain_run.recipe, *options)
    assert done.returncode == 2
    error = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and error[0].startswith("error: arms/rft/fit: the loss is "), done.stderr
    assert re.search(r"at step \d of 4; finished phases .* are kept. Lower `lr`", error[0])
    after = visible_files(run)
    assert all(after[name] == file for name, file in kept.items())
