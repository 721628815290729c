"""Which values and combinations of flags cannot work: refused here, before anything is read or downloaded.

One function a concern. Each sentence names the flags and the way on. What only data, model or tokenizer can tell is refused
where those are read (data/, model/families.py).
"""

import os
from typing import Literal, get_args, get_origin, get_type_hints

from open_rm.bounds import Must
from open_rm.data.attributes import parse_attributes
from open_rm.data.mixer import parse_mixer
from open_rm.data.reading import reading_of_source
from open_rm.data.templates import read_template
from open_rm.errors import UserError
from open_rm.flags import (
    AdapterFlags,
    Args,
    BatchFlags,
    BenchmarkFlags,
    CheckpointFlags,
    DataFlags,
    DryRunFlags,
    ObjectiveFlags,
    OptimizerFlags,
    RunFlags,
    ScaleFlags,
    ScheduleFlags,
    TrackingFlags,
)
from open_rm.training import ds_config

LARGEST_WEIGHT = 1e6  # of an attribute; far above, rewards are no numbers after the first step


def check_args(args: Args) -> None:
    """Refuse every value and combination that cannot work, the cheapest to find first."""
    check_values(args)
    check_schedule(args, evaluates=bool(args.dataset_mixer_eval_list), lr_scheduler_type=args.lr_scheduler_type)
    check_objective(args, keep_ties=args.keep_ties, overlength=args.overlength)
    check_optimizer(args, starts_at_zero=args.use_peft or args.score_init == "zeros")
    check_attributes(args, weights=args.attribute_weights, coefficient=args.attribute_coefficient)
    check_adapter(args, freeze_backbone=args.freeze_backbone, trust_remote_code=args.trust_remote_code)
    check_outputs(run=args, tracking=args, trains=not args.cache_dataset_only)
    check_checkpoints(args, evaluates=bool(args.dataset_mixer_eval_list))
    check_batching(args, attn_implementation=args.attn_implementation)
    check_scale(args, batch=args)
    check_dry_run(args, trains=not args.cache_dataset_only)
    check_data(args)
    if args.chat_template_name is not None:
        read_template(args.chat_template_name)
    check_benchmarks(args, evaluates=bool(args.dataset_mixer_eval_list), trains=not args.cache_dataset_only)
    check_memory_layout(args)


def check_values(args: object) -> None:
    """Every flag keeps the bound in its type (bounds.Must), whether it comes from the command line or from Python."""
    for name, kind in get_type_hints(type(args), include_extras=True).items():
        value = getattr(args, name)
        if kind is bool and not isinstance(value, bool):  # from Python, the text "False" would be true
            raise UserError(f"--{name} {value!r}: must be True or False")
        if get_origin(kind) is list and not _is_list(value, *get_args(kind)):
            numbers = "numbers" if get_args(kind) == (float,) else "texts"
            raise UserError(f"--{name} {value!r}: must be a list of {numbers}")
        if get_origin(kind) is Literal and value not in get_args(kind):
            raise UserError(f"--{name} {value}: must be one of {', '.join(get_args(kind))}")
        for rule in getattr(kind, "__metadata__", ()):
            if not _passes(rule, value):
                raise UserError(f"--{name} {value}: must be {rule.be}")


def _is_list(value: object, kind: type) -> bool:
    """Whether it is a list; of numbers where these are asked."""
    if not isinstance(value, list | tuple):  # from Python, text would be taken letter by letter
        return False
    return kind is not float or all(isinstance(one, int | float) and not isinstance(one, bool) for one in value)


def _passes(rule: Must, value: object) -> bool:
    try:
        return rule.test(value)
    except TypeError:  # from Python: None, or text, where a number has to be
        return False


def check_schedule(flags: ScheduleFlags, *, evaluates: bool, lr_scheduler_type: str) -> None:
    """How long to train, and when to evaluate."""
    if flags.warm_up_steps and flags.warmup_ratio:
        raise UserError("--warm_up_steps and --warmup_ratio both set the warm-up; pass one")
    if lr_scheduler_type == "constant" and (flags.warm_up_steps or flags.warmup_ratio):
        raise UserError(
            "--lr_scheduler_type constant has no warm-up; pass constant_with_warmup, or no --warm_up_steps/--warmup_ratio"
        )
    if flags.total_episodes is not None and flags.num_train_epochs != ScheduleFlags.num_train_epochs:
        raise UserError("--total_episodes and --num_train_epochs both say how long to train; pass one")
    if flags.eval_steps is not None and flags.num_evals != ScheduleFlags.num_evals:
        raise UserError("--num_evals and --eval_steps both say when to evaluate; pass one")
    for name, asked in (("eval_steps", flags.eval_steps), ("num_evals", flags.num_evals > ScheduleFlags.num_evals)):
        if asked and not evaluates:
            raise UserError(f"--{name} needs held-out data; name some with --dataset_mixer_eval_list")


def check_objective(flags: ObjectiveFlags, *, keep_ties: bool, overlength: str) -> None:
    """Flags of a loss that is not used, and what a loss of lists does not go with."""
    if flags.focal_gamma != ObjectiveFlags.focal_gamma and flags.loss_type != "focal":
        raise UserError("--focal_gamma does nothing without --loss_type focal; add or remove it")
    if flags.label_smoothing and flags.loss_type != "ranking":
        raise UserError("--label_smoothing is defined for --loss_type ranking alone; remove one of them")
    if flags.penalty_weight != ObjectiveFlags.penalty_weight and flags.penalty_type == "none":
        raise UserError("--penalty_weight does nothing without --penalty_type; add or remove it")
    if flags.penalty_bound != ObjectiveFlags.penalty_bound and flags.penalty_type != "log_barrier":
        raise UserError("--penalty_bound does nothing without --penalty_type log_barrier; add or remove it")
    if flags.list_loss == "pairs":
        return
    of_pairs = {
        "--loss_type focal": flags.loss_type == "focal",
        "--label_smoothing": flags.label_smoothing,
        "--margin_loss": flags.margin_loss,
        "--keep_ties": keep_ties,
    }
    for name, given in of_pairs.items():
        if given:
            raise UserError(
                f"{name} is defined for pairs alone, not for --list_loss {flags.list_loss}; remove one of them"
            )
    if overlength == "truncate":
        raise UserError(
            f"--overlength truncate cuts each pair by itself, and --list_loss {flags.list_loss} compares the answers of a whole "
            "list; remove one of them"
        )


def check_attributes(flags: DataFlags, *, weights: list[float], coefficient: float) -> None:
    """One weight for each attribute, each attribute once."""
    names = [name for name, _ in parse_attributes(flags.attributes)]
    idle = {"weights": weights, "coefficient": coefficient != ObjectiveFlags.attribute_coefficient}
    for name, given in idle.items():
        if given and not names:
            raise UserError(f"--attribute_{name} does nothing without --attributes; add or remove it")
    if len(weights) != len(names):
        raise UserError(
            f"--attributes names {len(names)} and --attribute_weights has {len(weights)}; pass one weight for each attribute, in "
            "the same order (0: it is predicted and is no part of the reward)"
        )
    if strange := [weight for weight in weights if not abs(weight) < LARGEST_WEIGHT]:
        raise UserError(
            f"--attribute_weights {strange[0]}: must be a number between -{LARGEST_WEIGHT:g} and {LARGEST_WEIGHT:g}"
        )
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--attributes names {twice[0]} twice; name each attribute once")


def check_optimizer(flags: OptimizerFlags, *, starts_at_zero: bool) -> None:
    """starts_at_zero: some of the trained weights do."""
    if flags.optim == "adafactor" and starts_at_zero:
        raise UserError(
            "--optim adafactor makes steps relative to the weights, and --score_init zeros and --use_peft begin at zero; "
            "pass another --optim"
        )
    if flags.optim == "adafactor" and flags.eps != OptimizerFlags.eps:
        raise UserError("--eps is AdamW's and does nothing with --optim adafactor; remove one of them")
    if flags.lr_scheduler_type == "polynomial" and flags.learning_rate <= 1e-7:
        raise UserError(f"--learning_rate {flags.learning_rate}: polynomial decay ends at 1e-7; start above it")


def check_adapter(flags: AdapterFlags, *, freeze_backbone: bool, trust_remote_code: bool) -> None:
    """An adapter's flags without an adapter, and what it does not go with."""
    if not flags.use_peft:
        plain = AdapterFlags()
        for name in ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "load_in_4bit", "merge_adapter"):
            if getattr(flags, name) != getattr(plain, name):
                raise UserError(f"--{name} does nothing without --use_peft; add or remove it")
        return
    if trust_remote_code and not flags.merge_adapter:
        raise UserError(
            "--trust_remote_code with --use_peft needs --merge_adapter: a client of the adapter could not find the class"
        )
    if freeze_backbone:
        raise UserError("--freeze_backbone trains the head alone and --use_peft an adapter too; pass one")


def check_outputs(*, run: RunFlags, tracking: TrackingFlags, trains: bool) -> None:
    """Hub and wandb."""
    parts = (run.hf_repo_id or "NAME").split("/")
    if len(parts) > 2 or not all(parts):
        raise UserError(f"--hf_repo_id {run.hf_repo_id}: a repository of the Hub is NAME or OWNER/NAME; correct it")
    if run.hf_entity and "/" in (run.hf_repo_id or ""):
        raise UserError("--hf_entity and the first part of --hf_repo_id both name the owner; pass one")
    if (run.hf_entity or run.hf_repo_id or run.hf_repo_revision) and not run.push_to_hub:
        raise UserError(
            "--hf_entity, --hf_repo_id and --hf_repo_revision do nothing without --push_to_hub; add or remove it"
        )
    if run.push_to_hub and not trains:
        raise UserError("--cache_dataset_only trains no model for --push_to_hub; remove one of them")
    if tracking.wandb_entity and not tracking.with_tracking:
        raise UserError("--wandb_entity does nothing without --with_tracking; add or remove it")


def check_checkpoints(flags: CheckpointFlags, *, evaluates: bool) -> None:
    """The best evaluation, and what needs it."""
    for name in ("load_best_model_at_end", "early_stopping_patience"):
        if getattr(flags, name) and flags.metric_for_best_model is None:
            raise UserError(f"--{name} compares evaluations; say by what, e.g. --metric_for_best_model accuracy")
    if flags.metric_for_best_model is not None and not evaluates:
        raise UserError("--metric_for_best_model needs held-out data; name some with --dataset_mixer_eval_list")
    if flags.load_best_model_at_end and flags.checkpointing_minutes == 0 and not flags.checkpointing_steps:
        raise UserError("--load_best_model_at_end needs checkpoints, which --checkpointing_minutes 0 switches off")


def check_batching(flags: BatchFlags, *, attn_implementation: str | None) -> None:
    """Layouts that bring their own attention."""
    if attn_implementation and flags.batching in ("packed", "shared_prefix"):
        raise UserError(
            f"--attn_implementation chooses attention for padded rows and --batching {flags.batching} has its own; pass one"
        )


def check_scale(flags: ScaleFlags, *, batch: BatchFlags) -> None:
    """A budget that is both found and given."""
    if flags.find_batch_size and batch.max_tokens_per_micro_batch is not None:
        raise UserError("--find_batch_size looks for --max_tokens_per_micro_batch; pass one")


def check_dry_run(flags: DryRunFlags, *, trains: bool) -> None:
    """Flags of a run that is only described."""
    for name in ("world_size", "device_memory_gib", "tokens_per_second"):
        if getattr(flags, name) is not None and not flags.dry_run:
            raise UserError(f"--{name} is what --dry_run plans for, and does nothing without it; add or remove it")
    if flags.dry_run and not trains:
        raise UserError("--dry_run describes a training, and --cache_dataset_only trains nothing; pass one")


def check_data(flags: DataFlags) -> None:
    """Lengths, columns, and sources as far as their names tell."""
    if flags.max_prompt_token_length > flags.max_token_length:
        raise UserError(
            f"--max_prompt_token_length {flags.max_prompt_token_length} is above --max_token_length "
            f"{flags.max_token_length}, and a prompt is part of every side; lower one or raise the other"
        )
    if not flags.dataset_mixer_list:
        raise UserError("--dataset_mixer_list is empty; name training data and an amount: my/data 1.0")
    for flag, split in (("dataset_mixer_list", "train"), ("dataset_mixer_eval_list", "eval")):
        for i, source in enumerate(parse_mixer(getattr(flags, flag), getattr(flags, f"{flag}_splits"), flag)):
            reading_of_source(flags, split, source.name, i)


def check_benchmarks(flags: BenchmarkFlags, *, evaluates: bool, trains: bool) -> None:
    """Their names, as far as these tell, and when they are judged."""
    if flags.benchmark:
        # it brings numpy and datasets, which take seconds and which most commands are answered without
        from open_rm.evaluation.arguments import wanted_sets

        wanted_sets(flags.benchmark)
    if flags.benchmark and not trains:
        raise UserError("--cache_dataset_only trains no model for --benchmark; remove one of them")
    if flags.benchmark_rows and not flags.benchmark:
        raise UserError("--benchmark_rows does nothing without --benchmark; add or remove it")
    if flags.benchmark_max_token_length != BenchmarkFlags.benchmark_max_token_length and not flags.benchmark:
        raise UserError("--benchmark_max_token_length does nothing without --benchmark; add or remove it")
    if flags.benchmark_rows and not evaluates:
        raise UserError("--benchmark_rows needs evaluations; name held-out data with --dataset_mixer_eval_list")


def check_memory_layout(args: Args) -> None:
    """The DeepSpeed file, and what its stage does not go with."""
    zero = ds_config.read_config(args.deepspeed)["zero_optimization"]
    ds_config.node_partition(args.deepspeed, zero, args.world_size or int(os.environ.get("WORLD_SIZE", 1)))
    stage = zero.get("stage", 0)
    if args.optim == "adafactor" and (stage > 0 or _computes_in_bfloat16(args.dtype)):
        raise UserError(
            "--optim adafactor needs whole matrices, and ZeRO (which bfloat16 needs for its float32 master weights) makes "
            "vectors of them; pass --dtype float32 without --deepspeed, or --optim adamw_8bit"
        )
    if args.load_in_4bit and stage == 3:
        raise UserError(
            f"--load_in_4bit and --deepspeed {args.deepspeed}: ZeRO stage 3 cannot divide 4-bit weights; pass "
            "configs/ds/zero2.json, or leave out --load_in_4bit"
        )


def _computes_in_bfloat16(dtype: str) -> bool:
    if dtype != "auto":
        return dtype == "bfloat16"
    import torch  # imported by nobody else here: it takes seconds, and most mistakes are found without it

    return torch.cuda.is_available()
