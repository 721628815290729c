"""Train a reward model from preference pairs: the whole run, top to bottom.

    python -m open_rm.reward_modeling --model_name_or_path MODEL --dataset_mixer_list DATA 1.0 ...
    torchrun --nproc_per_node 8 -m open_rm.reward_modeling ... --deepspeed configs/ds/zero3.json

From Python, `main(Args(...))` does the same. An *episode* is one pair seen; a *step* is one optimizer step.
"""

import dataclasses
import functools
import math
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import transformers

from open_rm import (
    adapters,
    batching,
    command_line,
    engine,
    evaluation,
    families,
    hub,
    inspection,
    metrics,
    model,
    plots,
    saving,
    steps,
    tokenization,
)
from open_rm import data as preference_data
from open_rm.arguments import Args, check_args
from open_rm.errors import UserError
from open_rm.losses import loss_terms
from open_rm.plan import make_plan
from open_rm.rows import make_reading
from open_rm.tracking import Tracker, read_metrics


def main(args: Args) -> dict[str, float]:
    """Train, evaluate, save, check and push; returns the last metrics of training and evaluation."""
    check_args(args)
    ranks = engine.start_ranks()
    try:
        return run(args, ranks)
    finally:
        engine.stop_ranks()


def run(args: Args, ranks: engine.Ranks) -> dict[str, float]:
    """The run on one rank; every rank calls it."""
    # ---- seed, dtype, and whatever can fail for want of a name or a right
    torch.manual_seed(args.seed)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 renames; one such line per call would hide ours.
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use", category=FutureWarning)
    bf16 = args.dtype == "bfloat16" or (args.dtype == "auto" and ranks.device.type == "cuda")
    dtype = torch.bfloat16 if bf16 else torch.float32
    run_name = engine.broadcast_object(args.run_name or f"{args.exp_name}__{args.seed}__{int(time.time())}")
    output_dir = str(Path(args.output_dir or f"output/{run_name}").expanduser())
    revision = args.hf_repo_revision or run_name

    def claim() -> str | None:
        if not args.cache_dataset_only:
            saving.claim_folder(output_dir)
        if args.push_to_hub:
            owner = {"entity": args.hf_entity, "repo_id": args.hf_repo_id}
            return hub.check_access(**owner, revision=revision, private=args.hf_repo_private)

    repo_id = engine.on_main_rank(claim, ranks)

    source = {"revision": args.model_revision, "trust_remote_code": args.trust_remote_code}
    adapter = adapters.of(args)

    # ---- data: tokenized once, by the main rank, into a cache that the others read
    def load():
        config = families.read_config(args.model_name_or_path, max_token_length=args.max_token_length, **source)
        layout = families.choose_layout(
            args.batching,
            config,
            attn_implementation=args.attn_implementation,
            max_token_length=args.max_token_length,
            on_gpu=ranks.device.type == "cuda",
            bf16=bf16,
        )
        own_tokenizer = args.tokenizer_name in (None, args.model_name_or_path)
        tokenizer = tokenization.load_tokenizer(
            args.tokenizer_name or args.model_name_or_path,
            revision=args.tokenizer_revision or (args.model_revision if own_tokenizer else None),
            chat_template_name=args.chat_template_name,
            reward_token=args.reward_token,
            trust_remote_code=args.trust_remote_code,
        )
        how = {"adapter": adapter, "merge_adapter": args.merge_adapter}
        families.check_together(args.model_name_or_path, config, tokenizer, **how)
        train, held_out = preference_data.read_both(
            args.dataset_mixer_list,
            args.dataset_mixer_list_splits,
            args.dataset_mixer_eval_list,
            args.dataset_mixer_eval_list_splits,
            tokenizer=tokenizer,
            max_token_length=args.max_token_length,
            max_prompt_token_length=args.max_prompt_token_length,
            cache_dir=args.dataset_local_cache_dir,
            seed=args.seed,
            reading=make_reading(args.column_map, args.margin_from, args.parse_hh),
            overlength=args.overlength,
            skip_bad_rows=args.skip_bad_rows,
            num_proc=args.num_proc,
            progress=ranks.is_main and sys.stderr.isatty(),
        )
        return config, layout, tokenizer, train, held_out

    config, (layout, not_shared), tokenizer, train_data, eval_data = engine.main_rank_first(load, ranks)
    notes = [f"train: {line}" for line in train_data.report]
    notes += [f"eval: {line}" for line in eval_data.report] if eval_data else ["eval: no held-out data was named"]

    def look() -> list[str]:
        model.check_trusted_code(args.model_name_or_path, **source)
        saving.rehearse(tokenizer, chat=train_data.chat, trust_remote_code=args.trust_remote_code)
        found = inspection.inspect_data(train_data, eval_data, tokenizer)
        if args.strict:
            inspection.check_strict(found)
        return inspection.short_lines(found)

    notes += engine.on_main_rank(look, ranks) or []
    margins = train_data.margins()
    if args.margin_loss and (without := np.flatnonzero(np.isnan(margins))).size:
        place = train_data.places(without[:1])[0]
        sentence = (
            f"{place}: no margin, and --margin_loss needs one for every pair; see --margin_from, or remove the flag"
        )
        engine.fail_together(sentence, ranks)
    if not args.margin_loss and not np.isnan(margins).all():
        notes.append("the data has margins; the loss takes them with --margin_loss")
    if tokenization.prints_date(tokenizer):
        notes.append(
            f"the chat template prints today's date; here and in the saved tokenizer it is {tokenization.DATE}"
        )
    if args.use_slow_tokenizer:
        notes.append("--use_slow_tokenizer has no effect: transformers 5 has no slow tokenizers")
    if args.cache_dataset_only:
        if ranks.is_main:
            print("\n".join([*notes, f"cached in {args.dataset_local_cache_dir}; stopping (--cache_dataset_only)"]))
        return {}

    # ---- plan and sinks
    prompt_ids = train_data.table.prompt_id if args.group_by_prompt else None
    plan = make_plan(
        pairs=len(train_data),
        world_size=ranks.world_size,
        per_device_train_batch_size=args.per_device_train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        num_train_epochs=args.num_train_epochs,
        total_episodes=args.total_episodes,
        warm_up_steps=args.warm_up_steps,
        warmup_ratio=args.warmup_ratio,
        num_evals=args.num_evals,
        eval_steps=args.eval_steps,
        seed=args.seed,
        prompt_ids=prompt_ids,
    )
    budget = functools.partial(
        steps.micro_batch_budget, max_token_length=args.max_token_length, on_gpu=ranks.device.type == "cuda"
    )
    max_tokens = args.max_tokens_per_micro_batch or budget(args.per_device_train_batch_size)
    settings = dataclasses.asdict(args) | {
        "run_name": run_name,
        "output_dir": output_dir,
        "world_size": ranks.world_size,
    }
    settings |= {"max_tokens_per_micro_batch": max_tokens}
    settings |= {"hf_repo_id": repo_id, "plan": dataclasses.asdict(plan), "layout": layout}
    tracker = Tracker(
        output_dir,
        enabled=ranks.is_main,
        run_name=run_name,
        settings=settings,
        with_tracking=args.with_tracking,
        wandb_project_name=args.wandb_project_name,
        wandb_entity=args.wandb_entity,
    )

    # ---- model, engine, schedule
    ds_config = engine.fill_config(
        engine.read_config(args.deepspeed),
        width=config.get_text_config().hidden_size,
        bf16=bf16,
        per_device_train_batch_size=args.per_device_train_batch_size,
        max_grad_norm=args.max_grad_norm,
    )
    reward_model, model_notes = model.load_reward_model(
        args.model_name_or_path,
        **source,
        tokenizer=tokenizer,
        dtype=dtype,
        attn_implementation=args.attn_implementation,
        layout=layout,
        gradient_checkpointing=args.gradient_checkpointing,
        seed=args.seed,
        score_init=args.score_init,
        freeze_backbone=args.freeze_backbone,
        adapter=adapter,
        deepspeed_config=ds_config,
    )
    shape = model.model_shape(reward_model)
    notes += [*model_notes, model.apply_fused_kernels(reward_model, ranks.device), engine.describe(ds_config, ranks)]
    why = f", not shared_prefix: {not_shared}" if not_shared else ""
    notes.append(f"batching {layout}{why}, at most {max_tokens} positions a micro-batch unless one pair has more")
    notes.append(f"{plan.total_steps} steps of {plan.pairs_per_step} pairs, {plan.total_episodes} episodes")
    for note in notes:
        tracker.say(note)
    trainer = engine.Engine(
        reward_model,
        config=ds_config,
        ranks=ranks,
        learning_rate=args.learning_rate,
        eps=args.eps,
        weight_decay=args.weight_decay,
        optim=args.optim,
    )
    scheduler = transformers.get_scheduler(
        args.lr_scheduler_type,
        optimizer=trainer.optimizer,
        num_warmup_steps=plan.warmup_steps,
        num_training_steps=plan.total_steps,
    )

    # ---- the loop
    started, training_seconds, total_flops = time.perf_counter(), 0.0, 0.0
    episode, last_train, last_eval = 0, {}, {}
    peak_flops = engine.matmul_flops(ranks, bf16)
    area_cost = steps.attention_cost(shape.body_parameters, shape.layers, shape.attention_width)
    compute = {"layout": layout, "pad_token_id": tokenizer.pad_token_id}
    eval_compute = compute | {"max_tokens": budget(args.per_device_eval_batch_size)}

    def position() -> dict[str, float]:
        hours = (time.perf_counter() - started) / 3600
        return {"episode": episode, "epoch": episode / len(train_data), "hours": hours}

    def evaluate(step: int) -> dict[str, float]:
        if eval_data is None:
            return {}
        result = evaluation.evaluate(trainer, eval_data, **eval_compute)
        tracker.log(position() | result.metrics, step=step)
        tracker.evaluation_line(result.metrics, step=step)
        if ranks.is_main and args.num_sample_pairs:
            rows = evaluation.sample_table(result, eval_data, tokenizer, count=args.num_sample_pairs, seed=args.seed)
            tracker.log_samples(rows, step=step)
        return result.metrics

    def plans() -> Iterator[steps.StepPlan]:
        drawn = steps.draw_steps(
            len(train_data), plan.pairs_per_step, plan.total_episodes, args.seed, prompt_ids=prompt_ids
        )
        for indices in drawn:
            yield steps.plan_step(
                indices,
                train_data.table,
                layout=layout,
                world_size=ranks.world_size,
                max_tokens=max_tokens,
                area_cost=area_cost,
            )

    def batches() -> Iterator[tuple]:
        """This rank's micro-batches of all steps, made ahead of their use."""
        for step_plan in plans():
            parts = step_plan.ranks[ranks.rank]
            for number, (part, batch) in enumerate(train_data.batches(parts, **compute), start=1):
                yield step_plan, part, batch, number == len(parts)

    evaluate(step=0)
    ready = batching.prefetch(batches())
    for step in range(1, plan.total_steps + 1):
        step_started, data_seconds, last = time.perf_counter(), 0.0, False
        sums = metrics.StepMetrics(ranks.device, shape)
        while not last:
            data_started = time.perf_counter()
            step_plan, part, batch, last = next(ready)
            indices = step_plan.indices
            data_seconds += time.perf_counter() - data_started

            rewards = trainer(**batch.inputs(ranks.device))
            chosen, rejected = (side[: part.counted] for side in rewards.chunk(2))
            counted = part.indices[: part.counted]
            margin = torch.from_numpy(margins[counted]).to(ranks.device) if args.margin_loss else None
            terms = loss_terms(
                chosen,
                rejected,
                margin,
                loss_type=args.loss_type,
                focal_gamma=args.focal_gamma,
                label_smoothing=args.label_smoothing,
                penalty_type=args.penalty_type,
                penalty_weight=args.penalty_weight,
                penalty_bound=args.penalty_bound,
                center_rewards_coefficient=args.center_rewards_coefficient,
            )
            # Divided by the pairs of the whole step on all ranks: micro-batches and ranks do not change the mathematics.
            trainer.backward(sum(terms.values()).sum() / len(indices), last=last)
            sums.add(chosen, rejected, terms, batch)

        means, counts = sums.reduce(len(indices))
        lr = scheduler.get_last_lr()[0]
        # A loss that is no number must not reach the weights; the norm is known only when the step is made.
        grad_norm = trainer.step() if math.isfinite(means["loss"]) else math.nan
        if not math.isfinite(grad_norm):
            engine.fail_together(
                f"training diverged at step {step}, after episode {episode}: loss {means['loss']}, gradient norm "
                f"{grad_norm}; lower --learning_rate or add warm-up, and see the last lines of {output_dir}/metrics.jsonl",
                ranks,
            )
        scheduler.step()

        episode += len(indices)
        total_flops += counts["flops"]
        seconds = time.perf_counter() - step_started
        training_seconds += seconds
        last_train = {f"train/rm/{name}": value for name, value in means.items()}
        last_train |= {"train/rm/lr": lr, "train/rm/grad_norm": grad_norm}
        last_train |= metrics.perf_metrics(
            counts,
            pairs=len(indices),
            step_seconds=seconds,
            data_seconds=data_seconds,
            imbalance=step_plan.imbalance,
            memory_gib=engine.peak_memory_gib(ranks.device),
            total_flops=total_flops,
            peak_flops=peak_flops,
        )
        tracker.log(position() | last_train, step=step)
        eta = training_seconds / step * (plan.total_steps - step)
        tracker.train_line(position() | last_train, step=step, total_steps=plan.total_steps, eta_seconds=eta)
        if step in plan.evaluation_steps:
            last_eval = evaluate(step)

    # ---- save, prove that the folder gives the same rewards, draw, describe, push
    probe_data = eval_data or train_data
    probes = np.unique(np.linspace(0, len(probe_data) - 1, 4).astype(int))
    probe_rewards = evaluation.score_pairs(trainer, probe_data, probes, **eval_compute)
    state = trainer.gathered_state()

    def finish() -> None:
        loading = saving.Loading(str(dtype).removeprefix("torch."), args.load_in_4bit, args.trust_remote_code)
        how = {"chat": train_data.chat, "loading": loading}
        saving.save_reward_model(reward_model, state, tokenizer, output_dir, merge_adapter=args.merge_adapter, **how)
        saving.write_facts(output_dir, settings | {"notes": notes})
        curves = plots.draw_curves(read_metrics(Path(output_dir) / "metrics.jsonl"), Path(output_dir), title=run_name)
        tracker.log_figure(curves, step=plan.total_steps)
        hub.write_card(
            output_dir,
            title=run_name,
            name=repo_id or output_dir,
            revision=revision if repo_id else None,
            base_model=args.model_name_or_path,
            data=train_data.labels,
            chat=train_data.chat,
            ending=tokenization.ending(tokenizer),
            adapter=args.use_peft and not args.merge_adapter,
            loading=dataclasses.asdict(loading),
            metrics={name: value for name, value in (last_eval | last_train).items() if "/rm/" in name},
            facts=dataclasses.asdict(plan) | settings | {"plan": None, "total_flops": f"{total_flops:.3e}"},
        )
        tracker.say(f"saved in {output_dir} after {position()['hours'] * 60:.1f} min; curves: {curves}")
        sequences = [side.tolist() for pair in probe_data.pairs(probes) for side in pair]
        probe = saving.Probe(sequences, probe_rewards.flatten().tolist())
        patched = ranks.device.type == "cuda" or args.trust_remote_code  # what is built in this process is not plain
        tracker.say(saving.check_reload(output_dir, probe, tokenizer, fresh_process=patched, **how))
        if args.push_to_hub:
            url = hub.push_folder(output_dir, repo_id, revision=revision, private=args.hf_repo_private)
            tracker.say(f"pushed to {url}")

    try:
        engine.on_main_rank(finish, ranks)
    finally:
        tracker.close()
    return last_train | last_eval


if __name__ == "__main__":
    try:
        arguments = command_line.parse(Args, sys.argv[1:])
        check_args(arguments)
    except UserError as mistake:  # every rank finds the same mistake; one tells it
        sys.exit(f"error: {mistake}" if engine.environment_rank() == 0 else 1)
    try:
        main(arguments)
    except UserError as mistake:
        sys.exit(
            f"error: {mistake}" if engine.environment_rank() == 0 else f"[rank {engine.environment_rank()}] {mistake}"
        )
