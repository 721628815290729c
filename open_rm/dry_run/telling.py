"""--dry_run: everything that a run would do, said without weights, a GPU or another process; and written to plan.json.

    tell        the chapters below, in the order of the run
    _read       config, tokenizer and pairs, as the run reads them (resolving.py), and its checks that cost little
    _planned    steps, memory, what would fit instead

Only this file takes all flags. docs/dry_run.md has the formulas and the keys of plan.json.
"""

import dataclasses
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import transformers

from open_rm.batching import feeding
from open_rm.batching.rules import BatchRules
from open_rm.dry_run import alternatives, disk, hours, hub_and_wandb, memory, sizes, steps, told
from open_rm.dry_run.target import Target, target_of
from open_rm.dry_run.told import Told, thousands
from open_rm.errors import UserError
from open_rm.evaluation import sets
from open_rm.flags import Args
from open_rm.inspection import look
from open_rm.model import float8
from open_rm.model.contract import Contract
from open_rm.publishing import clients, proof
from open_rm.publishing.pushing import MODELS
from open_rm.publishing.run_folder import FACTS, RECORD
from open_rm.resolving import Resolved, resolve
from open_rm.training import ds_config, fitting
from open_rm.training.plan import Plan, make_plan


def tell(args: Args) -> dict[str, float]:
    """Print the plan and write it to plan.json in the run's folder. Of several processes the first one speaks.

    Returns:
        no metrics, since nothing is trained.

    Raises:
        UserError: what the run itself would refuse.
    """
    if int(os.environ.get("RANK", 0)):
        return {}
    transformers.logging.set_verbosity_error()
    name = args.run_name or f"{args.exp_name}__{args.seed}__{int(time.time())}"
    folder = str(Path(args.output_dir or f"output/{name}").expanduser())
    rate = hours.rate_of(args)
    target = target_of(args, dtype=args.dtype, group=args.sequence_parallel_size)
    if target.world_size % target.group:
        raise UserError(
            f"--sequence_parallel_size {target.group} does not divide the {target.world_size} devices; change one of them"
        )
    print(f"dry run of {name}: nothing is trained", flush=True)
    read, warnings = _read(args, target)
    chapters = _planned(args, target, read, rate, folder)
    chapters += [hub_and_wandb.hub(args, name), hub_and_wandb.wandb(args), Told("checks", warnings, warnings)]
    chapters.append(_folder(args, folder))
    print(told.as_text(chapters), flush=True)
    print(f"written to {told.write(folder, [_of_run(args, name), *chapters])}", flush=True)
    return {}


def _of_run(args: Args, name: str) -> Told:
    flags = {name: value for name, value in dataclasses.asdict(args).items()}
    return Told("run", [], {"name": name, "plan_version": 1, "flags": flags})


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _read(args: Args, target: Target) -> tuple[Resolved, list[str]]:
    """What the run reads before its model; warnings that it would print."""
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
    lines += [f"benchmark {named.says()}" for named in benchmarks]
    if args.float8 and target.capability is None:
        lines.append("--float8 is not looked at here: the GPU decides")
    if args.find_batch_size:
        lines.append("--find_batch_size: the micro-batch is found on the device; here it is estimated")
    return read, lines


def _planned(args: Args, target: Target, read: Resolved, rate: hours.Rate | None, folder: str) -> list[Told]:
    """The chapters from the devices to the disk."""
    model = sizes.planned(args, read.tokenizer, adapter=args, dtype=target.dtype, on_gpu=target.on_gpu)
    table, layout = read.train_pairs.table, read.layout
    rules = feeding.rules_of(
        args, layout.name, read.tokenizer.pad_token_id, max_token_length=args.max_token_length, on_gpu=target.on_gpu
    )
    keys = float(fitting.keys_of_positions(table)[1].max()) if layout.name == "shared_prefix" else 1.0
    longest = int(max(table.chosen_length.max(), table.rejected_length.max()))
    how = {"keys": keys, "budget": rules.max_tokens, "longest": longest}
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
        alternatives.told(options, model),
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
    own = args.per_device_train_batch_size * args.gradient_accumulation_steps * target.world_size
    plan = make_plan(args, read.train_pairs.table, own, seed=args.seed, grouped=args.group_by_prompt)
    rules = feeding.with_attention_cost(rules, model.shape, on_gpu=target.on_gpu)
    _say("dealing steps ...")
    how = {"ranks": target.world_size // target.group, "group": target.group, "seed": args.seed}
    return _Steps(plan, rules, steps.deal(plan, read.train_pairs, rules, **how))


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
        return Told("evaluation", ["none: no held-out data was named"], {"evaluations": 0, "tokens": 0}), 0
    count, pairs = len(plan.evaluation_steps), len(read.held_out_pairs)
    each = steps.distinct_tokens(read.held_out_pairs, layout)
    at = ", ".join(map(str, plan.evaluation_steps[:8])) + (", ..." if count > 8 else "")
    line = (
        f"{count} times {thousands(pairs)} held-out pairs ({thousands(each)} tokens, no backward pass), at steps {at}"
    )
    numbers = {"evaluations": count, "pairs": pairs, "tokens": count * each, "steps": plan.evaluation_steps}
    return Told("evaluation", [line], numbers), count * each


def _folder(args: Args, folder: str) -> Told:
    """What the run would make of its folder as it is."""
    path, facts = Path(folder), None
    if (path / FACTS).is_file():
        try:
            facts = json.loads((path / FACTS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            facts = None
    finished = facts.get("finished") if isinstance(facts, dict) else None
    others = [name for name in (*MODELS, RECORD) if (path / name).exists()]
    goes_on = args.resume_from_checkpoint != "never"
    if finished and goes_on and any(name in MODELS for name in others):
        state, line = "finished", "holds a finished run: the same command would do nothing"
    elif finished is False and goes_on:
        state, line = "begun", "holds a run that is not finished: the same command goes on with it"
    elif others:
        state, line = "occupied", f"holds {others[0]} of something else: the run would refuse it, choose another folder"
    else:
        state, line = "free", "is free"
    return Told("output_dir", [f"{folder} {line}"], {"folder": folder, "state": state})
