"""The `megavar` command. Heavy imports are made by the verb that needs them: `--help` is instant."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megavar import __version__
from megavar.errors import UserError

RUN_USAGE = "megavar run RECIPE.toml [--section.key value ...] [--dry-run] [--force] [--until PHASE]"
DOCTOR_USAGE = "megavar doctor [RECIPE.toml] [--section.key value ...] [--nodes N] [--engine] [--json]"
LAUNCH_USAGE = "megavar launch RECIPE.toml --nodes N [--section.key value ...] [options]"
PLAN_USAGE = "megavar plan RECIPE.toml [--gpus N] [--gpu-memory GIB] [--section.key value ...] [options]"
COMMANDS = {
    "score": "score",
    "eval": "eval",
    "export": "export",
    "import": "import_",
    "doctor": "doctor",
    "plan": "plan",
    "launch": "launch",
    "sync": "sync",
    "report": "report",
}
"""Verb -> module of megavar.commands; `import` is a keyword of the language."""
OVERRIDABLE = ("run", "doctor", "plan", "launch")
"""Verbs that take a recipe's keys as options beside their own."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 for bad input, 75 when asked to make room, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        overrides: list[tuple[str, str]] = []
        parser, verbs = _parser()
        if arguments and arguments[0] in OVERRIDABLE:
            arguments, overrides = split_overrides(arguments, own_options(verbs[arguments[0]]))
        args = parser.parse_args(arguments)
        args.overrides = overrides
        if args.verb == "run":
            return _run(args, overrides)
        if args.verb == "show":
            from megavar.report.show import show

            return show(args.run)
        import importlib

        from megavar.launch import quiet_libraries

        quiet_libraries()
        return importlib.import_module(f"megavar.commands.{COMMANDS[args.verb]}").run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has seen enough; keep the interpreter from flushing into the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def own_options(parser: argparse.ArgumentParser) -> dict[str, bool]:
    """The verb's own options; True for those that take a value."""
    return {name: action.nargs != 0 for name, action in parser._option_string_actions.items()}


def split_overrides(
    arguments: Sequence[str], options: Mapping[str, bool]
) -> tuple[list[str], list[tuple[str, str]]]:
    """Separate `--section.key value` and `--section.key=value` from the verb's own `options`.

    Raises UserError for an override without a value.
    """
    kept: list[str] = []
    overrides: list[tuple[str, str]] = []
    rest = iter(arguments)
    for word in rest:
        name, equals, value = word.partition("=")
        if not word.startswith("--"):
            kept.append(word)
        elif name in options:
            kept.append(word)
            if options[name] and not equals:
                kept += [value for value in [next(rest, None)] if value is not None]
        else:
            if not equals:
                value = next(rest, "--")
                if value.startswith("--"):
                    raise UserError(f"{name}: needs a value: {name} VALUE (or {name}=VALUE)")
            overrides.append((name.removeprefix("--"), value))
    return kept, overrides


def _run(args: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> int:
    from megavar.config.load import dump_recipe, load_recipe

    recipe = load_recipe(args.recipe, overrides)
    if args.dry_run:
        print(dump_recipe(recipe), end="")
        return 0
    from megavar.launch import launch, place_of, quiet_libraries

    rank = place_of(recipe.trainer.ranks, "trainer.ranks")
    from megavar import preflight
    from megavar.runs import RunDirectory

    preflight.check(recipe, until=args.until)
    if rank in (None, 0) and args.until is None:
        preflight.check_engines(recipe)
    with RunDirectory.open(recipe, force=args.force, writer=rank in (None, 0)):
        if rank is not None:
            quiet_libraries()
            from megavar import preemption, rounds

            preemption.watch(forwarded=False)
            with preemption.obeyed():
                rounds.main(recipe.out, until=args.until)
            return 0
        ranks, threads = recipe.trainer.ranks, recipe.trainer.threads
        return launch(
            recipe.out,
            ranks=ranks,
            threads=threads,
            resumable=True,
            until=args.until,
            module="megavar.rounds",
        )


class _RecipeKeys(argparse.Action):
    """`run --help`: argparse's own help, then every key of the recipe."""

    def __call__(self, parser, namespace, values, option_string=None):  # type: ignore[no-untyped-def]
        from megavar.config.describe import describe_keys

        print(parser.format_help())
        print(describe_keys())
        parser.exit()


def _parser() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """The command's parser, and that of each verb."""
    top = argparse.ArgumentParser(
        prog="megavar", description="Trains language models by variational reasoning.", allow_abbrev=False
    )
    top.add_argument("--version", action="version", version=f"megavar {__version__}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, text: str, **more: object) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=text, description=text, allow_abbrev=False, **more)  # type: ignore

    text = "Train by a recipe; run again in the same directory to resume."
    run = verb("run", text, usage=RUN_USAGE, add_help=False)
    run.add_argument("recipe", type=Path, metavar="RECIPE.toml")
    run.add_argument("--dry-run", action="store_true", help="print the resolved recipe and stop")
    run.add_argument("--force", action="store_true", help="accept a changed recipe; redo what it changes")
    run.add_argument("--until", metavar="PHASE", help="stop after this phase")
    run.add_argument("-h", "--help", nargs=0, action=_RecipeKeys, help="this, and every key of the recipe")

    score = verb("score", "Log-probs of given responses under a model.")
    score.add_argument("model", type=Path, metavar="MODEL_DIR", help="Hugging Face directory")
    score.add_argument(
        "input",
        type=Path,
        help=".jsonl or .parquet with `prompt` and `response` texts, or `prompt_ids` and `response_ids`",
    )
    score.add_argument("--out", type=Path, required=True, help=".jsonl or .parquet: rows with log-probs")
    score.add_argument("--temperature", type=_positive_float, default=1.0, help="logits are divided by it")
    score.add_argument(
        "--tokens-per-micro-batch", type=_positive_int, help="token budget; 65536 when left out"
    )
    _layout(score)

    evaluate = verb("eval", "Accuracy of a model on questions, with a confidence interval.")
    evaluate.add_argument("model", type=Path, metavar="MODEL_DIR", help="Hugging Face directory")
    asked = evaluate.add_mutually_exclusive_group(required=True)
    asked.add_argument(
        "--data",
        metavar="SPEC|RECIPE.toml",
        help="gym:NAME, a .jsonl or .parquet file, a data set directory; or a recipe, whose held-out "
        "questions, templates and `evaluate` section are used where no option says otherwise",
    )
    asked.add_argument(
        "--suite", metavar="NAME,...", help="benchmarks: aime24, math500, ...; see docs/evaluate.md"
    )
    evaluate.add_argument(
        "--preset", choices=("paper",), help="of --suite: how to sample; paper when left out"
    )
    evaluate.add_argument("--data-dir", type=Path, help="of --suite: a directory for each data set")
    evaluate.add_argument("--engine", choices=("local", "sglang"), default="local", help="who samples")
    evaluate.add_argument(
        "--server", action="append", default=[], metavar="URL", help="SGLang server that runs; repeats"
    )
    evaluate.add_argument("--servers", type=_positive_int, help="SGLang servers to start; 1 when left out")
    evaluate.add_argument("--tp", type=_positive_int, help="tensor parallelism inside a server")
    evaluate.add_argument("--size", type=_positive_int, help="take this many questions")
    evaluate.add_argument("--verifier", default="", help="for questions that name none")
    evaluate.add_argument(
        "--template",
        metavar="NAME|RECIPE.toml",
        help="the policy's prompt template, by name or that of a recipe",
    )
    evaluate.add_argument("--samples", type=_positive_int, help="completions per question")
    evaluate.add_argument("--temperature", type=_float_from_zero, help="0 is greedy")
    evaluate.add_argument("--top-p", type=_fraction, help="nucleus of sampling")
    evaluate.add_argument("--max-tokens", type=_positive_int, help="thought and answer together")
    evaluate.add_argument("--seed", type=int, help="of completions, and of the questions of gym:NAME")
    evaluate.add_argument(
        "--out",
        type=Path,
        help=".jsonl or .parquet: every completion with its verdict; of --suite: a directory, to resume in",
    )
    _dtype(evaluate, default=None)

    export = verb("export", "Write a trained model as a complete Hugging Face directory.")
    export.add_argument("source", type=Path, metavar="RUN_DIR|CHECKPOINT", help="run or Megatron checkpoint")
    export.add_argument("out", type=Path, metavar="OUT", help="new or empty directory")
    export.add_argument("--arm", metavar="NAME", help="of a run; also `initial`, `posterior`")
    export.add_argument("--shard-gib", type=_positive_float, default=5.0, help="of a safetensors file")

    bring = verb("import", "Write a Hugging Face model as a Megatron checkpoint.")
    bring.add_argument("model", type=Path, metavar="HF_DIR", help="Hugging Face directory")
    bring.add_argument("out", type=Path, metavar="OUT", help="new or empty directory")
    _layout(bring, dtype=None)

    sync = verb("sync", "Weights from the trainer to engines.")
    actions = sync.add_subparsers(dest="action", required=True, metavar="ACTION")
    text = "What one synchronisation moves, and the least time it can take; needs no weights."
    moves = actions.add_parser("plan", help=text, description=text, allow_abbrev=False)
    moves.add_argument("model", type=Path, metavar="MODEL", help="directory with a config.json, or that file")
    moves.add_argument("--trainer", required=True, metavar="tp=N,...", help="ranks, tp, pp, vpp, cp, ep, etp")
    moves.add_argument("--engine", required=True, metavar="tp=N,...", help="tp, ep, count (of engines)")
    kinds = ("float32", "bfloat16", "float16", "fp8")
    moves.add_argument("--dtype", choices=kinds, help="of the engine; that of the weights when left out")
    moves.add_argument("--json", action="store_true", help="for programs")
    text = "Whether running servers hold, bit for bit, the weights stored here."
    verify = actions.add_parser("verify", help=text, description=text, allow_abbrev=False)
    verify.add_argument(
        "source", type=Path, metavar="CHECKPOINT", help="of a fit or an import, or a Hugging Face directory"
    )
    verify.add_argument("--model", type=Path, metavar="HF_DIR", help="config of a fit's checkpoint")
    verify.add_argument("--trainer", default="tp=1", metavar="tp=N,...", help="layout to load it under")
    verify.add_argument(
        "--engine", action="append", required=True, metavar="URL", help="a server; repeatable"
    )

    show = verb("show", "What a run directory holds: its phases, and the table of its arms.")
    show.add_argument("run", type=Path, metavar="RUN_DIR")

    report = verb("report", "A run as one HTML page: arms, curves, histograms, time, memory.")
    report.add_argument("run", type=Path, metavar="RUN_DIR")
    report.add_argument("--out", type=Path, metavar="FILE.html", help="RUN_DIR/report.html when left out")

    text = "GPU memory, layout and time of a recipe, before anything is allocated; 1 where it does not fit."
    plan = verb("plan", text, usage=PLAN_USAGE)
    plan.add_argument("recipe", type=Path, metavar="RECIPE.toml")
    plan.add_argument("--gpus", type=_positive_int, help="in all; trainer.ranks when left out")
    plan.add_argument("--gpu-memory", type=_positive_float, default=80.0, metavar="GIB", help="of one GPU")
    plan.add_argument("--longest", type=_positive_int, help="tokens of the longest example, when known")
    plan.add_argument("--mean", type=_positive_int, help="tokens of an average example, when known")
    plan.add_argument(
        "--operators",
        choices=("transformer-engine", "torch"),
        default="transformer-engine",
        help="what will run norms and attention",
    )
    plan.add_argument("--json", action="store_true", help="for programs")

    text = "What this machine has, and whether a recipe can run on it."
    doctor = verb("doctor", text, usage=DOCTOR_USAGE)
    doctor.add_argument("recipe", type=Path, nargs="?", metavar="RECIPE.toml")
    doctor.add_argument("--nodes", type=_positive_int, default=1, help="that the ranks are spread over")
    doctor.add_argument("--json", action="store_true", help="for programs")
    doctor.add_argument("--engine", action="store_true", help="of a machine that only runs SGLang servers")
    doctor.add_argument(
        "--wait", type=_positive_int, default=0, metavar="SECONDS", help="for servers by URL to come up"
    )

    text = "Submit a recipe to Slurm: trainer ranks, servers and router in one job that resumes by itself."
    launch = verb("launch", text, usage=LAUNCH_USAGE)
    launch.add_argument("recipe", type=Path, metavar="RECIPE.toml")
    launch.add_argument("--dry-run", action="store_true", help="print the sbatch script and stop")
    launch.add_argument("--nodes", type=_positive_int, required=True, help="of the job, in all")
    launch.add_argument(
        "--engine-nodes", type=_from_zero, default=0, help="of them, for SGLang servers alone"
    )
    launch.add_argument(
        "--posterior-nodes", type=_from_zero, default=0, help="of those, for rollout.posterior_servers"
    )
    launch.add_argument("--gpus-per-node", type=_from_zero, default=8, help="0 where nodes have none")
    launch.add_argument("--ranks-per-node", type=_positive_int, help="one for each GPU when left out")
    for name in ("partition", "account"):
        launch.add_argument(f"--{name}", default="", help="Slurm's")
    launch.add_argument(
        "--time", default="", help="of one job; a run that takes longer goes on in the next one"
    )
    launch.add_argument(
        "--grace", type=_positive_int, default=300, help="seconds to stop in before the time limit"
    )
    launch.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="--sbatch=--qos=high; repeats"
    )
    launch.add_argument("--image", default="", help="container image of the trainer (pyxis)")
    launch.add_argument("--engine-image", default="", help="of the servers; --image when left out")
    launch.add_argument(
        "--mount", action="append", default=[], metavar="FROM:TO", help="for containers; repeats"
    )
    launch.add_argument(
        "--interface", default="", help="network interface for gloo, and NCCL without InfiniBand"
    )
    launch.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="for all processes; repeats"
    )
    launch.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=V,V,...",
        help="an array job, a run for each value; repeats",
    )
    launch.add_argument("--at-once", type=_positive_int, help="runs of a sweep at the same time")
    return top, verbs.choices


def _layout(parser: argparse.ArgumentParser, *, dtype: str | None = "bfloat16") -> None:
    for name, text in (
        ("tp", "tensor parallelism"),
        ("pp", "pipeline parallelism"),
        ("vpp", "model chunks per pipeline stage"),
        ("cp", "context parallelism"),
        ("ep", "expert parallelism"),
        ("etp", "tensor parallelism inside an expert"),
    ):
        parser.add_argument(f"--{name}", type=_positive_int, default=1, help=text)
    parser.add_argument("--ranks", type=_positive_int, help="processes; one copy's when left out")
    _dtype(parser, default=dtype)


def _dtype(parser: argparse.ArgumentParser, *, default: str | None) -> None:
    text = f"of parameters and activations; {default or 'that of the weights'} when left out"
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=default, help=text)


def _positive_int(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _from_zero(text: str) -> int:
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or above, got {value}")
    return value


def _positive_float(text: str) -> float:
    if not 0 < (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def _float_from_zero(text: str) -> float:
    if not 0 <= (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"must be 0 or above, got {text}")
    return value


def _fraction(text: str) -> float:
    if not 0 < (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
