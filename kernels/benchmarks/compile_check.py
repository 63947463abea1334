"""Compile every kernel configuration that ships, without a GPU, and inspect the machine code.

    python kernels/benchmarks/compile_check.py                 the installed Triton, sm_80, sm_90 and sm_100
    PYTHONPATH=/path/to/triton python kernels/benchmarks/compile_check.py --arch 90

Prints a table and exits with 1 if a kernel fails to compile, spills registers, needs more shared memory than
a block can have or, for the GEMM kernels on sm_90, lacks wgmma or TMA instructions. The disassemblers come
with the Triton wheel.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
CACHE = tempfile.TemporaryDirectory(prefix="compile_check_")  # fresh: a cached kernel would hide a failure
os.environ["TRITON_CACHE_DIR"] = CACHE.name

import triton  # noqa: E402
from megavar_kernels import linear_logprob_kernels as logprob  # noqa: E402
from megavar_kernels import linear_logprob_triton as launch  # noqa: E402
from megavar_kernels import trace_weights_triton as traces  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# bytes of shared memory a block can ask for
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}


@dataclass(frozen=True)
class Case:
    """One specialisation of a kernel, as its launcher asks for it."""

    name: str
    kernel: object
    types: dict[str, str]
    constants: dict[str, object]
    warps: int
    stages: int = 3
    gemm: bool = False
    archs: tuple[int, ...] = (80, 90, 100)
    # pointers and strides that are multiples of 16 in every launch and that Triton specialises on
    divisible: tuple[str, ...] = field(default=())


def cases() -> Iterator[Case]:
    """What linear_logprob_triton and trace_weights_triton launch: all of it on sm_90, bf16 on the others."""
    f32, i32 = "*fp32", "*i32"
    tokens = dict.fromkeys(("lse_ptr", "entropy_ptr", "grad_logprob_ptr", "grad_entropy_ptr"), f32)
    tokens["target_ptr"] = i32
    for keep in (None, "bf16", "fp32"):
        yield Case(
            f"chunk_statistics keep={keep}",
            logprob.chunk_statistics,
            {
                **{"z_ptr": f32, "target_ptr": i32, "stats_ptr": f32, "kept_ptr": f"*{keep}"},
                **{"kept_max_ptr": f32, "scale": "fp32"},
                **dict.fromkeys(("T", "cols", "col0", "stride_z", "stride_kept"), "i32"),
            },
            {
                **{"KEEP": keep is not None, "BLOCK": launch.sizes.STAGE_COLS},
                **({} if keep else {"kept_ptr": None, "kept_max_ptr": None}),
            },
            warps=launch.STATISTICS_WARPS,
            archs=(90,) if keep == "fp32" else (80, 90, 100),
            divisible=("z_ptr", "kept_ptr", "stride_z", "stride_kept"),
        )
    for kept, dtype in (
        (0, "bf16"),
        (0, "fp16"),
        (0, "fp32"),
        ("bf16", "bf16"),
        ("bf16", "fp16"),
        ("fp32", "fp32"),
    ):
        for entropy in (False, True):
            yield Case(
                f"chunk_dlogits {dtype} kept={kept or None} entropy={entropy}",
                logprob.chunk_dlogits,
                {
                    **tokens,
                    **{"z_ptr": f"*{kept}" if kept else f32, "kept_max_ptr": f32, "dz_ptr": f"*{dtype}"},
                    **{"scale": "fp32"},
                    **dict.fromkeys(("cols", "col0", "stride_z", "stride_dz"), "i32"),
                },
                {
                    **{"KEPT": bool(kept), "ENTROPY": entropy, "BLOCK": launch.sizes.STAGE_COLS},
                    **({} if kept else {"kept_max_ptr": None}),
                    **({} if entropy else {"grad_entropy_ptr": None}),
                },
                warps=8,
                archs=(80, 90, 100) if dtype == "bf16" else (90,),
                divisible=("z_ptr", "dz_ptr", "stride_z", "stride_dz"),
            )
    tile = launch.FUSED_TILE
    blocks = {"BM": tile.m, "BN": tile.n, "BK": tile.k, "GROUP_M": tile.group_m}
    sizes = dict.fromkeys(("T", "V", "H", "col0", "programs"), "i32") | {"scale": "fp32"}
    operands = {
        "hidden": f"tensordesc<bf16[{tile.m}, {tile.k}]>",
        "weight": f"tensordesc<bf16[{tile.n}, {tile.k}]>",
        "dz": f"tensordesc<bf16[{tile.m}, {tile.n // 2}]>",
    }
    options = {
        "warps": tile.warps,
        "stages": tile.stages,
        "gemm": True,
        # sm_100 is not in the launch table yet; the kernels are kept fit for it
        "archs": (*(major * 10 + minor for major, minor in launch.FUSED_BELOW_HIDDEN), 100),
    }
    yield Case(
        "fused_statistics",
        logprob.fused_statistics,
        {**operands, **sizes, "target_ptr": i32, "tiles_ptr": f32},
        blocks,
        **options,
    )
    for entropy in (False, True):
        yield Case(
            f"fused_dlogits entropy={entropy}",
            logprob.fused_dlogits,
            {**operands, **sizes, **tokens},
            {**blocks, "ENTROPY": entropy, **({} if entropy else {"grad_entropy_ptr": None})},
            **options,
        )
    yield Case(
        "reduce_statistics",
        logprob.reduce_statistics,
        {"tiles_ptr": f32, "stats_ptr": f32, **dict.fromkeys(("tiles", "T", "stats_stride"), "i32")},
        {"BT": launch.REDUCE_TOKENS, "BR": launch.REDUCE_TILES},
        warps=4,
        archs=options["archs"],
    )
    for index in (i32, "*i64"):
        yield Case(
            f"trace_weights_forward {index[1:]}",
            traces.trace_weights_forward,
            {
                **dict.fromkeys(traces.trace_weights_forward.arg_names, f32),
                **{"cu_seqlens_ptr": index, "question_offsets_ptr": index, "arrived_ptr": i32},
                **dict.fromkeys(("questions", "steps", "accuracy", "normalize"), "i32"),
                **{"temper": "fp32", "clip": "fp32"},
            },
            {"BLOCK": traces.BLOCK, "GROUP": traces.GROUP},
            warps=4,
            divisible=("policy_ptr", "posterior_ptr"),
        )
        yield Case(
            f"trace_bounds_backward {index[1:]}",
            traces.trace_bounds_backward,
            {**dict.fromkeys(traces.trace_bounds_backward.arg_names, f32), "question_offsets_ptr": index},
            {"GROUP": traces.GROUP},
            warps=4,
        )


def inspect(case: Case, arch: int) -> tuple[str, list[str]]:
    """(table row, problems) of one case compiled for one architecture."""
    names = case.kernel.arg_names
    constants = {name: value for name, value in case.constants.items() if name in names}
    source = ASTSource(
        fn=case.kernel,
        signature={name: "constexpr" if name in constants else case.types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (names.index(name),): [["tt.divisibility", 16]]
            for name in case.divisible
            if name not in constants
        },
    )
    options = {"num_warps": case.warps, "num_stages": case.stages, "enable_fp_fusion": True}
    start = time.perf_counter()
    try:
        kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:  # any failure of the compiler is a row of the table
        reason = f"{type(error).__name__}: {error}".replace("\n", " ")[:120]
        return f"{case.name:<48} {arch:>5}  {reason}", ["does not compile"]
    seconds = time.perf_counter() - start
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "-res-usage", cubin.name)
        assembly = _tool("nvdisasm", "-c", cubin.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    spills = len(re.findall(r"\b(?:LDL|STL)\b", assembly))
    wgmma = len(re.findall(r"\bHGMMA", assembly))
    tma = len(re.findall(r"\bUTMALDG", assembly))
    shared = kernel.metadata.shared

    problems = []
    if spills or stack:
        problems.append("spills")
    if shared > SHARED_LIMIT[arch]:
        problems.append("shared memory")
    if case.gemm and arch == 90 and not wgmma:
        problems.append("no wgmma")
    if case.gemm and arch == 90 and not tma:
        problems.append("no TMA")
    row = f"{case.name:<48} {arch:>5} {registers:>5} {spills:>6} {shared:>8} {wgmma:>5} {tma:>5}"
    return f"{row} {seconds:>6.1f}  {', '.join(problems) or 'ok'}", problems


def _tool(name: str, *arguments: str) -> str:
    result = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True)
    return result.stdout + result.stderr


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=sorted(SHARED_LIMIT), default=sorted(SHARED_LIMIT)
    )
    archs = parser.parse_args().arch
    print(f"triton {triton.__version__}")
    print(
        f"{'kernel':<48} {'sm':>5} {'regs':>5} {'spills':>6} {'shared':>8} {'wgmma':>5} {'TMA':>5} {'s':>6}"
    )
    failures = compiled = 0
    for case in cases():
        for arch in archs:
            if arch in case.archs:
                row, problems = inspect(case, arch)
                print(row, flush=True)
                compiled += 1
                failures += bool(problems)
    print(f"{compiled} configurations, {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
