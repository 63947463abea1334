"""Run by torchrun on 4 ranks: Hugging Face -> Megatron under many layouts -> Hugging Face, and its logits.

Arguments: a directory of tiny checkpoints, a work directory. Rank 0 prints the report.
"""

import json
import resource
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.transformer.module import Float16Module
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megavar.commands import convert
from megavar.commands.checkpoint import sharded
from megavar.commands.stored import Stored, find_stored, load_stored
from megavar.errors import UserError
from megavar.models.architecture import read_architecture
from megavar.models.build import build_model, transformer_config
from megavar.models.hf_export import export_hf, verify_export
from megavar.models.hf_import import load_hf_weights
from megavar.models.parallel_layout import ParallelLayout
from megavar.parallel.groups import Groups, initialize

LAYOUTS = {
    "tp1": ParallelLayout(ranks=4),
    "tp2": ParallelLayout(ranks=4, tp=2),
    "pp2": ParallelLayout(ranks=4, pp=2),
    "pp2 vpp2": ParallelLayout(ranks=4, pp=2, vpp=2),
    "tp2 pp2": ParallelLayout(ranks=4, tp=2, pp=2),
}
EXPERT_LAYOUTS = {
    "ep2": ParallelLayout(ranks=4, ep=2),
    "ep2 pp2": ParallelLayout(ranks=4, pp=2, ep=2),
    "ep2 etp2": ParallelLayout(ranks=4, ep=2, etp=2),
    "ep4 tp2": ParallelLayout(ranks=4, tp=2, ep=4),
    "etp2 pp2 vpp2": ParallelLayout(ranks=4, pp=2, vpp=2, etp=2),
}


def stored(path: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in path.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def bitwise_equal(one: Path, other: Path) -> bool:
    a, b = stored(one), stored(other)
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def build(hf: Path, groups: Groups, dtype: torch.dtype) -> list[torch.nn.Module]:
    architecture = read_architecture(hf)
    config = transformer_config(architecture, groups, dtype=dtype)
    chunks = build_model(architecture, config, groups)
    with torch.no_grad():
        for chunk in chunks:
            for p in chunk.parameters():
                p.fill_(float("nan"))  # whatever import leaves out shows in the logits
    load_hf_weights(chunks, architecture, hf)
    return chunks


@torch.no_grad()
def logits_error(chunks: list[torch.nn.Module], hf: Path) -> float:
    """Largest absolute difference to transformers' logits; 0 on ranks that hold no logits."""
    tokens = torch.randint(0, 83, (2, 24), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(24).expand(2, -1)

    def step(_: Any, module: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        return module(tokens, positions, None), lambda out, non_loss_data: out

    outputs = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[None] * len(chunks),
        model=[chunk.eval() for chunk in chunks],
        num_microbatches=len(chunks),
        seq_length=24,
        micro_batch_size=2,
        forward_only=True,
        collect_non_loss_data=True,
    )
    if not outputs:
        return 0.0
    want = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)(tokens).logits
    got = gather_from_tensor_model_parallel_region(outputs[0])
    assert torch.all(got[..., 83:] == 0), "padding of the vocabulary must be zero"
    return (got[..., :83] - want).abs().max().item()


def worst(value: float) -> float:
    everyone = torch.tensor(value)
    dist.all_reduce(everyone, op=dist.ReduceOp.MAX)
    return everyone.item()


def round_trips(models: Path, work: Path) -> dict[str, dict[str, Any]]:
    report = {}
    for layout, sizes in LAYOUTS.items():
        groups = initialize(sizes)
        for hf in sorted(models.iterdir()):
            fp32 = "bf16" not in hf.name
            chunks = build(hf, groups, torch.float32 if fp32 else torch.bfloat16)
            error = worst(logits_error(chunks, hf)) if fp32 else None
            if not fp32:
                chunks = [Float16Module(chunk.config, chunk) for chunk in chunks]
            out = work / f"{hf.name} {layout}"
            export_hf(chunks, read_architecture(hf), hf, out, max_shard_bytes=30_000)
            if groups.is_main:
                verify_export(out, load=True)
                report[out.name] = {
                    "logits": error,
                    "bitwise": bitwise_equal(hf, out),
                    "files": len(list(out.glob("*.safetensors"))),
                    "largest": max(f.stat().st_size for f in out.glob("*.safetensors")),
                    "config same": (hf / "config.json").read_bytes() == (out / "config.json").read_bytes(),
                }
    return report


def experts_split_over_ranks(moe: Path, work: Path) -> dict[str, Any]:
    """Expert and expert-tensor parallelism, alone and with others."""
    report = {}
    for layout, sizes in EXPERT_LAYOUTS.items():
        groups = initialize(sizes)
        chunks = build(moe, groups, torch.float32)
        error = worst(logits_error(chunks, moe))
        export_hf(chunks, read_architecture(moe), moe, work / layout)
        if groups.is_main:
            report[layout] = {"logits": error, "bitwise": bitwise_equal(moe, work / layout)}
    return report


def conversions(models: Path, work: Path) -> dict[str, Any]:
    """What `convert` writes loads under every layout; what every layout writes, `convert` reads."""
    report = {}
    cases = {"llama_tied": ("tp2 pp2", "pp2 vpp2"), "qwen2_untied": ("tp2 pp2", "pp2 vpp2")}
    cases["qwen3_moe"] = ("ep2 etp2", "ep4 tp2")
    for name, layouts in cases.items():
        hf, checkpoint = models / name, work / f"{name} streamed"
        for layout in layouts:
            groups = initialize((LAYOUTS | EXPERT_LAYOUTS)[layout])
            if groups.is_main and not checkpoint.exists():
                made = convert.to_megatron(hf, checkpoint, dtype=None, max_file_bytes=20_000)
                convert.publish(made, checkpoint)
            dist.barrier()
            chunks, _ = load_stored(find_stored(checkpoint, None), groups)
            error = worst(logits_error(chunks, hf))
            written = work / f"{name} {layout}"
            if groups.is_main:
                written.mkdir()
            dist.barrier()
            state = {"model": sharded(chunks), "moments 0": moments()}
            dist_checkpointing.save(state, str(written))
            if groups.is_main:
                out = work / f"{name} {layout} hf"
                back = convert.to_hf(Stored(written, hf, False), out, dtype=None, max_file_bytes=30_000)
                convert.publish(back, out)
                report[written.name] = {"logits": error, "bitwise": bitwise_equal(hf, out)}
    return report


def moments() -> dict[str, Any]:
    """As a fit's checkpoint holds them beside the weights, under names of their own."""
    name, rank = "embedding.word_embeddings.weight", dist.get_rank()
    return {
        "m": ShardedTensor.from_rank_offsets(
            f"optimizer.state.exp_avg.{name}", torch.ones(3, 5), (0, rank, dist.get_world_size())
        )
    }


def casts(models: Path, work: Path) -> dict[str, Any]:
    """bf16 weights trained in fp32 and written back in either type; one file."""
    groups = initialize(ParallelLayout(ranks=4, tp=2))
    hf = models / "qwen3_untied_bf16"
    chunks = build(hf, groups, torch.float32)
    architecture = read_architecture(hf)
    export_hf(chunks, architecture, hf, work / "back", dtype="bfloat16")
    export_hf(chunks, architecture, hf, work / "wide")
    if not groups.is_main:
        return {}
    wide = read_architecture(work / "wide")
    return {
        "back": bitwise_equal(hf, work / "back"),
        "files": sorted(p.name for p in (work / "back").iterdir()),
        "wide": wide.dtype,
        "wide is exact": all(torch.equal(t, stored(hf)[n].float()) for n, t in stored(work / "wide").items()),
    }


def refusals(models: Path, work: Path) -> dict[str, str]:
    """Each is raised on all ranks, else this would hang; the directory that is there stays as it is."""
    groups = initialize(ParallelLayout(ranks=4, tp=2))
    hf = models / "qwen3_tied"
    chunks = build(hf, groups, torch.float32)
    architecture = read_architecture(hf)
    report = {}

    def refused(name: str, **kwargs: Any) -> None:
        try:
            export_hf(chunks, architecture, **{"source_hf_dir": hf, **kwargs})
        except UserError as error:
            report[name] = str(error)

    export_hf(chunks, architecture, hf, work / "export")
    refused("exists", out_dir=work / "export")
    refused("other", out_dir=work / "new", source_hf_dir=models / "qwen2_tied")
    refused("file in the way", out_dir=hf / "config.json" / "export")
    refused("itself", out_dir=hf, overwrite=True)
    with torch.no_grad():
        next(chunks[0].parameters()).mul_(2)
    if groups.is_main:  # as a full disk would
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    refused("disk full", out_dir=work / "export", overwrite=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    report["kept"] = str(bitwise_equal(hf, work / "export"))
    dist.barrier()
    export_hf(chunks, architecture, hf, work / "export", overwrite=True)
    report["replaced"] = str(not bitwise_equal(hf, work / "export"))
    report["left behind"] = str(sorted(p.name for p in work.iterdir()))
    return report


def main() -> None:
    models, work = Path(sys.argv[1]), Path(sys.argv[2])
    report = {"round trips": round_trips(models, work / "round_trips")}
    moe = models / "qwen3_moe"
    report["experts"] = experts_split_over_ranks(moe, work / "experts")
    report["conversions"] = conversions(models, work / "conversions")
    report["casts"] = casts(models, work / "casts")
    report["refusals"] = refusals(models, work / "refusals")
    if dist.get_rank() == 0:
        print("REPORT " + json.dumps(report), flush=True)
    dist.barrier()
    shutil.rmtree(work / "round_trips", ignore_errors=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
