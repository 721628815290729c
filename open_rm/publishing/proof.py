"""The proof that clients read the same token ids and the same rewards from the saved folder.

Before training the tokenizer is saved somewhere and tried (`rehearse`); after it the folder is loaded as any client would:
by plain transformers, or by peft where it holds an adapter (`check_reload`).

    python -m open_rm.publishing.proof FOLDER < sequences.json      prints what a client computes, as JSON
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from open_rm.errors import UserError, quote_error
from open_rm.evaluation.held_out import Probe
from open_rm.model import adapters
from open_rm.model.contract import Contract
from open_rm.publishing.clients import ClientCheck, check_clients, plain_difference
from open_rm.publishing.tokenizer_files import save_tokenizer

# Absolute plus relative to the reward. float32: the order of sums differs between layouts. bfloat16: 8 bits of
# mantissa in every layer, and plain transformers rounds the reward itself to bfloat16 (ours is float32). 4-bit weights are
# the same in both, but on some CPUs bitsandbytes computes with them in bfloat16 whatever it is told.
RELOAD_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "4-bit": 5e-2}
# Deep models round more: what the order of sums makes of the trainer's own rewards (Probe.noise) it makes of a client's too,
# and a client has two orders besides. But more noise than MOST_NOISE is no rounding, and would hide a fault.
TIMES_NOISE, MOST_TOLERANCE = 3.0, 0.15
MOST_NOISE = {"float32": 1e-4, "bfloat16": 0.1, "4-bit": 0.1}


@dataclass(frozen=True)
class ClientRewards:
    """What a client computes for some sequences, one by one and in a padded batch. computed_in: of RELOAD_TOLERANCE.
    device: where."""

    one_by_one: list[float]
    padded: list[float]
    computed_in: str
    device: str = "cpu"


def rehearse(tokenizer: PreTrainedTokenizerBase, contract: Contract) -> list[ClientCheck]:
    """Before training: save the tokenizer somewhere and try every client on it.

    Raises:
        UserError: plain transformers would get other tokens than training.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(Path(folder), tokenizer, contract)
        return check_clients(_check_encoding(folder, tokenizer, contract), tokenizer, contract)


def check_reload(
    folder: str, probe: Probe, tokenizer: PreTrainedTokenizerBase, contract: Contract, *, fresh_process: bool
) -> str:
    """Load the folder as any client would and compare token ids, and rewards one by one and as a padded batch.

    Args:
        tokenizer: the trainer's.
        fresh_process: reload in a process of its own. Needed where transformers' modules were patched in this one (Liger):
            what is built here would not be plain.

    Returns:
        a line for the log with the largest difference.

    Raises:
        UserError: a client would not get the trainer's rewards; the model must not be trusted.
    """
    _check_encoding(folder, tokenizer, contract)
    reloaded = _in_a_fresh_process(folder, probe) if fresh_process else _in_this_process(folder, probe)
    tolerance = _tolerance(folder, reloaded.computed_in, probe.noise)
    own = f"; among the trainer's own layouts {probe.noise:.1e}" if probe.noise else ""
    client = "plain peft" if contract.holds_adapter else "plain transformers"
    worst = 0.0
    for how, rewards in (("one by one", reloaded.one_by_one), ("in a padded batch", reloaded.padded)):
        for ours, theirs in zip(probe.rewards, rewards, strict=True):
            worst = max(worst, abs(theirs - ours))
            if not abs(theirs - ours) <= tolerance * (1 + abs(ours)):
                raise UserError(
                    f"{folder}: reloaded by {client} {how}, a reward is {theirs:.6f} and the trainer's {ours:.6f} "
                    f"(allowed: {tolerance:.0e} * (1 + |reward|)); do not use this model"
                )
    return (
        f"reload check: {len(probe.sequences)} rewards from {folder} in {client}, one by one and padded, equal ours "
        f"(largest difference {worst:.1e}, {reloaded.computed_in} on {reloaded.device}{own})"
    )


def float8_difference(probe: Probe, as_trained: Probe | None) -> list[str]:
    """A line on what float8 made of the same rewards while training; clients, and evaluation, compute without it."""
    if as_trained is None:
        return []
    pairs = zip(probe.rewards, as_trained.rewards, strict=True)
    worst = max(abs(ours - in_float8) for ours, in_float8 in pairs)
    return [f"float8: in training these rewards differ from bfloat16's, which clients compute, by up to {worst:.1e}"]


def _tolerance(folder: str, computed_in: str, noise: float) -> float:
    if not noise <= MOST_NOISE[computed_in]:
        raise UserError(
            f"{folder}: the trainer's own rewards differ by {noise:.1e} * (1 + |reward|) between layouts of the same pairs, "
            f"more than {computed_in} rounds; do not use this model. In packed rows a wrong kernel may be the cause: --batching "
            "padded does without it"
        )
    least = RELOAD_TOLERANCE[computed_in]
    return least if computed_in == "float32" else min(max(least, TIMES_NOISE * noise), MOST_TOLERANCE)


def _in_a_fresh_process(folder: str, probe: Probe) -> ClientRewards:
    command = [sys.executable, "-m", "open_rm.publishing.proof", folder]
    group = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # this process's, which the other is no part of
    environment = {name: value for name, value in os.environ.items() if name not in group}
    done = subprocess.run(
        command, input=json.dumps(probe.sequences), env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UserError(f"{folder}: a client cannot load it: {done.stderr.strip().splitlines()[-1:]}")
    return ClientRewards(**json.loads(done.stdout.splitlines()[-1]))


def _in_this_process(folder: str, probe: Probe) -> ClientRewards:
    try:
        return client_rewards(folder, probe.sequences)
    except (OSError, ValueError, RuntimeError, AssertionError, SafetensorError) as error:
        raise UserError(f"{folder}: a client cannot load it ({quote_error(error)}); do not use this model") from error


def _check_encoding(folder: str, tokenizer: PreTrainedTokenizerBase, contract: Contract) -> PreTrainedTokenizerBase:
    """The folder's tokenizer, with which plain transformers has to read our token ids."""
    saved = AutoTokenizer.from_pretrained(folder, trust_remote_code=contract.trust_remote_code)
    if difference := plain_difference(saved, tokenizer, contract):
        raise UserError(
            f"the tokenizer, once saved, gives a client that encodes a complete text other tokens than training has "
            f"({difference}); name another with --tokenizer_name, or another template with --chat_template_name"
        )
    return saved


def client_rewards(folder: str, sequences: list[list[int]]) -> ClientRewards:
    """Rewards by plain transformers or peft, by what the folder's contract says."""
    contract = Contract.read(folder)
    trust = {"trust_remote_code": contract.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
    if contract.holds_adapter:
        model = adapters.load(folder, pad_token_id=tokenizer.pad_token_id, **contract.base())
    else:
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype="auto", **trust).eval()
    bytes_needed = 2 * sum(p.numel() * p.element_size() for p in model.parameters())
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > bytes_needed:
        torch.set_float32_matmul_precision("highest")  # as in training
        model.to("cuda")
    with torch.no_grad():
        single = [model(input_ids=torch.tensor([ids], device=model.device)).logits.item() for ids in sequences]
        batch = tokenizer.pad({"input_ids": sequences}, return_tensors="pt").to(model.device)
        padded = model(**batch).logits.float().squeeze(-1).tolist()
    packed = contract.holds_adapter and contract.load_in_4bit
    computed_in = "4-bit" if packed else str(model.dtype).removeprefix("torch.")
    return ClientRewards(single, padded, computed_in, model.device.type)


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(client_rewards(sys.argv[1], json.load(sys.stdin)))))
