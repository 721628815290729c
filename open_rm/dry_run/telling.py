"""--dry_run: everything that a run would do, said without weights, a GPU or another process; and written to plan.json.

    tell        the chapters below, in the order of the run
    _read       config, tokenizer and pairs, as the run reads them (resolving.py), and its checks that cost little
    _planned    steps, memory, what would fit instead

Only this file takes all flags. docs/dry_run.md has the formulas and the keys of plan.json.
"""

import dataclasses
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from open_rm.batching import feeding, targets
from open_rm.batching.rules import BatchRules
from open_rm.dry_run import alternatives, disk, hours, hub_and_wandb, memory, output_dir, sizes, steps, told
from open_rm.dry_run.target import Target, target_of
from open_rm.dry_run.told import Told, counted, thousands
from open_rm.errors import UserError
from open_rm.evaluation import engine_scorer, in_training, sets
from open_rm.flags import Args, BatchFlags
from open_rm.inspection import look
from open_rm.model import float8, sequence_parallel
from open_rm.model.contract import Contract
from open_rm.publishing import clients, proof
from open_rm.ranks import Ranks
from open_rm.reliability import comparing
from open_rm.resolving import Resolved, resolve
from open_rm.training import ds_config, fitting
from open_rm.training.gathered import most_keys
from open_rm.training.plan import Plan, make_plan


def tell(args: Args) -> dict[str, float]:
    """Print the plan and write it to plan.json in the run's folder. Of several processes the first one speaks.

    Returns:
        no metrics, since nothing is trained.

    Raises:
        UserError: what the run itself would refuse: at once where nothing could be told, after everything is told where it
            would only be refused on this machine as it is.
    """
    if int(os.environ.get("RANK", 0)):
        return {}
    transformers.logging.set_verbosity_error()
    # A run without a folder makes one by the time that it begins at; dry runs of it share one.
    name = args.run_name or f"{args.exp_name}__{args.seed}__dry_run"
    folder = str(Path(args.output_dir or f"output/{name}").expanduser())
    rate = hours.rate_of(args)
    target = target_of(args, dtype=args.dtype, group=args.sequence_parallel_size)
    _check_target(args, target)
    print(f"dry run of {args.run_name or args.exp_name}: nothing is trained", flush=True)
    inputs = _read(args, target)
    chapters = _planned(args, target, inputs, rate, folder)
    own_name = args.run_name or f"{args.exp_name}__{args.seed}__{int(time.time())}"
    chapters += [
        hub_and_wandb.hub(args, own_name),
        hub_and_wandb.wandb(args),
        Told("checks", inputs.checks, inputs.checks),
    ]
    own = _pairs_per_step(args, target)
    chapters.append(output_dir.told(args, folder, comparing.plain(args), inputs.read, target, pairs_per_step=own))
    refused = [sentence for chapter in chapters for sentence in chapter.refused]
    chapters.append(Told("refusals", [f"the run would be refused: {sentence}" for sentence in refused], refused))
    print(told.as_text(chapters), flush=True)
    print(f"written to {told.write(folder, [_of_run(args, own_name), *chapters])}", flush=True)
    # For other devices than this machine's, neither its disk nor its token need be those of the run.
    if refused and args.device_memory_gib is None:
        raise UserError(f"the run would be refused here: {'; '.join(refused)}")
    return {}


def _check_target(args: Args, target: Target) -> None:
    """What checks.py asks of this machine, asked of the devices that are planned for."""
    sequence_parallel.check_divides(target.group, target.world_size)
    if args.optim == "adafactor" and target.bf16:
        raise UserError(
            "--optim adafactor needs whole matrices, and bfloat16, which the planned GPUs compute in, makes vectors of them "
            "(ZeRO holds its float32 master weights); pass --dtype float32 without --deepspeed, or --optim adamw_8bit"
        )


def _of_run(args: Args, name: str) -> Told:
    return Told("run", [], {"name": name, "plan_version": 1, "flags": dataclasses.asdict(args)})


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class _Inputs:
    """What the run reads before its model.

    contract: how its folder would have to be read.  checks: lines that the run would print on them.
    """

    read: Resolved
    contract: Contract
    benchmarks: list[sets.NamedSet]
    checks: list[str]


def _read(args: Args, target: Target) -> _Inputs:
    device = {"on_gpu": target.on_gpu, "capability": target.capability}

    def check(config) -> None:
        if args.float8 and target.capability is not None:
            family = config.get_text_config().model_type
            how = {"capability": target.capability, "dtype": target.dtype, "family": family, "use_peft": args.use_peft}
            if why := float8.why_not(**how, freeze_backbone=args.freeze_backbone):
                raise UserError(f"--float8 is not possible: {why}; leave it out")

    _say("reading config, tokenizer and data ...")
    benchmarks = sets.open_sets(args.benchmark)
    read = resolve(args, target.dtype, check=check, show_progress=True, **device)
    contract = Contract.of(
        args, args, read.tokenizer, chat=read.train_pairs.chat, dtype=target.dtype, code=args.trust_remote_code
    )
    found = look.before_training(
        read.train_pairs, read.held_out_pairs, read.tokenizer, args, margin_loss=args.margin_loss
    )
    lines = clients.lines(proof.rehearse(read.tokenizer, contract)) + found
    if args.float8 and target.capability is None:
        lines.append("--float8 is not looked at here: the GPU decides")
    if args.find_batch_size:
        lines.append("--find_batch_size: the micro-batch is found on the device; here it is estimated")
    return _Inputs(read, contract, benchmarks, lines)


def _benchmarks(args: Args, model: sizes.Planned, inputs: _Inputs, rules: BatchRules) -> list[str]:
    """Lines on the benchmarks, whose rows are all encoded, as before training.

    Raises:
        UserError: one that cannot be scored.
    """
    alone = Ranks(0, 0, 1, torch.device("cpu"))
    tokenizer, rules = inputs.read.tokenizer, rules.for_evaluation()
    known = engine_scorer.InTraining(model.model, tokenizer, inputs.contract, rules, alone)
    return in_training.Judge.of(args, known, inputs.benchmarks, None, "the run", args.seed).check()


def _planned(args: Args, target: Target, inputs: _Inputs, rate: hours.Rate | None, folder: str) -> list[Told]:
    """The chapters from the devices to the disk; the benchmarks' lines are added to `inputs.checks`."""
    read = inputs.read
    model = sizes.planned(args, read.tokenizer, adapter=args, dtype=target.dtype, on_gpu=target.on_gpu)
    table, layout = read.train_pairs.table, read.layout
    how = {"max_token_length": args.max_token_length, "on_gpu": target.on_gpu, "table": table}
    how["whole_lists"] = args.list_loss != "pairs"
    rules = feeding.rules_of(args, layout.name, read.tokenizer.pad_token_id, **how)
    inputs.checks.extend(_benchmarks(args, model, inputs, rules))
    largest = fitting.largest_unit(table, rules)
    asked = args.max_tokens_per_micro_batch if target.on_gpu else rules.max_tokens
    budget = target.group * fitting.largest_budget(asked, -(-largest // target.group))
    keys = most_keys(table, budget) if layout.name == "shared_prefix" else 1.0
    how = {"keys": keys, "budget": rules.max_tokens, "largest": largest}
    needs = memory.needs(args, model, layout.name, target, **how)
    how = {"width": model.model.width, "bf16": target.bf16, "max_grad_norm": args.max_grad_norm}
    config = ds_config.fill_config(args, **how, world_size=target.world_size)
    first = memory.fitted(needs, model, config, args.optim, target)
    settled = _settled(args, target, read, model, dataclasses.replace(rules, max_tokens=first.fit.max_tokens))
    found = memory.fitted(needs, model, config, args.optim, target, share=settled.dealt.share)
    options = alternatives.alternatives(args, needs, model, args.optim, target, share=settled.dealt.share, adapter=args)
    evaluations, evaluated = _evaluations(settled.plan, read, layout.name)
    return [
        target.told(),
        model.told(),
        _data(read),
        steps.told(settled.plan, settled.dealt, len(table), settled.rules),
        evaluations,
        memory.told(found, needs),
        alternatives.told(options, model, args.optim),
        hours.told(rate, settled.plan, settled.dealt, model, target, evaluated=evaluated),
        disk.told(args, model, args.optim, folder),
    ]


@dataclass(frozen=True)
class _Steps:
    """plan: of the run.  rules: that its steps are cut by.  dealt: some of them."""

    plan: Plan
    rules: BatchRules
    dealt: steps.Dealt


def _settled(args: Args, target: Target, read: Resolved, model: sizes.Planned, rules: BatchRules) -> _Steps:
    own = _pairs_per_step(args, target)
    targets.check(read.train_pairs, args, own)
    how = {"seed": args.seed, "grouped": args.group_by_prompt, "whole_lists": rules.whole_lists}
    plan = make_plan(args, read.train_pairs.table, own, **how)
    rules = feeding.with_attention_cost(rules, model.shape, on_gpu=target.on_gpu)
    _say("dealing steps ...")
    how = {"ranks": target.world_size // target.group, "group": target.group, "seed": args.seed}
    return _Steps(plan, rules, steps.deal(plan, read.train_pairs, rules, **how))


def _pairs_per_step(flags: BatchFlags, target: Target) -> int:
    return flags.per_device_train_batch_size * flags.gradient_accumulation_steps * target.world_size


def _data(read: Resolved) -> Told:
    """The lines that training prints, and what was dropped and why."""
    numbers = {"layout": read.layout.name, "why_not_shared": read.layout.why_not_shared, "lines": read.lines()}
    for split, data in (("train", read.train_pairs), ("eval", read.held_out_pairs)):
        numbers[split] = None if data is None else {"pairs": len(data), "kind": data.kind, "sources": data.facts}
    why = f", not shared_prefix: {read.layout.why_not_shared}" if read.layout.why_not_shared else ""
    return Told("data", [*read.lines(), f"layout {read.layout.name}{why}"], numbers)


def _evaluations(plan: Plan, read: Resolved, layout: str) -> tuple[Told, int]:
    """And the tokens of all of them together."""
    if read.held_out_pairs is None:
        return Told(
            "evaluation",
            ["none: no held-out data was named"],
            {"evaluations": 0, "pairs": None, "tokens": 0, "steps": None},
        ), 0
    count, pairs = len(plan.evaluation_steps), len(read.held_out_pairs)
    each = steps.distinct_tokens(read.held_out_pairs, layout)
    at = ", ".join(map(str, plan.evaluation_steps[:8])) + (", ..." if count > 8 else "")
    line = f"{counted(count, 'time')} {counted(pairs, 'held-out pair')} ({thousands(each)} tokens, no backward pass), at steps {at}"
    numbers = {"evaluations": count, "pairs": pairs, "tokens": count * each, "steps": plan.evaluation_steps}
    return Told("evaluation", [line], numbers), count * each
