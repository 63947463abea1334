"""Run by the engine environment's Python: what SGLang's own weight loaders make of a checkpoint, rank by rank.

No server and no process group: the models of every rank are built one after the other, on the CPU, under SGLang's
override of the parallel context. Arguments: a JSON list of [directory with config.json, model.npz; tp; ep; whether
its uint8 tensors are e4m3 in blocks of 128 x 128], an output directory. A directory may hold model.safetensors instead,
of the type that its config says. Writes RANK.npz of all parameters by name to OUT/CASE/.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from safetensors.torch import load_file
from sglang.srt.model_executor.model_runner import ModelRunner  # noqa: F401  (imports in the order SGLang expects)
from sglang.srt.models.qwen2 import Qwen2ForCausalLM
from sglang.srt.models.qwen3 import Qwen3ForCausalLM
from sglang.srt.models.qwen3_moe import Qwen3MoeForCausalLM
from sglang.srt.runtime_context import get_context, get_parallel
from transformers import AutoConfig

MODELS = {"qwen2": Qwen2ForCausalLM, "qwen3": Qwen3ForCausalLM, "qwen3_moe": Qwen3MoeForCausalLM}


def group(rank: int, size: int) -> SimpleNamespace:
    """What construction asks of a process group; there is none to talk over."""
    return SimpleNamespace(
        rank_in_group=rank, world_size=size, is_first_rank=rank == 0, is_last_rank=rank == size - 1,
        device_group=None, cpu_group=None, pynccl_comm=None,
    )  # fmt: skip


def readable(parameter: torch.Tensor) -> np.ndarray:
    if parameter.dtype == torch.float8_e4m3fn:
        return parameter.view(torch.uint8).numpy()
    return parameter.float().numpy() if parameter.dtype == torch.bfloat16 else parameter.numpy()


def shards(directory: Path, tp: int, ep: int, fp8: bool, rank: int) -> dict[str, np.ndarray]:
    # exact for every element's number, and with fp8 for those below 256
    torch.set_default_dtype(torch.bfloat16 if fp8 else torch.float64)
    config = AutoConfig.from_pretrained(directory)
    if (directory / "model.safetensors").exists():
        weights = load_file(directory / "model.safetensors")
        told = config.quantization_config
    else:
        weights = {name: torch.from_numpy(value) for name, value in np.load(directory / "model.npz").items()}
        weights = {
            n: w.view(torch.float8_e4m3fn) if w.dtype == torch.uint8 else w for n, w in weights.items()
        }
        told = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    quantisation = None
    if fp8:
        from sglang.srt.layers.quantization.fp8 import Fp8Config

        quantisation = Fp8Config.from_config(told)
    moe_tp = tp // ep
    sizes = {
        "tp": (rank, tp), "attn_tp": (rank, tp), "moe_ep": (rank // moe_tp, ep), "moe_tp": (rank % moe_tp, moe_tp),
        "pp": (0, 1), "attn_cp": (0, 1), "moe_dp": (0, 1),
    }  # fmt: skip
    places = {f"{name}_rank": place for name, (place, _) in sizes.items()}
    places |= {f"{name}_group": group(*size) for name, size in sizes.items()}
    override = get_context().override_server_args(tp_size=tp, ep_size=ep, device="cpu")
    override.install()
    try:
        with get_parallel().override(**places, attn_dp_rank=0):
            model = MODELS[config.model_type](config, quant_config=quantisation)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(-1)
            model.load_weights(weights.items())
            return {name: readable(parameter.detach()) for name, parameter in model.named_parameters()}
    finally:
        override.restore()


def main() -> None:
    for number, (directory, tp, ep, fp8) in enumerate(json.loads(sys.argv[1])):
        out = Path(sys.argv[2]) / str(number)
        out.mkdir(parents=True)
        for rank in range(tp):
            np.savez(out / f"{rank}.npz", **shards(Path(directory), tp, ep, fp8, rank))
    print("REPORT", json.dumps("done"))


main()
