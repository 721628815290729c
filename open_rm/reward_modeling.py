"""Train a reward model from preference pairs: the whole run, top to bottom.

    python -m open_rm.reward_modeling --model_name_or_path MODEL --dataset_mixer_list DATA 1.0 ...
    torchrun --nproc_per_node 8 -m open_rm.reward_modeling ... --deepspeed configs/ds/zero3.json

From Python, `main(Args(...))` does the same. An *episode* is one pair seen; a *step* is one optimizer step.

    main        the chapters below, between joining and leaving the other processes
    prepare     data, plan, model, engine: whatever can fail does so here, before the first step
    train       the loop: forward, loss, backward, step; checkpoints, from which the same command goes on
    evaluate    held-out pairs, each scored once; called by `train` before the first step, at times, and after the last
    finish      save, draw, judge, describe, prove that every client reads the same rewards, push

Every rank runs all of it. `ranks.from_main(f)`: the main rank alone runs f, and all get its value. `ranks.main_first(f)`: all
run f, the main rank first; the others find what it left in the cache. What is given `args` is typed with the group of flags
(flags.py) that it reads; `Args` is the sum of all. Shapes: B pairs of a micro-batch.
"""

from open_rm import command_line
from open_rm.checks import check_args
from open_rm.flags import Args

if __name__ == "__main__":  # a wrong command line is answered before the imports below, which take seconds
    ARGUMENTS = command_line.read(Args, check_args)

import dataclasses
import math
from dataclasses import dataclass

import torch

from open_rm import alike, alive, node_cache
from open_rm.batching import feeding, targets
from open_rm.batching.rules import BatchRules
from open_rm.dry_run import telling
from open_rm.evaluation import calibration, engine_scorer, held_out, in_training, sets
from open_rm.inspection import look
from open_rm.model import any_decoder, sequence_parallel
from open_rm.model.contract import Contract
from open_rm.model.kernels import capability_of, check_float8, use_fastest
from open_rm.model.loading import check_trusted_code, compute_dtype, fetch, load_reward_model
from open_rm.model.reward_model import RewardModel, model_shape
from open_rm.publishing import card, clients, proof, run_folder, saving
from open_rm.ranks import Ranks, joined_ranks
from open_rm.reliability import comparing, resuming
from open_rm.reliability.checkpoints import Checkpoint
from open_rm.reliability.keeper import Keeper
from open_rm.reliability.signals import Interrupted
from open_rm.reliability.survival import Survival, surviving
from open_rm.resolving import Resolved, resolve
from open_rm.training import best, divergence, ds_config, fitting, memory, trying
from open_rm.training.engine import Engine
from open_rm.training.losses import loss_terms
from open_rm.training.metrics import Meter
from open_rm.training.plan import Plan, make_plan
from open_rm.training.plots import draw_curves
from open_rm.training.progress import Progress
from open_rm.training.stragglers import Stragglers
from open_rm.training.tracking import Log, Tracker


@dataclass(frozen=True)
class Prepared(Resolved):
    """What is known before there is a model: data, and how everything is to be read and computed."""

    args: Args
    pinned: Args  # with the commits that the model's and the tokenizer's revisions stand for now: what all ranks read
    ranks: Ranks  # which process this is
    survival: Survival  # whether a stop was asked for; the claim on the folder
    place: run_folder.Place  # the run's name, its folder, its repository
    found: Checkpoint | None  # what is gone on from
    log: Log
    contract: Contract  # how a client has to read the saved folder
    checks: list[dict]  # which clients read it as it was trained (clients.ClientCheck)
    benchmarks: list[sets.NamedSet]


@dataclass(frozen=True)
class Run(Prepared):
    """What the loop and what follows it need. It is this file's own: a room is given the parts it needs."""

    plan: Plan  # which pairs each step takes; warm-up; when to evaluate
    rules: BatchRules  # how pairs lie in memory
    model: RewardModel
    engine: Engine  # the model being trained
    keeper: Keeper  # its checkpoints
    judge: in_training.Judge  # of the model, by benchmarks and held-out pairs

    def facts(self) -> dict:
        """Flags and what followed from them: for run.json, the trackers and the model card."""
        derived = {"run_name": self.place.name, "output_dir": self.place.folder, "hf_repo_id": self.place.repo_id}
        derived |= {"world_size": self.ranks.world_size, "layout": self.rules.layout} | targets.facts(self.train_pairs)
        derived |= {"max_tokens_per_micro_batch": self.rules.max_tokens, "plan": self.plan.numbers()}
        return vars(self.args) | derived | {"commits": node_cache.kept(self.args, self.pinned), "clients": self.checks}


def main(args: Args) -> dict[str, float]:
    """Train, evaluate, save, check and push; returns the last metrics of training and evaluation."""
    check_args(args)  # again for those who call from Python; it takes milliseconds
    if args.dry_run:
        return telling.tell(args)
    with joined_ranks() as alone, surviving(alone, args.stall_timeout) as survival:
        ranks = sequence_parallel.grouped(alone, args.sequence_parallel_size)
        alike.check(ranks, comparing.plain(args))
        if (prepared := prepare(args, ranks, survival)) is None:
            return {}
        run = build(prepared)
        progress = run.keeper.resume(run.engine, run.found, len(run.train_pairs), run.plan.total_steps)
        # From now on the folder says which run it holds: the same command goes on with it, another one is refused.
        ranks.from_main(lambda: run_folder.write_facts(run.place.folder, run.facts(), finished=False))
        records = resuming.records(run.found)
        with run.keeper, Tracker(run.place.folder, run.log, run.facts(), args, **records) as tracker:
            train(run, tracker, progress)
            finish(run, tracker, progress)
        return progress.metrics


def prepare(args: Args, ranks: Ranks, survival: Survival) -> Prepared | None:
    """Folder and data, the cheapest first; None where there is nothing to train."""
    log = Log(enabled=ranks.is_main)
    torch.manual_seed(args.seed)
    dtype = compute_dtype(args.dtype, ranks.device)
    trains, goes_on = not args.cache_dataset_only, args.resume_from_checkpoint != "never"
    # A folder that cannot be written, or a Hub that does not let us in, is found now and not after the last step.
    place = ranks.from_main(lambda: run_folder.claim(args, survival.take, trains=trains, goes_on=goes_on))
    survival.know(place.folder, named=args.output_dir is not None)
    held = (place.folder, place.begun, comparing.plain(args))
    found = resuming.find(args, *held, finished=place.finished, ranks=ranks, say=log.say) if trains else None
    if place.finished:
        log.say(f"the run in {place.folder} is finished, there is nothing to do; choose another --output_dir")
        return None

    # ---- data: tokenized once, by the main rank, into a cache that the others read
    device = {"on_gpu": ranks.on_gpu, "capability": capability_of(ranks.device)}

    def check(config) -> None:
        if trains:  # tokens can be cached on another machine
            check_float8(args, config, ranks.device, dtype, use_peft=args.use_peft)

    with alive.phase("reading data", alive.Kind.BUSY):
        pinned = node_cache.at(args, ranks.from_main(lambda: resuming.commits(args, found, place.begun)))
        benchmarks = ranks.main_first(lambda: sets.open_sets(args.benchmark)) if trains else []
        read = ranks.main_first(lambda: resolve(pinned, dtype, check=check, show_progress=ranks.is_main, **device))
        alike.compare(ranks, lambda: read.marks(comparing.data_mark) | sets.marks(benchmarks), alike.SAME_FILES)
    log.say(*read.lines())
    tokenizer, train_pairs = read.tokenizer, read.train_pairs
    contract = Contract.of(args, args, tokenizer, chat=train_pairs.chat, dtype=dtype, code=args.trust_remote_code)

    def rehearse() -> tuple[list[dict], list[str]]:
        """What would otherwise fail after hours; then a look at the data, which --strict may end."""
        check_trusted_code(pinned)
        checks = proof.rehearse(tokenizer, contract)
        found = look.before_training(train_pairs, read.held_out_pairs, tokenizer, args, margin_loss=args.margin_loss)
        return list(map(dataclasses.asdict, checks)), clients.lines(checks) + found

    checks, findings = ranks.from_main(rehearse)
    log.say(*findings)
    if args.cache_dataset_only:
        log.say(f"cached in {args.dataset_local_cache_dir}; stopping (--cache_dataset_only)")
        return None
    known = {"args": args, "pinned": pinned, "ranks": ranks, "survival": survival, "place": place, "found": found}
    return Prepared(**vars(read), **known, log=log, contract=contract, checks=checks, benchmarks=benchmarks)


def build(prepared: Prepared) -> Run:
    """Plan, model and engine; where a run goes on, what it may go on with."""
    args, ranks, log, found, dtype = (getattr(prepared, name) for name in ("args", "ranks", "log", "found", "dtype"))
    train_pairs, held_out_pairs, layout = prepared.train_pairs, prepared.held_out_pairs, prepared.layout
    # ---- plan: all numbers that follow from flags and data
    own = args.per_device_train_batch_size * args.gradient_accumulation_steps * ranks.world_size
    pairs_per_step = resuming.pairs_per_step(found, own, ranks, log.say)
    targets.check(train_pairs, args, pairs_per_step)
    how = {"seed": args.seed, "grouped": args.group_by_prompt, "whole_lists": args.list_loss != "pairs"}
    plan = make_plan(args, train_pairs.table, pairs_per_step, **how)
    how = {"max_token_length": args.max_token_length, "on_gpu": ranks.on_gpu, "whole_lists": plan.whole_lists}
    rules = feeding.rules_of(args, layout.name, prepared.tokenizer.pad_token_id, table=train_pairs.table, **how)
    log.say(plan.describe())

    # ---- model: backbone and score head, dropout off; then the engine that trains it
    with alive.phase("loading the model", alive.Kind.BUSY):
        ranks.once_a_node(lambda: fetch(prepared.pinned))
        width, bf16 = prepared.config.get_text_config().hidden_size, dtype == torch.bfloat16
        how = {"width": width, "bf16": bf16, "max_grad_norm": args.max_grad_norm, "world_size": ranks.world_size}
        deepspeed_config = ds_config.fill_config(args, **how)
        how = {"layout": layout.name, "dtype": dtype, "seed": args.seed, "deepspeed_config": deepspeed_config}
        with node_cache.model_as_fetched(args):
            model, lines = load_reward_model(prepared.pinned, prepared.tokenizer, adapter=args, **how)
        lines += sequence_parallel.use(model, ranks) + use_fastest(model, ranks.device, layout.name, float8=args.float8)
        log.say(*lines, ds_config.describe(deepspeed_config, ranks.device.type, ranks.world_size))
        engine = Engine(model, args, deepspeed_config, ranks, plan.total_steps, plan.warmup_steps)
        how = {"optim": args.optim, "table": train_pairs.table, "sought": args.find_batch_size}
        rules, lines = fitting.fit(args, model, engine, rules, **how)
        how = {"pairs_per_step": pairs_per_step, "before": found and found.state.get("found_budget")}
        rules, tried = trying.find(args, args, engine, rules, train_pairs, **how)
        log.say(rules.describe(layout.why_not_shared), *lines, *tried)
        rules = feeding.with_attention_cost(rules, model_shape(model), on_gpu=ranks.on_gpu)  # long sequences cost more

    # ---- checkpoints: room for them, and that this run is the one that a found one was begun as
    marks = resuming.marks_of(train_pairs, held_out_pairs, engine, dtype, margins=args.margin_loss)
    resuming.check_content(found, marks, args, ranks=ranks, say=log.say)
    facts = {"flags": comparing.plain(args), "name": prepared.place.name, "marks": marks, "layout": layout.name}
    facts |= {"pairs_per_step": pairs_per_step, "pairs_by_flags": own, "labels": train_pairs.labels}
    facts |= {"contract": dataclasses.asdict(prepared.contract), "plan": plan.numbers()} | targets.facts(train_pairs)
    facts |= {"held_out_pairs": len(held_out_pairs or ()), "probe": held_out.probed(held_out_pairs or train_pairs)}
    facts |= {"commits": node_cache.kept(args, prepared.pinned), "found_budget": trying.kept(args, rules, engine)}
    keeper = Keeper(args, ranks, prepared.place.folder, facts, say=log.say, holds=prepared.survival.holds)
    log.say(*keeper.check_room(engine, args.optim))
    known = engine_scorer.InTraining(model, prepared.tokenizer, prepared.contract, rules.for_evaluation(), ranks)
    judge = in_training.Judge.of(args, known, prepared.benchmarks, held_out_pairs, prepared.place.folder, args.seed)
    log.say(*ranks.from_main(judge.check))
    return Run(**vars(prepared), plan=plan, rules=rules, model=model, engine=engine, keeper=keeper, judge=judge)


def train(run: Run, tracker: Tracker, progress: Progress) -> None:
    """The loop; `progress` says where it begins, and afterwards how far it came."""
    args, ranks, engine, plan, keeper = run.args, run.ranks, run.engine, run.plan, run.keeper
    slow = Stragglers(engine.module, ranks, run.log.say)
    meter = Meter(ranks, model_shape(run.model), engine.dtype, slow)
    columns = targets.columns_of(run.train_pairs, args)  # what the loss is told of each pair besides its rewards
    draws = plan.draw(run.train_pairs.table)  # the pairs of each step, decided by (seed, epoch, step) alone
    steps = feeding.training_steps(draws, run.train_pairs, run.rules, ranks, targets=columns, after=progress.step)
    with run.survival.stop.at_a_step():
        if progress.evaluation_due:  # at the start: what training has to beat; or one that a stop broke off
            evaluate(run, tracker, progress)
            keeper.after_step(engine, progress, tracker.positions, stop=run.survival.stop)
        for step in steps if not best.out_of_patience(args, progress) else ():
            for micro in step.micro_batches:
                with memory.explained(micro, run.train_pairs, run.rules):
                    rewards = engine(**micro.batch.inputs(ranks.device))  # [2 B] or [2 B, 1 + K]: chosen, then rejected
                    # [B] each; [0] where this rank has no pair left and computes one only to keep in step with others
                    chosen, rejected, predicted = micro.sides(rewards)
                    terms = loss_terms(chosen, rejected, micro.targets, args, predicted)  # name -> [B], summed the loss
                    # The engine adds gradients over micro-batches and ranks and never averages, so each part is divided
                    # by the pairs of the whole step on all ranks: how a step is cut does not change the mathematics.
                    engine.backward(sum(terms.values()).sum() / step.pairs, last=micro.last)
                meter.add(chosen, rejected, terms, micro.batch, micro.targets)

            means = meter.reduce(step.pairs, waited=step.waited) | {"lr": engine.learning_rate}  # over all ranks
            grad_norm = engine.step(drop=not math.isfinite(means["loss"]))  # a step that is no number is not applied
            performance = meter.performance(step, flops_before=progress.flops) | keeper.figures()
            means["grad_norm"] = grad_norm
            if not math.isfinite(grad_norm):
                divergence.skip_or_end(args, step, means, progress, tracker, data=run.train_pairs, ranks=ranks)
            progress.advance(step, means, performance)
            tracker.training(progress)  # the step is whole here: weights, schedule, progress, record
            if step.number in plan.evaluation_steps:
                evaluate(run, tracker, progress)
            keeper.after_step(engine, progress, tracker.positions, stop=run.survival.stop)
            if best.out_of_patience(args, progress):
                run.log.say(f"no evaluation beat that of step {progress.best_step}: ending at step {step.number}")
                break
        keeper.after_training(engine, progress, tracker.positions)
        run.log.say(*slow.report())


def evaluate(run: Run, tracker: Tracker, progress: Progress) -> None:
    """Held-out pairs, each scored once; sample pairs, the same each time, so that one can watch a reward move."""
    args, pairs, ranks = run.args, run.held_out_pairs, run.ranks
    progress.evaluation_due = pairs is not None
    if pairs is None:
        return
    rewards_of = run.survival.stop.interruptible(run.engine, ranks)
    with run.engine.evaluating(), alive.phase(f"evaluation at step {progress.step}", alive.Kind.STEPS):
        try:
            result = run.judge.evaluate(rewards_of, step=progress.step)
        except Interrupted:
            return  # it is due still, and made when the run goes on
    progress.evaluated(result.metrics)
    best.judge(args, progress)
    tracker.evaluation(progress)
    if ranks.is_main and args.num_sample_pairs:
        rows = held_out.sample_table(result, pairs, run.tokenizer, count=args.num_sample_pairs, seed=args.seed)
        tracker.samples(progress, rows)


def finish(run: Run, tracker: Tracker, progress: Progress) -> None:
    """Save, draw, judge, describe, prove that every client reads the same rewards, push."""
    args, place, log = run.args, run.place, run.log
    if args.load_best_model_at_end and progress.best_step is not None:
        run.keeper.load_best(run.engine, progress)
    pairs, rules = run.held_out_pairs or run.train_pairs, run.rules.for_evaluation()
    how = {"ranks": run.ranks, "padded_rows": run.model.padded_rows}
    as_trained = held_out.probe(run.engine, pairs, rules, **how) if args.float8 else None
    with run.engine.evaluating():  # rewards of a few pairs, which the saved folder has to give too
        probe = held_out.probe(run.engine, pairs, rules, **how)
    state = run.engine.gathered_state()  # whole weights, on the main rank's CPU
    statistics = calibration.statistics_of(progress.last_evaluation, pairs=len(run.held_out_pairs or ()))
    contract = dataclasses.replace(run.contract, statistics=statistics)

    def save() -> None:
        run.survival.check_held()
        with run_folder.disk_explained(place.folder, run.keeper.committed_step):
            saving.save_reward_model(run.model, state, run.tokenizer, place.folder, contract)
            tracker.figure(draw_curves(tracker.record, title=place.name), progress)
        log.say(f"saved in {place.folder} after {progress.hours * 60:.1f} min; curves: {place.folder}/curves.png")

    def describe() -> None:
        report, facts = run.judge.report(scored, say=log.say), run.facts() | {"total_flops": f"{progress.flops:.3e}"}
        with run_folder.disk_explained(place.folder, run.keeper.committed_step):
            card.write_card(place, contract, facts, progress.results, data=run.train_pairs.labels, report=report)
        log.say(calibration.describe(statistics), *in_training.lines(report))

    def prove_and_push() -> None:
        # Fused kernels and code of the folder change transformers in this process; the proof then needs one of its own.
        patched = run.ranks.on_gpu or args.trust_remote_code or any_decoder.is_made_here(run.model.classifier)
        log.say(proof.check_reload(place.folder, probe, run.tokenizer, contract, fresh_process=patched))
        log.say(*proof.float8_difference(probe, as_trained))
        run_folder.conclude(args, place, lambda: run.facts() | {"notes": log.lines}, say=log.say)

    with alive.phase("saving the model", alive.Kind.BUSY):
        run.ranks.from_main(save)
        with run.engine.evaluating():
            scored = run.judge.scored(run.engine, step=progress.evaluated_step, say=log.say)
        run.ranks.from_main(describe)
        state = run.engine.release()  # the proof's client needs the device
        run.ranks.from_main(prove_and_push)


if __name__ == "__main__":
    command_line.run(main, ARGUMENTS)
