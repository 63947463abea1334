"""Run by torchrun on 4 or 8 ranks: loss, gradients and scores of one global batch under a table of layouts.

Argument: a directory with models, their references and the batch (see layout_reference.py). Rank 0 prints the worst
relative error of each layout.
"""

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from layout_reference import BALANCE, TEMPERATURE, VOCAB, routes
from megatron.core.distributed import finalize_model_grads

from megavar.config.recipe import Fit
from megavar.data.training_set import Example, TrainingSet
from megavar.models.parallel_layout import ParallelLayout
from megavar.parallel.groups import Groups, initialize
from megavar.trainer.model import Model, Settings, load_model
from megavar.trainer.optimizer import prepare_training, release_training
from megavar.trainer.score import score
from megavar.trainer.step import backward_global_batch

PLAIN = Settings(dtype="float32")
SP = replace(PLAIN, sequence_parallel=True)
BF16 = replace(SP, dtype="bfloat16")
WHOLE, HALF, LEAST = 1.0, 0.4, 0.0
"""Budget of a micro-batch as a share of the tokens of the batch; at 0 half the longest example, which is then alone."""

LONGEST = 32768
"""Tokens of the trace that is split over ranks."""

Case = tuple[dict[str, int], Settings, float]

DENSE_4: dict[str, Case] = {
    "dp4": ({}, PLAIN, WHOLE),
    "dp4 accumulate": ({}, PLAIN, LEAST),
    "tp2 dp2 accumulate": (dict(tp=2), PLAIN, HALF),
    "tp2 dp2 sp": (dict(tp=2), SP, WHOLE),
    "tp2 dp2 sp unpacked": (dict(tp=2), replace(SP, packing=False), WHOLE),
    "tp2 dp2 selective": (dict(tp=2), replace(SP, recompute="selective"), HALF),
    "tp4 sp": (dict(tp=4), SP, HALF),
    "pp2 dp2": (dict(pp=2), PLAIN, HALF),
    "pp2 dp2 unpacked": (dict(pp=2), replace(PLAIN, packing=False), WHOLE),
    "pp4": (dict(pp=4), PLAIN, LEAST),
    "pp2 vpp2 dp2": (dict(pp=2, vpp=2), PLAIN, LEAST),
    "tp2 pp2": (dict(tp=2, pp=2), PLAIN, HALF),
    "tp2 pp2 sp full": (dict(tp=2, pp=2), replace(SP, recompute="full"), HALF),
    "tp2 pp2 vpp2 sp": (dict(tp=2, pp=2, vpp=2), SP, HALF),
    "cp2 dp2": (dict(cp=2), PLAIN, HALF),
    "cp4": (dict(cp=4), PLAIN, WHOLE),
    "cp4 unpacked": (dict(cp=4), replace(PLAIN, packing=False), WHOLE),
    "cp2 tp2 sp": (dict(cp=2, tp=2), SP, HALF),
    "cp2 pp2 full": (dict(cp=2, pp=2), replace(PLAIN, recompute="full"), HALF),
    "cp2 pp2 vpp2 selective": (dict(cp=2, pp=2, vpp=2), replace(PLAIN, recompute="selective"), LEAST),
    "cp2 tp2 sp bf16": (dict(cp=2, tp=2), BF16, HALF),
}
BIASED_4: dict[str, Case] = {
    "tp2 dp2": (dict(tp=2), PLAIN, HALF),
    "tp2 pp2 vpp2 sp": (dict(tp=2, pp=2, vpp=2), SP, HALF),
    "cp2 pp2": (dict(cp=2, pp=2), PLAIN, HALF),
}
MIXTURE_4: dict[str, Case] = {
    "dp4": ({}, PLAIN, WHOLE),
    "tp2 dp2 sp": (dict(tp=2), SP, HALF),
    "ep2": (dict(ep=2), PLAIN, HALF),
    "ep4": (dict(ep=4), PLAIN, LEAST),
    "etp2": (dict(etp=2), PLAIN, HALF),
    "ep2 etp2": (dict(ep=2, etp=2), PLAIN, HALF),
    "ep2 tp2 sp": (dict(ep=2, tp=2), SP, HALF),
    "ep2 etp2 tp2 sp": (dict(ep=2, etp=2, tp=2), SP, LEAST),
    "ep2 pp2 full": (dict(ep=2, pp=2), replace(PLAIN, recompute="full"), HALF),
    "ep2 pp2 vpp2": (dict(ep=2, pp=2, vpp=2), PLAIN, LEAST),
    "ep2 cp2 selective": (dict(ep=2, cp=2), replace(PLAIN, recompute="selective"), HALF),
    "ep4 cp2 tp2 sp": (dict(ep=4, cp=2, tp=2), SP, HALF),
}
PLAIN_MIXTURE_4: dict[str, Case] = {
    "ep2": (dict(ep=2), PLAIN, HALF),
    "ep2 pp2": (dict(ep=2, pp=2), PLAIN, HALF),
}
DENSE_8: dict[str, Case] = {
    "tp2 pp2 cp2 sp": (dict(tp=2, pp=2, cp=2), SP, HALF),
    "tp2 pp2 vpp2 dp2 sp full": (dict(tp=2, pp=2, vpp=2), replace(SP, recompute="full"), LEAST),
    "cp2 pp2 dp2": (dict(cp=2, pp=2), PLAIN, HALF),
}
MIXTURE_8: dict[str, Case] = {
    "ep2 tp2 pp2 sp": (dict(ep=2, tp=2, pp=2), SP, HALF),
    "ep2 etp2 tp2 pp2 vpp2 sp": (dict(ep=2, etp=2, tp=2, pp=2, vpp=2), SP, HALF),
    "ep4 cp2 tp2 sp dp2": (dict(ep=4, cp=2, tp=2), SP, LEAST),
}
REPLAYED_4: dict[str, Case] = {
    "dp4 accumulate": ({}, PLAIN, LEAST),
    "ep2 pp2 vpp2 full": (dict(ep=2, pp=2, vpp=2), replace(PLAIN, recompute="full"), LEAST),
    "cp2 tp2 sp": (dict(cp=2, tp=2), SP, HALF),
}
BALANCED_4: dict[str, Case] = {
    "tp4 sp": (dict(tp=4), replace(SP, expert_balance=BALANCE), WHOLE),
    "tp2 pp2 sp ep2": (dict(tp=2, pp=2, ep=2), replace(SP, expert_balance=BALANCE), WHOLE),
}
"""One micro-batch without padding, since the mean that balances is of a micro-batch."""
TABLE = {
    (4, "qwen3"): DENSE_4,
    (4, "qwen2"): BIASED_4,
    (4, "qwen3_moe"): MIXTURE_4,
    (4, "qwen3_moe_plain"): PLAIN_MIXTURE_4,
    (4, "qwen3_moe replayed"): REPLAYED_4,
    (4, "qwen3_moe_plain replayed"): {
        "ep2 pp2 full": (dict(ep=2, pp=2), replace(PLAIN, recompute="full"), HALF)
    },
    (4, "qwen3_moe balanced"): BALANCED_4,
    (8, "qwen3"): DENSE_8,
    (8, "qwen3_moe"): MIXTURE_8,
}


def whole_gradients(*args: Any, **kwargs: Any) -> None:
    """The distributed optimizer leaves each rank a shard of the sum; here every rank gets it whole."""
    finalize_model_grads(*args, **{**kwargs, "force_all_reduce": True})


def gradient_error(model: Model, wanted: Model) -> tuple[float, str]:
    """Largest relative error of this rank's gradients, and the parameter it is of."""
    worst = (0.0, "")
    for chunk, theirs in zip(model.chunks, wanted.chunks, strict=True):
        want = {name: p.detach() for name, p in theirs.named_parameters()}
        for name, p in chunk.named_parameters():
            error = float((p.main_grad - want[name]).norm() / want[name].norm().clamp_min(1e-12))
            worst = max(worst, (error, name))
    return worst


def score_error(scored: list[np.ndarray], wanted: list[list[float]]) -> float:
    """Largest absolute error of a log-prob."""
    for got, want in zip(scored, wanted, strict=True):
        assert got.shape == (len(want),)
    return max(float(np.abs(got - np.array(want)).max()) for got, want in zip(scored, wanted, strict=True))


def check(root: Path, name: str, groups: Groups, settings: Settings, share: float) -> dict[str, Any]:
    training_set = TrainingSet(root / "batch.arrow")
    examples: list[Example] = [training_set[i] for i in range(training_set.num_examples)]
    if "replayed" in name:
        examples = [replace(e, experts=routes(i, e)) for i, e in enumerate(examples)]
    reference = json.loads((root / "references" / name / "reference.json").read_text())
    budget = int(share * sum(len(e.ids) for e in examples)) or training_set.longest() // 2
    model = load_model(root / "models" / name.split()[0], groups, settings)
    mine = range(groups.dp_rank, len(examples), groups.dp)
    counted = Counter[str]()
    scored = score(
        model,
        [examples[i] for i in mine],
        temperature=TEMPERATURE,
        tokens_per_micro_batch=budget,
        counted=counted,
    )
    counts = torch.tensor([counted["scored"], counted["replayed"]])
    dist.all_reduce(counts)
    assert (scored is None) == (not groups.is_last_stage)
    scores = score_error(scored, [reference["scores"][i] for i in mine]) if scored else 0.0
    training = prepare_training(model, Fit(steps=1), steps=1)
    model.config.finalize_model_grads_func = whole_gradients
    metrics = backward_global_batch(
        model,
        training,
        examples,
        questions=training_set.num_questions,
        normaliser=training_set.normaliser,
        tokens_per_micro_batch=budget,
    )
    tokens = sum(e.response_length for e in examples)
    recorded = [(e.response_start, np.asarray(e.experts)) for e in examples if e.experts is not None]
    replayed = sum(int((experts[start - 1 :, 0, 0] >= 0).sum()) for start, experts in recorded)
    assert (replayed > 0) == ("replayed" in name)
    assert (metrics.response_tokens, metrics.replayed_tokens) == (tokens, replayed) == tuple(counts.tolist())
    gradient, where = gradient_error(model, load_model(root / "references" / name, groups, settings))
    # Also the norm that clips: each parameter counted once, wherever and however often it is held.
    _, norm, _ = training.optimizer.step()
    release_training(model, training)
    return {
        "norm": abs(float(norm) - reference["norm"]) / reference["norm"],
        "loss": abs(metrics.loss - reference["loss"]) / abs(reference["loss"]),
        "gradient": gradient,
        "where": where,
        "scores": scores,
        "micro_batches": metrics.micro_batches,
    }


def long_trace(root: Path) -> dict[str, dict[str, Any]]:
    """A row of a trace of 32768 tokens and a tiny one, split over 2 and 4 ranks, against each alone on one rank.

    Memory above what was held before: a mask of the row's pairs would take 1 GiB, a head's scores 4.
    """
    rng = np.random.default_rng(0)
    traces = [
        Example(
            question_id=f"{n} tokens",
            ids=rng.integers(0, VOCAB, n + 1).astype(np.int32),
            response_start=n // 100 + 1,
            weight=1.0,
        )
        for n in (LONGEST, 40)
    ]
    alone: tuple[float, dict[str, torch.Tensor], list[np.ndarray]] | None = None
    report: dict[str, dict[str, Any]] = {}
    for cp in (1, 2, 4):
        groups = initialize(ParallelLayout(ranks=4, cp=cp))
        model = load_model(root / "models" / "long", groups, PLAIN)
        training = prepare_training(model, Fit(steps=1), steps=1)
        model.config.finalize_model_grads_func = whole_gradients
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = memory_mib("VmRSS")
        # With two data-parallel ranks each has the row, at half its weight.
        copies = 2 if cp == 2 else 1
        batch = [replace(trace, weight=1 / copies) for _ in range(copies) for trace in traces]
        scored = score(
            model,
            traces if cp > 1 else traces[groups.dp_rank : groups.dp_rank + 1],
            temperature=1.0,
            tokens_per_micro_batch=LONGEST + 48,
        )
        metrics = backward_global_batch(
            model, training, batch, questions=2, normaliser=1e4, tokens_per_micro_batch=LONGEST + 48
        )
        assert metrics.micro_batches == 1
        peak = memory_mib("VmHWM") - before
        gradients = {n: p.main_grad.clone() for n, p in model.chunks[0].named_parameters()}
        release_training(model, training)
        everyone: list[Any] = [None] * 4
        dist.all_gather_object(everyone, (scored, peak))
        if alone is None:
            alone = metrics.loss, gradients, [everyone[0][0][0], everyone[1][0][0]]
            continue
        report[f"long trace: cp{cp}"] = {
            "loss": abs(alone[0] - metrics.loss) / alone[0],
            "norm": 0.0,
            "gradient": max(float((gradients[n] - g).norm() / g.norm()) for n, g in alone[1].items()),
            "scores": score_error(scored or [], [found.tolist() for found in alone[2]]),
            "peak_mib": max(found[1] for found in everyone),
        }
    return report


def memory_mib(field: str) -> float:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field)) / 1024


def main() -> None:
    root = Path(sys.argv[1])
    dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    report: dict[str, dict] = {}
    for (size, name), cases in TABLE.items():
        for layout, (sizes, settings, share) in cases.items() if size == ranks else ():
            groups = initialize(ParallelLayout(ranks=ranks, **sizes))
            found = check(root, name, groups, settings, share)
            everyone: list[dict] = [{}] * ranks
            dist.all_gather_object(everyone, found)
            worst = max(everyone, key=lambda e: e["gradient"])
            worst["scores"] = max(e["scores"] for e in everyone)
            report[f"{name}: {layout}"] = worst
    if ranks == 4:
        everyone = [{}] * ranks
        dist.all_gather_object(everyone, long_trace(root))
        for layout in ("long trace: cp2", "long trace: cp4"):
            report[layout] = {n: max(e[layout][n] for e in everyone) for n in everyone[0][layout]}
    if dist.get_rank() == 0:
        print("REPORT " + json.dumps(report), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
