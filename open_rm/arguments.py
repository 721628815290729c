"""The flags of the recipe, and the combinations that cannot work.

One flat dataclass, read-only once parsed; the sentence under a field is what `--help` prints. Names are those of
open-instruct's reward_modeling.py where it has the flag.
"""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args, get_origin, get_type_hints

import torch

from open_rm import engine, losses, rows, sources, tokenization
from open_rm.errors import UserError


@dataclass(frozen=True)
class Args:
    """Train a reward model (Bradley-Terry) from preference pairs.

    --config FILE.yaml sets flags from a file (one `name: value` a line); those on the command line override it.
    """

    # ---- model
    model_name_or_path: str = "EleutherAI/pythia-14m"
    """Checkpoint to start from: a Hub name or a local folder. A reward model keeps its head."""
    model_revision: str | None = None
    """Branch, tag or commit of the model on the Hub. None: the default branch."""
    trust_remote_code: bool = False
    """Run the Python code that a model's or tokenizer's folder brings. Read that code first."""
    tokenizer_name: str | None = None
    """Tokenizer: a Hub name or a local folder. None: the model's."""
    tokenizer_revision: str | None = None
    """Branch, tag or commit of the tokenizer. None: model_revision if the tokenizer is the model's."""
    use_slow_tokenizer: bool = False
    """Accepted for old command lines; transformers 5 has no slow tokenizers, and the log says so."""
    chat_template_name: str | None = None
    """How messages become text: a name (see open_rm/chat_templates), a Jinja file, or None for the tokenizer's own."""
    reward_token: str | None = None
    """Token appended to every response and scored (XTuner), of the tokenizer or new; it must not occur in the data."""
    score_init: Literal["default", "zeros"] = "default"
    """A new score head: N(0, 1 / (h + 1)), or zeros, so that every reward begins at 0. A reward model keeps its head."""
    freeze_backbone: bool = False
    """Train the score head alone."""
    use_peft: bool = False
    """Train a LoRA adapter and the score head, the backbone frozen."""
    lora_r: int = 16
    """Rank of the adapter's matrices."""
    lora_alpha: float = 32.0
    """The adapter is scaled by lora_alpha / lora_r."""
    lora_dropout: float = 0.0
    """Dropout on the adapter's input; any makes rewards in training differ from those in evaluation."""
    lora_target_modules: list[str] = field(default_factory=list)
    """Linear layers to adapt, by the last part of their names, e.g. q_proj v_proj. Empty: all of the backbone's; a
    mixture's experts are none."""
    load_in_4bit: bool = False
    """Hold the frozen weights in 4 bits (QLoRA). With use_peft."""
    merge_adapter: bool = False
    """Save the sum of weights and adapter, a plain model, instead of the adapter and the head."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype; bfloat16 keeps float32 master weights. auto: bfloat16 on a GPU, float32 on the CPU."""
    attn_implementation: str | None = None
    """Attention of transformers: eager, sdpa, flash_attention_2, ... None: the best that transformers finds."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    # ---- data
    dataset_mixer_list: list[str] = field(default_factory=lambda: ["trl-internal-testing/sentiment-trl-style", "400"])
    """Training data: alternating name (Hub name[:config][@revision], file, folder, glob) and amount (400 rows, or 0.5 of
    them)."""
    dataset_mixer_list_splits: list[str] = field(default_factory=lambda: ["train"])
    """Split of each training source, or one for all. A single file is itself the split."""
    dataset_mixer_eval_list: list[str] = field(default_factory=list)
    """Held-out data, like dataset_mixer_list. Empty: no evaluation."""
    dataset_mixer_eval_list_splits: list[str] = field(default_factory=lambda: ["test"])
    """Split of each held-out source, or one for all."""
    column_map: list[str] = field(default_factory=list)
    """Columns of other names: ours=theirs, e.g. chosen=better rejected=worse."""
    margin_from: list[str] = field(default_factory=list)
    """Two columns, e.g. score_chosen score_rejected: a pair's margin is the first minus the second. None: column margin."""
    parse_hh: bool = False
    """Turn text of the form "Human: ... Assistant: ..." into messages for the chat template, not training on it as text."""
    skip_bad_rows: int = 0
    """Skip, list and count so many malformed rows; the next one stops the run."""
    max_token_length: int = 512
    """Most tokens of a side (prompt and response)."""
    max_prompt_token_length: int = 256
    """Most tokens of a prompt."""
    overlength: Literal["filter", "truncate"] = "filter"
    """Pairs beyond these: left out, or cut (the prompt's start, then a response's end but for the scored token). Counted."""
    num_proc: int = 1
    """Processes that tokenize; each of them encodes on one core, a single one on all."""
    strict: bool = False
    """Stop before training where the look at the data (python -m open_rm.inspection) has findings."""
    dataset_local_cache_dir: str = "local_dataset_cache"
    """Folder for tokenized data; found again while data, tokenizer and lengths are the same."""
    cache_dataset_only: bool = False
    """Tokenize into the cache and stop."""
    # ---- experiment
    exp_name: str = "reward_modeling"
    """First part of the run's name."""
    run_name: str | None = None
    """Name of this run. None: <exp_name>__<seed>__<unix time>."""
    seed: int = 1
    """Decides the order of the pairs, random subsets and the initial score head."""
    output_dir: str | None = None
    """Where the final model lands, exactly. None: output/<run_name>."""
    # ---- objective
    loss_type: Literal["ranking", "focal"] = "ranking"
    """Bradley-Terry, or with less weight on pairs that are already right (InternLM2)."""
    focal_gamma: float = 2.0
    """Exponent of the focal weight; 0 is ranking."""
    label_smoothing: float = 0.0
    """Share of labels taken to be swapped, from 0 to below 0.5. With loss_type ranking."""
    penalty_type: Literal["none", "log_barrier", "L2"] = "none"
    """Keep rewards small: a wall at +-penalty_bound, or their squares (XTuner)."""
    penalty_weight: float = 0.01
    """Factor of the penalty."""
    penalty_bound: float = 5.0
    """Where log_barrier's wall stands, in units of reward."""
    center_rewards_coefficient: float = 0.0
    """Factor of (chosen + rejected reward)^2, which centres rewards at 0; 0.01 is common. 0: off."""
    margin_loss: bool = False
    """Chosen must lead by the pair's margin (Llama 2). Every training pair needs one."""
    # ---- optimizer
    optim: Literal["adamw", "adamw_8bit", "adafactor"] = "adamw"
    """AdamW, fused; with 8-bit moments (bitsandbytes), a quarter of their memory; or Adafactor (torch), with almost none and
    steps of learning_rate times the size of each weight, so that it wants a larger one."""
    learning_rate: float = 3e-6
    """Peak learning rate."""
    eps: float = 1e-5
    """AdamW's epsilon."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay; not applied to biases and norms."""
    max_grad_norm: float = 1.0
    """Clip the global gradient norm to this. 0: never."""
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = "linear"
    """Course of the learning rate over optimizer steps, as transformers names them."""
    warm_up_steps: int = 0
    """Optimizer steps of linear warm-up."""
    warmup_ratio: float = 0.0
    """The same as a share of all steps. Not together with warm_up_steps."""
    # ---- batch sizes
    num_train_epochs: float = 1.0
    """Passes over the training pairs."""
    total_episodes: int | None = None
    """Stop after this many pairs instead. None: num_train_epochs decides."""
    per_device_train_batch_size: int = 1
    """Times gradient_accumulation_steps and devices, the pairs of a step; times 2 x max_token_length, the tokens of a
    micro-batch."""
    per_device_eval_batch_size: int = 8
    """The same in evaluation: it bounds memory and does not change results."""
    gradient_accumulation_steps: int = 8
    """See per_device_train_batch_size; fewer forwards are made where pairs are shorter than max_token_length."""
    batching: Literal["auto", "padded", "packed", "shared_prefix"] = "auto"
    """How pairs lie in memory: padded rows, packed into one row, or packed with every shared prompt computed once; all
    give the same rewards and gradients. auto: shared_prefix wherever it is exact, else padded and the log says why."""
    group_by_prompt: bool = False
    """Keep all pairs of a prompt in one step, so that shared_prefix computes prompt and repeated responses once."""
    max_tokens_per_micro_batch: int | None = None
    """Most positions of a forward per device. None: 2 x per_device_train_batch_size x max_token_length, on a CPU at most
    1536, which its caches hold well."""
    deepspeed: str | None = None
    """DeepSpeed file for the memory layout, e.g. configs/ds/zero3.json. None: ZeRO stage 0."""
    # ---- evaluation and tracking
    num_evals: int = 1
    """Evaluations during training, evenly spaced, besides those before the first and after the last step."""
    eval_steps: int | None = None
    """Evaluate every so many optimizer steps instead. None: num_evals decides."""
    num_sample_pairs: int = 4
    """Pairs in the table of samples shown at each evaluation."""
    with_tracking: bool = False
    """Track with wandb; offline where there is no key or no server."""
    wandb_project_name: str = "open_rm"
    """wandb project."""
    wandb_entity: str | None = None
    """wandb user or team. None: the key's default."""
    # ---- Hub
    push_to_hub: bool = False
    """Push the final model to the Hugging Face Hub; needs HF_TOKEN in the environment."""
    hf_entity: str | None = None
    """User or organisation on the Hub. None: the token's user."""
    hf_repo_id: str | None = None
    """Repository, name or entity/name. None: open_rm_dev."""
    hf_repo_revision: str | None = None
    """Branch to push to. None: the run's name."""
    hf_repo_private: bool = True
    """Whether a repository that has to be created is private."""


def check_args(args: Args) -> None:
    """Refuse, before anything is read or downloaded, every value and combination that cannot work."""
    for name, kind in get_type_hints(Args).items():
        if get_origin(kind) is Literal and getattr(args, name) not in get_args(kind):
            raise UserError(f"--{name} {getattr(args, name)}: must be one of {', '.join(get_args(kind))}")
    ones = (
        "max_token_length",
        "max_prompt_token_length",
        "total_episodes",
        "eval_steps",
        "gradient_accumulation_steps",
    )
    ones += ("per_device_train_batch_size", "per_device_eval_batch_size", "max_tokens_per_micro_batch")
    ones += ("num_proc", "lora_r")
    zeros = ("weight_decay", "max_grad_norm", "warm_up_steps", "warmup_ratio", "num_evals", "num_sample_pairs", "seed")
    zeros += (
        "skip_bad_rows",
        "focal_gamma",
        "lora_dropout",
        "label_smoothing",
        "penalty_weight",
        "center_rewards_coefficient",
    )
    for names, minimum in ((ones, 1), (zeros, 0)):
        for name in names:
            if getattr(args, name) is not None and not getattr(args, name) >= minimum:
                raise UserError(f"--{name} {getattr(args, name)}: must be at least {minimum}")
    for name in ("learning_rate", "eps", "num_train_epochs", "lora_alpha"):
        if not 0 < getattr(args, name) < math.inf:
            raise UserError(f"--{name} {getattr(args, name)}: must be above 0")
    for name in ("focal_gamma", "penalty_weight", "center_rewards_coefficient"):
        if math.isinf(getattr(args, name)):
            raise UserError(f"--{name} {getattr(args, name)}: must be finite")
    if args.lora_dropout >= 1:
        raise UserError(f"--lora_dropout {args.lora_dropout}: is a probability, below 1")
    if args.label_smoothing >= 0.5:
        raise UserError(f"--label_smoothing {args.label_smoothing}: is the share of swapped labels, below 0.5")
    if not losses.BARRIER_EDGE < args.penalty_bound < math.inf:
        raise UserError(f"--penalty_bound {args.penalty_bound}: must be above {losses.BARRIER_EDGE}")
    if args.seed >= 2**32:
        raise UserError(f"--seed {args.seed}: must be below 2**32")
    if args.lr_scheduler_type == "polynomial" and args.learning_rate <= 1e-7:
        raise UserError(f"--learning_rate {args.learning_rate}: polynomial decay ends at 1e-7; start above it")
    if args.warmup_ratio >= 1:
        raise UserError(f"--warmup_ratio {args.warmup_ratio}: is a share of all steps, below 1")
    if args.max_prompt_token_length > args.max_token_length:
        raise UserError(
            f"--max_prompt_token_length {args.max_prompt_token_length} is above --max_token_length "
            f"{args.max_token_length}, and a prompt is part of every side; lower one or raise the other"
        )
    contradictions = (
        (args.warm_up_steps and args.warmup_ratio, "--warm_up_steps and --warmup_ratio both set the warm-up; pass one"),
        (
            args.lr_scheduler_type == "constant" and (args.warm_up_steps or args.warmup_ratio),
            "--lr_scheduler_type constant has no warm-up; pass constant_with_warmup, or no --warm_up_steps/--warmup_ratio",
        ),
        (
            args.eval_steps is not None and args.num_evals != Args.num_evals,
            "--num_evals and --eval_steps both say when to evaluate; pass one",
        ),
        (
            args.eval_steps is not None and not args.dataset_mixer_eval_list,
            "--eval_steps needs held-out data; name some with --dataset_mixer_eval_list",
        ),
        (
            args.num_evals > Args.num_evals and not args.dataset_mixer_eval_list,
            "--num_evals needs held-out data; name some with --dataset_mixer_eval_list",
        ),
        (
            args.total_episodes is not None and args.num_train_epochs != Args.num_train_epochs,
            "--total_episodes and --num_train_epochs both say how long to train; pass one",
        ),
        (
            args.optim == "adafactor" and (args.use_peft or args.score_init == "zeros"),
            "--optim adafactor makes steps relative to the weights, and --score_init zeros and --use_peft begin at zero; "
            "pass another --optim",
        ),
        (
            args.focal_gamma != Args.focal_gamma and args.loss_type != "focal",
            "--focal_gamma does nothing without --loss_type focal; add or remove it",
        ),
        (
            args.label_smoothing and args.loss_type != "ranking",
            "--label_smoothing is defined for --loss_type ranking alone; remove one of them",
        ),
        (
            args.penalty_weight != Args.penalty_weight and args.penalty_type == "none",
            "--penalty_weight does nothing without --penalty_type; add or remove it",
        ),
        (
            args.penalty_bound != Args.penalty_bound and args.penalty_type != "log_barrier",
            "--penalty_bound does nothing without --penalty_type log_barrier; add or remove it",
        ),
        *(
            (
                getattr(args, name) not in (getattr(Args, name, []), []) and not args.use_peft,
                f"--{name} does nothing without --use_peft; add or remove it",
            )
            for name in ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "load_in_4bit", "merge_adapter")
        ),
        (
            args.use_peft and args.trust_remote_code and not args.merge_adapter,
            "--trust_remote_code with --use_peft needs --merge_adapter: a client of the adapter could not find the class",
        ),
        (
            args.use_peft and args.freeze_backbone,
            "--freeze_backbone trains the head alone and --use_peft an adapter too; pass one",
        ),
        (
            args.optim == "adafactor" and args.eps != Args.eps,
            "--eps is AdamW's and does nothing with --optim adafactor; remove one of them",
        ),
        (not args.dataset_mixer_list, "--dataset_mixer_list is empty; name training data and an amount: my/data 1.0"),
        (
            args.hf_entity and "/" in (args.hf_repo_id or ""),
            "--hf_entity and the first part of --hf_repo_id both name the owner; pass one",
        ),
        (
            args.wandb_entity and not args.with_tracking,
            "--wandb_entity does nothing without --with_tracking; add or remove it",
        ),
        (
            (args.hf_entity or args.hf_repo_id or args.hf_repo_revision) and not args.push_to_hub,
            "--hf_entity, --hf_repo_id and --hf_repo_revision do nothing without --push_to_hub; add or remove it",
        ),
        (
            args.attn_implementation and args.batching in ("packed", "shared_prefix"),
            f"--attn_implementation chooses attention for padded rows and --batching {args.batching} has its own; pass one",
        ),
        (
            args.push_to_hub and args.cache_dataset_only,
            "--cache_dataset_only trains no model for --push_to_hub; remove one of them",
        ),
    )
    for found, sentence in contradictions:
        if found:
            raise UserError(sentence)
    on_gpu = torch.cuda.is_available()
    stage = engine.read_config(args.deepspeed)["zero_optimization"].get("stage", 0)
    if args.optim == "adafactor" and (stage > 0 or args.dtype == "bfloat16" or (on_gpu and args.dtype == "auto")):
        raise UserError(
            "--optim adafactor needs whole matrices, and ZeRO (which bfloat16 needs for its float32 master weights) makes "
            "vectors of them; pass --dtype float32 without --deepspeed, or --optim adamw_8bit"
        )
    if args.load_in_4bit and stage == 3:
        raise UserError(
            f"--load_in_4bit and --deepspeed {args.deepspeed}: ZeRO stage 3 cannot divide 4-bit weights; pass "
            "configs/ds/zero2.json, or leave out --load_in_4bit"
        )
    rows.make_reading(args.column_map, args.margin_from, args.parse_hh)
    sources.parse_mixer(args.dataset_mixer_list, args.dataset_mixer_list_splits, "dataset_mixer_list")
    sources.parse_mixer(args.dataset_mixer_eval_list, args.dataset_mixer_eval_list_splits, "dataset_mixer_eval_list")
    if args.chat_template_name is not None:
        tokenization.read_template(args.chat_template_name)
