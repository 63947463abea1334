"""`megavar plan`: its verdict, the change that fixes it, its drawing, and layouts that cannot be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megavar.cli import main
from megavar.models.architecture import read_architecture
from megavar.models.flops import forward_flops
from megavar.models.parallel_layout import ParallelLayout
from megavar.plan.activations import Operators
from megavar.plan.plan import make_plan
from megavar.plan.request import EngineWork, FitWork, Request
from megavar.plan.search import changes, cheapest_fit, cost
from megavar.plan.show import draw
from megavar.plan.work import PEAK_FLOPS, TRAINING_EFFICIENCY, step_work

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPE = """
[model]
path = "{model}"
[data.train]
kind = "jsonl"
path = "q.jsonl"
[data.eval]
kind = "jsonl"
path = "q.jsonl"
[rollout]
engine = "sglang"
[rollout.servers]
urls = ["http://10.0.0.1:30000", "http://10.0.0.2:30000"]
tp = 4
"""


@pytest.fixture
def recipe(tmp_path: Path):
    def write(name: str) -> str:
        path = tmp_path / "recipe.toml"
        path.write_text(RECIPE.format(model=CONFIGS / name))
        return str(path)

    return write


def request_for(name: str, ranks: int = 16, **sizes: int) -> Request:
    layout = ParallelLayout(ranks=ranks, **sizes)
    return Request(
        architecture=read_architecture(CONFIGS / name),
        layout=layout,
        operators=Operators(
            stack="transformer-engine", device="cuda", item=2, sequence_parallel=layout.tp > 1
        ),
        packing=True,
        tokens_per_micro_batch=32768,
        scoring_tokens_per_micro_batch=65536,
        longest=32768,
        mean=8192,
        fits=(FitWork(name="final", examples=1536),),
        engines=(EngineWork(kind="sglang", count=4, tp=4, running=256, shares_gpus=False),),
        traces=8,
        answers=8,
        answer_tokens=512,
        gpu_bytes=80 << 30,
    )


def test_verdict_of_a_recipe_that_does_not_fit_names_the_change(recipe, capsys) -> None:
    """Qwen3-8B on 2 x 8 GPUs of 80 GiB with traces of 32k tokens, as the defaults have it: 16 whole replicas."""
    assert main(["plan", recipe("Qwen3-8B"), "--gpus", "16"]) == 1
    shown = capsys.readouterr().out
    assert "out of memory: training would take" in shown and "cheapest change that fits: --trainer." in shown
    assert "ranks = tp 1 x cp 1 x dp 16 x pp 1" in shown and "OUT OF MEMORY" in shown
    assert "assumed, not measured" in shown and "989 TFLOP/s" in shown
    options = shown.split("cheapest change that fits: ")[1].splitlines()[0].split()
    assert main(["plan", recipe("Qwen3-8B"), "--gpus", "16", *options]) == 0
    assert "fits: training takes the most" in capsys.readouterr().out


def test_json_holds_what_the_tables_show(recipe, capsys) -> None:
    words = ["plan", recipe("Qwen3-8B"), "--gpus", "16", "--json", "--trainer.tp", "4", "--trainer.pp", "2"]
    assert main([*words, "--trainer.recompute", "full", "--trainer.sequence_parallel", "true"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["fits"] and report["parameters"] == 8_190_735_360
    assert report["layout"]["dp"] == 2 and len(report["layout"]["places"]) == 16
    assert report["layout"]["stages"] == ["embedding, layers 0-17", "layers 18-35, output projection"]
    assert len(report["memory"]["training"]) == 2
    assert report["peaks"]["training"] == max(stage["peak"] for stage in report["memory"]["training"])
    assert {step["name"] for step in report["steps"]} >= {"initial", "posterior"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--trainer.tp", "3", "--gpus", "12"], "tp=3 does not divide"),
        (["--trainer.pp", "5", "--gpus", "10"], "pp=5 does not divide"),
        (["--trainer.tp", "8", "--gpus", "12"], "not a multiple of tp*cp*pp=8"),
        (["--trainer.ep", "2", "--gpus", "2"], "has no experts"),
        (["--longest", "100000"], "context of 40960"),
        (["--longest", "100", "--mean", "200"], "--mean 200"),
        (["--trainer.tq", "3"], "trainer.tp"),
    ],
)
def test_what_cannot_be_gets_one_line(recipe, capsys, options: list[str], words: str) -> None:
    assert main(["plan", recipe("Qwen3-8B"), *options]) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) == 1


def test_servers_on_the_trainers_gpus_and_the_engine_in_process_are_counted(recipe, capsys) -> None:
    words = ["plan", recipe("Qwen3-4B"), "--json", "--gpus", "8", "--longest", "4096", "--trainer.tp", "4"]
    words += ["--trainer.sequence_parallel", "true"]
    assert main([*words]) == 0
    assert json.loads(capsys.readouterr().out)["memory"]["training"][0]["engine"] == 0
    # 4,022,468,096 weights and 32,768 tokens of 2 * 36 * 8 * 128 * 2 bytes, over 4; 3 GiB beside
    main([*words, "--rollout.servers.urls", "[]", "--rollout.servers.kv_tokens", "32768"])
    training = json.loads(capsys.readouterr().out)["memory"]["training"][0]
    four = ("--trainer.ranks", "4", "--gpus", "4")
    assert training["engine"] == 2 * 4_022_468_096 // 4 + 32768 * 147_456 // 4 + 3 * 2**30
    main(
        [*words, "--rollout.servers.urls", "[]", "--rollout.servers.devices", '[["4", "5", "6", "7"]]', *four]
    )
    assert json.loads(capsys.readouterr().out)["memory"]["training"][0]["engine"] == 0
    main([*words, "--rollout.engine", "local"])
    report = json.loads(capsys.readouterr().out)
    assert report["memory"]["scoring"][0]["engine"] == 2 * 4_022_468_096
    assert report["memory"]["sampling in process"][0]["engine"] > 2 * 4_022_468_096


@pytest.mark.parametrize(
    ("name", "split", "projections"),
    [
        # 36 layers of hidden 2560: q and o of 32 heads of 128, k and v of 8, three of 9728; over tp 2
        ("Qwen3-4B", ("tp", 2), 36 * 2560 * (2 * 4096 + 2 * 1024 + 3 * 9728) // 2),
        # 48 layers of hidden 2048: attention whole, 128 experts of three projections of 768 over ep 8; not the router
        ("Qwen3-30B-A3B", ("ep", 8), 48 * 2048 * (2 * 4096 + 2 * 512 + 128 // 8 * 3 * 768)),
    ],
)
def test_fp8_keeps_two_more_bytes_of_each_projection(
    recipe, capsys, name: str, split: tuple[str, int], projections: int
) -> None:
    words = ["plan", recipe(name), "--json", "--gpus", "8", f"--trainer.{split[0]}", str(split[1])]
    main(words)
    plain = json.loads(capsys.readouterr().out)["memory"]
    main([*words, "--trainer.megatron.fp8", "hybrid"])
    fp8 = json.loads(capsys.readouterr().out)["memory"]
    for kind in ("training", "scoring"):
        assert fp8[kind][0]["weights"] - plain[kind][0]["weights"] == 2 * projections
        assert fp8[kind][0]["activations"] == plain[kind][0]["activations"]


def test_drawing_places_every_rank() -> None:
    lines = draw(request_for("Qwen3-8B", tp=2, pp=2, vpp=3))
    assert lines[1].split("  ")[1:4] == ["node 0: pp0 dp0 tp0", "pp0 dp0 tp1", "pp0 dp1 tp0"]
    assert lines[3] == "  stage 0: embedding, layers 0-5, 12-17, 24-29"
    assert lines[4] == "  stage 1: layers 6-11, 18-23, 30-35, output projection"


def test_step_flops_and_seconds() -> None:
    """6 N D + attention: one Qwen3-8B step of 1,536 examples of 8,192 tokens, by hand."""
    request = request_for("Qwen3-8B", tp=2)
    (fit,) = request.fits
    step = step_work(request, fit)
    # multiply-adds per token: layers 36 * 192,937,984, output 4096 * 151936; attention 36 * 2 * 4096 per pair, n^2 / 2
    forward = 2 * (36 * 192_937_984 + 4096 * 151_936) * 8192 + 36 * 2 * 4096 * 8192**2
    assert forward_flops(request.architecture, 8192) == forward
    assert step.model_flops == 3 * forward * 1536
    # the output projection is computed twice: no logits are kept
    assert step.computed_flops == pytest.approx(3 * forward * 1536 + 1536 * 8192 * 2 * 4096 * 151_936)
    assert step.seconds == pytest.approx(step.computed_flops / (16 * PEAK_FLOPS[2] * TRAINING_EFFICIENCY))
    assert (step.micro_batches, step.idle, step.imbalance) == (48, 0.0, 1.0)
    full = replace(request, operators=replace(request.operators, recompute="full"))
    assert step_work(full, fit).computed_flops == 4 * forward * 1536
    piped = step_work(replace(request, layout=ParallelLayout(ranks=16, tp=2, pp=4)), fit)
    assert piped.micro_batches == 192 and piped.idle == pytest.approx(3 / 195)
    assert piped.imbalance > 1.1


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["Qwen3-4B", "Qwen3-8B", "Qwen2.5-7B", "Qwen2.5-32B", "Qwen3-30B-A3B"]),
    ranks=st.sampled_from([1, 4, 8, 16, 64]),
    gib=st.integers(16, 192),
    longest=st.sampled_from([4096, 16384, 32768]),
)
def test_the_change_found_fits_and_nothing_cheaper_of_the_simple_changes_does(
    name: str, ranks: int, gib: int, longest: int
) -> None:
    request = replace(request_for(name, ranks), gpu_bytes=gib << 30, longest=longest, mean=longest // 2)
    plan = make_plan(request)
    if plan.fits:
        assert plan.peak <= request.gpu_bytes
        return
    fix = cheapest_fit(plan)
    for recompute in ("selective", "full"):
        changed = replace(request, operators=replace(request.operators, recompute=recompute))
        if make_plan(changed).fits:
            assert fix is not None and cost(request, fix.request) <= cost(request, changed)
    if fix is not None:
        assert fix.fits and changes(request, fix.request)
        assert fix.request.layout.ranks == ranks
        fix.request.architecture.check_layout(fix.request.layout)
