"""Every flag of the recipe, in groups: one group is one concern and what one room reads.

Names are those of open-instruct's reward_modeling.py where it has the flag. The sentence under a field is what `--help`
prints; the bound that its values must keep stands in its type. A room takes its own group, or plain values; all of them
together, `Args`, are taken by the recipe, the checks and the inspection alone. Imports nothing heavy, nor torch, so that
`--help` and a wrong command line are answered at once.
"""

from dataclasses import dataclass, field
from typing import Literal

from open_rm.bounds import (
    Amount,
    AmountOrNone,
    Bound,
    Count,
    CountOrNone,
    Norm,
    Number,
    PathOrWord,
    Positive,
    PositiveOrNone,
    Recompute,
    Seed,
    Share,
    SmallShare,
    Switch,
)


@dataclass(frozen=True)
class ModelFlags:
    """Backbone, tokenizer and score head, and how they compute."""

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
    """How messages become text: a name (see open_rm/data/chat_templates), a Jinja file, or None for the tokenizer's own."""
    reward_token: str | None = None
    """Token appended to every response and scored (XTuner), of the tokenizer or new; it must not occur in the data."""
    score_init: Literal["default", "zeros"] = "default"
    """A new score head: N(0, 1 / (h + 1)), or zeros, so that every reward begins at 0. A reward model keeps its head."""
    attribute_weights: list[float] = field(default_factory=list)
    """With --attributes: how much each one's prediction adds to the reward, e.g. 0.3 0.74 0.46 0.47 -0.33 (HelpSteer2's)."""
    freeze_backbone: bool = False
    """Train the score head alone."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype; bfloat16 keeps float32 master weights. auto: bfloat16 on a GPU, float32 on the CPU."""
    attn_implementation: str | None = None
    """Attention of transformers: eager, sdpa, flash_attention_2, ... None: the best that transformers finds."""
    float8: bool = False
    """Multiply by the large matrices in 8 bits (float8) while training, on GPUs that can (Hopper and later)."""


@dataclass(frozen=True)
class AdapterFlags:
    """LoRA and QLoRA."""

    use_peft: bool = False
    """Train a LoRA adapter and the score head, the backbone frozen."""
    lora_r: Count = 16
    """Rank of the adapter's matrices."""
    lora_alpha: Positive = 32.0
    """The adapter is scaled by lora_alpha / lora_r."""
    lora_dropout: Share = 0.0
    """Dropout on the adapter's input; any makes rewards in training differ from those in evaluation."""
    lora_target_modules: list[str] = field(default_factory=list)
    """Linear layers to adapt, by the last part of their names, e.g. q_proj v_proj. Empty: every linear layer of the
    backbone. Experts of a mixture are not linear layers."""
    load_in_4bit: bool = False
    """Hold the frozen weights in 4 bits (QLoRA). With use_peft."""
    merge_adapter: bool = False
    """Save the sum of weights and adapter, a plain model, instead of the adapter and the head."""


@dataclass(frozen=True)
class ReadingFlags:
    """How the rows of files are read, in training and in scoring."""

    dataset_format: list[str] = field(default_factory=list)
    """What the rows are: auto (told by their columns), or a form of docs/data.md; one for all, or one a training source. This
    flag and the next seven may be written for one source: NAME::value, or for all of training or held out: train::value,
    eval::value."""
    column_map: list[str] = field(default_factory=list)
    """Where our columns stand: ours=theirs, e.g. chosen=better rejected=worse, or prompt=question.full_text
    responses=completions[].response strength=-preference_strength (docs/data.md)."""
    label_values: list[str] = field(default_factory=list)
    """What the values of the column winner mean, e.g. a=1 b=0 tie=2."""
    lower_is_better: Switch = field(default_factory=list)
    """Scores are ranks, 1 the best."""
    ignore_columns: list[str] = field(default_factory=list)
    """Columns, and keys of messages (reasoning_content), to take as absent."""
    margin_from: list[str] = field(default_factory=list)
    """Two columns, e.g. score_chosen score_rejected: a pair's margin is the first minus the second; equal ones are ties. Or the
    word scores: the difference of the scores that decided. Empty: column margin."""
    parse_hh: Switch = field(default_factory=list)
    """Turn text of the form "Human: ... Assistant: ..." into messages for the chat template, not training on it as text."""
    as_messages: Switch = field(default_factory=list)
    """Turn a prompt and answers of text into messages of user and assistant for the chat template. False: keep text where a
    form would make messages."""
    skip_bad_rows: Number = 0
    """Skip, list and count so many malformed rows; the next one stops the run."""


@dataclass(frozen=True)
class DataFlags(ReadingFlags):
    """Which preference pairs, and how they are read."""

    dataset_mixer_list: list[str] = field(default_factory=lambda: ["trl-internal-testing/sentiment-trl-style", "400"])
    """Training data: alternating name (Hub name[/folder][:config][@revision], file, folder, glob) and amount (400 rows, or
    0.5 of them)."""
    dataset_mixer_list_splits: list[str] = field(default_factory=lambda: ["train"])
    """Split of each training source, or one for all. A single file is itself the split."""
    dataset_mixer_eval_list: list[str] = field(default_factory=list)
    """Held-out data, like dataset_mixer_list. Empty: no evaluation."""
    dataset_mixer_eval_list_splits: list[str] = field(default_factory=lambda: ["test"])
    """Split of each held-out source, or one for all."""
    max_token_length: Count = 512
    """Most tokens of a side (prompt and response)."""
    max_prompt_token_length: Count = 256
    """Most tokens of a prompt."""
    overlength: Literal["filter", "truncate"] = "filter"
    """Pairs beyond these: left out, or cut (the prompt's start, then a response's end but for the scored token). Counted."""
    num_proc: Count = 1
    """Processes that tokenize; each of them encodes on one core, a single one on all."""
    keep_ties: bool = False
    """Train on ties too: both answers should get the same reward. Accuracy leaves them out."""
    attributes: list[str] = field(default_factory=list)
    """Scores of each answer to be predicted beside the preference, e.g. helpfulness correctness; NAME=PLACE where one stands
    elsewhere (docs/data.md). They are no part of the saved model but by --attribute_weights. Decoders alone."""
    strict: bool = False
    """Stop before training where the look at the data (python -m open_rm.inspection) has findings."""
    dataset_local_cache_dir: str = "local_dataset_cache"
    """Folder for tokenized data; found again while data, tokenizer and lengths are the same."""
    cache_dataset_only: bool = False
    """Tokenize into the cache and stop."""


@dataclass(frozen=True)
class RunFlags:
    """What the run is called, and where its model lands: a folder, and a repository on the Hub."""

    exp_name: str = "reward_modeling"
    """First part of the run's name."""
    run_name: str | None = None
    """Name of this run. None: <exp_name>__<seed>__<unix time>."""
    seed: Seed = 1
    """Decides the order of the pairs, random subsets and the initial score head."""
    output_dir: str | None = None
    """Where the final model lands, exactly. None: output/<run_name>."""
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


@dataclass(frozen=True)
class ObjectiveFlags:
    """What is minimised."""

    loss_type: Literal["ranking", "focal"] = "ranking"
    """Bradley-Terry, or with less weight on pairs that are already right (InternLM2)."""
    list_loss: Literal["pairs", "plackett_luce", "best_of_k"] = "pairs"
    """What a prompt with several ranked answers is trained by: each two of them as a pair, the likelihood of the whole ranking
    (Plackett-Luce), or of the best answer among all. Two answers are the same in all three."""
    focal_gamma: Amount = 2.0
    """Exponent of the focal weight; 0 is ranking."""
    label_smoothing: SmallShare = 0.0
    """Share of labels taken to be swapped, from 0 to below 0.5. With loss_type ranking."""
    penalty_type: Literal["none", "log_barrier", "L2"] = "none"
    """Keep rewards small: a wall at +-penalty_bound, or their squares (XTuner)."""
    penalty_weight: Amount = 0.01
    """Factor of the penalty."""
    penalty_bound: Bound = 5.0
    """Where log_barrier's wall stands, in units of reward."""
    center_rewards_coefficient: Amount = 0.0
    """Factor of (chosen + rejected reward)^2, which centres rewards at 0; 0.01 is common. 0: off."""
    attribute_coefficient: Amount = 1.0
    """With --attributes: weight of the mean squared error of their predictions beside the preference's loss."""
    margin_loss: bool = False
    """Chosen must lead by the pair's margin (Llama 2). Every training pair needs one."""


@dataclass(frozen=True)
class OptimizerFlags:
    """How a gradient becomes a step."""

    optim: Literal["adamw", "adamw_8bit", "adafactor"] = "adamw"
    """AdamW, fused; with 8-bit moments (bitsandbytes), a quarter of their memory; or Adafactor (torch), with almost none and
    steps of learning_rate times the size of each weight, so that it wants a larger one."""
    learning_rate: Positive = 3e-6
    """Peak learning rate."""
    eps: Positive = 1e-5
    """AdamW's epsilon."""
    weight_decay: Amount = 0.0
    """AdamW's decoupled weight decay; not applied to biases and norms."""
    max_grad_norm: Norm = 1.0
    """Clip the global gradient norm to this. 0: never."""
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = "linear"
    """Course of the learning rate over optimizer steps, as transformers names them."""


@dataclass(frozen=True)
class ScheduleFlags:
    """How long to train, and when to evaluate."""

    warm_up_steps: Number = 0
    """Optimizer steps of linear warm-up."""
    warmup_ratio: Share = 0.0
    """The same as a share of all steps. Not together with warm_up_steps."""
    num_train_epochs: Positive = 1.0
    """Passes over the training pairs."""
    total_episodes: CountOrNone = None
    """Stop after this many pairs instead. None: num_train_epochs decides."""
    num_evals: Number = 1
    """Evaluations during training, evenly spaced, besides those before the first and after the last step."""
    eval_steps: CountOrNone = None
    """Evaluate every so many optimizer steps instead. None: num_evals decides."""


@dataclass(frozen=True)
class BatchFlags:
    """How many pairs are computed at once, and how they lie in memory."""

    per_device_train_batch_size: Count = 1
    """Pairs that a device computes at once, at least; a GPU takes more where they fit. A step has this x
    gradient_accumulation_steps x devices pairs."""
    per_device_eval_batch_size: Count = 8
    """The same in evaluation: it bounds memory and does not change results."""
    gradient_accumulation_steps: Count = 8
    """Forwards of that size that make a step on a device; fewer are needed where pairs are short."""
    batching: Literal["auto", "padded", "packed", "shared_prefix"] = "auto"
    """How pairs lie in memory: padded rows, packed into one row, or packed with every shared prompt computed once; all
    give the same rewards and gradients. auto: shared_prefix wherever it is exact, else padded and the log says why."""
    group_by_prompt: bool = False
    """Keep all pairs of a prompt in one step, so that shared_prefix computes prompt and repeated responses once."""
    max_tokens_per_micro_batch: CountOrNone = None
    """Most positions of a forward per device. None: on a GPU as many as its memory holds; on a CPU 2 x
    per_device_train_batch_size x max_token_length, at most 1536, which its caches hold well."""
    gradient_checkpointing: Recompute = "auto"
    """Recompute activations in the backward pass, which takes less memory and up to a third more time: on (all layers but the
    last), off, or a number N (every Nth layer). auto: on a GPU as few layers as its memory asks for, on a CPU none."""
    deepspeed: str | None = None
    """DeepSpeed file for the memory layout, e.g. configs/ds/zero3.json. None: no ZeRO in float32; in bfloat16 stage 1 on one
    device, stage 2 on several."""


@dataclass(frozen=True)
class ScaleFlags:
    """Long sequences, and what fits."""

    sequence_parallel_size: Count = 1
    """Devices that compute the same sequences together, each a stretch of their tokens (DeepSpeed-Ulysses): for sequences whose
    activations do not fit on one. It divides the devices and the attention heads; steps, rewards and gradients stay the same."""
    find_batch_size: bool = False
    """Before training, try larger and larger micro-batches on the device and keep the largest that fits. Only micro-batches
    change, not steps."""


@dataclass(frozen=True)
class DryRunFlags:
    """A run that is only described."""

    dry_run: bool = False
    """Say what the run would do, and train nothing: steps, memory of a device by part, what would fit, hours, disk. Needs no
    weights and no GPU; also written to output_dir/plan.json."""
    world_size: CountOrNone = None
    """With dry_run: devices to plan for. None: as many as the launcher started."""
    device_memory_gib: PositiveOrNone = None
    """With dry_run: plan for GPUs of so much memory. None: for this machine's own device."""
    tokens_per_second: str | None = None
    """With dry_run: tokens a second of a device, for the hours: a number, or the folder of an earlier run that measured it."""


@dataclass(frozen=True)
class CheckpointFlags:
    """What a run survives: kills, hangs, steps that are no numbers."""

    checkpointing_steps: CountOrNone = None
    """Write a checkpoint, from which a killed run goes on, every so many optimizer steps."""
    checkpointing_minutes: AmountOrNone = None
    """The same by the clock. None: 30, or never where --checkpointing_steps is given. 0: never."""
    keep_last_n_checkpoints: Count = 2
    """Checkpoints that are kept, the best besides."""
    resume_from_checkpoint: PathOrWord = "auto"
    """auto: the same command goes on with the run of its --output_dir. never: refuse a folder that holds one. Or a checkpoint,
    or another run's folder, to go on from."""
    metric_for_best_model: str | None = None
    """Metric of the evaluations by which they are compared: accuracy, loss (lower is better), reward_margin, or <source>/accuracy
    and so on. The best one's checkpoint is kept."""
    load_best_model_at_end: bool = False
    """Save the model of the best evaluation instead of the last."""
    early_stopping_patience: CountOrNone = None
    """End after so many evaluations in a row that were no better than the best."""
    stall_timeout: Amount = 10.0
    """Minutes after which a rank that does not move on ends the whole run. 0: never."""
    max_skipped_steps: Number = 0
    """Steps whose loss or gradient is no number that are left out; the next one ends the run."""


@dataclass(frozen=True)
class BenchmarkFlags:
    """Public benchmarks, judged by their authors' rules while training and at its end."""

    benchmark: list[str] = field(default_factory=list)
    """Judge the final model by reward_bench, reward_bench_2, rm_bench, judge_bench, rmb (from the Hub, or NAME=PATH for a folder
    or file); output_dir/evaluation/report.html shows it beside the held-out pairs."""
    benchmark_rows: Number = 0
    """So many rows of each, the same ones every time, are judged at every evaluation too. 0: none."""
    benchmark_max_token_length: Count = 2048
    """Most tokens of prompt and answer in a benchmark; longer ones are cut and counted. At most the model's positions."""


@dataclass(frozen=True)
class TrackingFlags:
    """What is shown and recorded of a run."""

    num_sample_pairs: Number = 4
    """Pairs in the table of samples: on the console at the first and the last evaluation, in samples.jsonl and wandb at each."""
    with_tracking: bool = False
    """Track with wandb; offline where there is no key or no server."""
    wandb_project_name: str = "open_rm"
    """wandb project."""
    wandb_entity: str | None = None
    """wandb user or team. None: the key's default."""


@dataclass(frozen=True, kw_only=True)
class OpeningFlags:
    """A trained reward model, opened to compute rewards (open_rm/scoring): not a flag of the recipe."""

    model: str
    """The reward model: a folder or a Hub name; one of ours, an adapter of ours, or any classifier with one label."""
    model_revision: str | None = None
    """Branch, tag or commit of the model on the Hub. None: the default branch."""
    trust_remote_code: bool = False
    """Run the Python code that the model's folder brings. Read that code first."""
    chat_template_name: str | None = None
    """How messages become text, for a model whose tokenizer has no template: a name or a Jinja file. One of ours has it."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype. auto: bfloat16 on a GPU, float32 on the CPU."""
    batching: Literal["auto", "padded", "packed", "shared_prefix"] = "auto"
    """How answers lie in memory; all give the same rewards. auto: every prompt is computed once wherever that is exact."""
    max_token_length: CountOrNone = None
    """Most tokens of prompt and answer. None: as many as the model has positions."""
    max_tokens_per_micro_batch: CountOrNone = None
    """Most positions of a forward. None: on a GPU what its memory holds; on a CPU 1536, which its caches hold well."""
    num_processes: CountOrNone = None
    """Processes that compute, one a GPU or with a share of the CPU's cores each. None: one a GPU, one on a CPU."""


# The bases stand from last to first: a dataclass lists the fields of its last base first, and so does --help.
@dataclass(frozen=True)
class Args(
    TrackingFlags,
    BenchmarkFlags,
    CheckpointFlags,
    RunFlags,
    DryRunFlags,
    ScaleFlags,
    BatchFlags,
    ScheduleFlags,
    OptimizerFlags,
    ObjectiveFlags,
    DataFlags,
    AdapterFlags,
    ModelFlags,
):
    """Train a reward model (Bradley-Terry) from preference pairs.

    --config FILE.yaml sets flags from a file (one `name: value` a line); those on the command line override it.
    """
