"""A Megatron distributed checkpoint to a Hugging Face directory, or back, tensor by tensor in this process.

    convert_checkpoint.py runs/a/arms/vr/fit/checkpoints --model Qwen3-4B --hf out --verify
    convert_checkpoint.py imported --hf out --dtype bfloat16
    convert_checkpoint.py Qwen3-4B --checkpoint imported --verify
    convert_checkpoint.py imported --hf out-fp8 --quantize fp8

CHECKPOINT is a fit's directory of checkpoints or one of them, or a checkpoint of `megavar import`, of any parallel
layout; what is written loads under any. A model larger than memory converts on any machine: no ranks are started and
no model is built. Killed, the same command goes on where it was and ends with the same bytes.

How it differs: `megavar export` takes a finished run and its arms, and loads the model as a check; `megavar import` and
`reshard.py` load the model on ranks of a layout; `reshard.py` also brings weights to running engines.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from megavar.commands.stored import find_stored
from megavar.errors import UserError
from megavar.launch import quiet_libraries
from megavar.memory import return_large_blocks
from megavar.models.architecture import DTYPES


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("source", type=Path, metavar="CHECKPOINT|HF_DIR", help="of a fit or an import; or HF")
    parser.add_argument(
        "--model", type=Path, metavar="HF_DIR", help="config and tokenizer of a fit's checkpoint"
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--hf", type=Path, metavar="OUT", help="new Hugging Face directory")
    target.add_argument("--checkpoint", type=Path, metavar="OUT", help="new Megatron checkpoint")
    parser.add_argument("--dtype", choices=DTYPES, help="of the written weights; the source's when left out")
    parser.add_argument(
        "--shard-gib", type=float, default=5.0, help="of a written file; a larger tensor has its own"
    )
    parser.add_argument(
        "--verify", action="store_true", help="compare every tensor, and the logits where memory allows"
    )
    parser.add_argument(
        "--quantize",
        choices=("fp8", "modelopt-fp8", "modelopt-int4"),
        help="with --hf: fp8 in blocks, which SGLang, vLLM and transformers read; or what nvidia-modelopt writes for "
        "TensorRT-LLM, of a model that fits in memory",
    )
    return parser.parse_args(words)


def run(args: argparse.Namespace) -> int:
    """Raises UserError for bad input before anything is written."""
    if not args.shard_gib > 0:
        raise UserError(f"--shard-gib {args.shard_gib}: must be above 0")
    if args.quantize and args.checkpoint:
        raise UserError("--quantize: the trainer reads no quantised weights; use it with --hf")
    if args.quantize and args.verify:
        raise UserError("--quantize: the result is another model, and cannot be equal; leave --verify out")
    if args.quantize and args.quantize != "fp8" and args.dtype:
        raise UserError("--quantize: modelopt chooses types; leave --dtype out")
    stored = find_stored(args.source, args.model)
    limit = int(args.shard_gib * 2**30)
    if args.checkpoint and not stored.is_hf:
        raise UserError(f"{args.source} is a Megatron checkpoint already; use tools/reshard.py --checkpoint")
    if args.hf and stored.is_hf and not args.quantize:
        raise UserError(f"{args.source} is a Hugging Face directory already; give --checkpoint OUT")
    quiet_libraries()
    if args.quantize and args.quantize != "fp8":
        from megavar.commands.quantize import quantize

        quantize(stored, args.hf, args.quantize, max_file_bytes=limit)
        return 0
    from megavar.commands import convert

    if args.hf:
        fp8 = args.quantize == "fp8"
        converted = convert.to_hf(stored, args.hf, dtype=args.dtype, max_file_bytes=limit, fp8=fp8)
    else:
        converted = convert.to_megatron(args.source, args.checkpoint, dtype=args.dtype, max_file_bytes=limit)
    if args.verify:
        convert.verify(converted)
    convert.publish(converted, args.hf or args.checkpoint)
    return 0


def main() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # an accelerator may be small or in use
    return_large_blocks()
    try:
        status = run(parse())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    sys.exit(status)


if __name__ == "__main__":
    main()
