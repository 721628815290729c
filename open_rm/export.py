"""Make the published folder of a checkpoint, whatever ranks and ZeRO stage wrote it, with the same proof as at a run's end.

    python -m open_rm.export output/run/checkpoints/step_00000120 exported

It needs what the run started from (its config, its tokenizer, an adapter's base), and memory for one copy of the model.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
import tyro

from open_rm.batching.layouts import lay_out
from open_rm.data.tokenizer import tokenizer_of
from open_rm.errors import UserError
from open_rm.evaluation import calibration
from open_rm.evaluation.held_out import Probe
from open_rm.flags import Args
from open_rm.manifest import damage_of
from open_rm.model import any_decoder
from open_rm.model.contract import Contract
from open_rm.model.loading import load_reward_model
from open_rm.model.reward_model import RewardModel
from open_rm.publishing import card, proof, saving
from open_rm.publishing.pushing import MODELS
from open_rm.publishing.run_folder import Place, disk_explained
from open_rm.reliability import checkpoints
from open_rm.reliability.checkpoints import Checkpoint
from open_rm.reliability.shards import Shards
from open_rm.training.engine_state import Flat, Slice, frozen_mark, trained_sizes
from open_rm.training.plots import draw_curves
from open_rm.training.progress import Progress
from open_rm.training.sinks import copy_start


@dataclass(frozen=True)
class ExportArgs:
    """Make the published folder of a checkpoint."""

    checkpoint: tyro.conf.Positional[str]
    """A folder step_... of a run, or the run's own folder: its newest."""
    out: tyro.conf.Positional[str]
    """The folder to make."""
    model_name_or_path: str | None = None
    """Where the model is that the run started from. None: where it was."""
    trust_remote_code: bool = False
    """Run the Python code that the model's folder brings. Read that code first."""


def export(args: ExportArgs) -> str:
    """Returns the lines for whoever watches.

    Raises:
        UserError: there is no whole checkpoint, the folder holds a model already, or a client would get other rewards.
    """
    found = _whole(args.checkpoint)
    for name in MODELS:
        if (Path(args.out) / name).exists():
            raise UserError(f"{args.out} already holds a model; choose another folder, or move that one away")
    known = {field.name for field in dataclasses.fields(Args)}
    flags = Args(**{name: value for name, value in found.state["flags"].items() if name in known})
    if args.model_name_or_path is not None:
        flags = dataclasses.replace(flags, model_name_or_path=args.model_name_or_path)
    contract = Contract.from_json(found.state["contract"])
    if flags.trust_remote_code and not args.trust_remote_code:
        raise UserError(
            f"{found.path}: the run ran Python code of {flags.model_name_or_path}; read that code, and pass "
            "--trust_remote_code to run it here"
        )
    flags = dataclasses.replace(flags, trust_remote_code=args.trust_remote_code)
    dtype = getattr(torch, contract.dtype)
    try:
        tokenizer = tokenizer_of(flags)
        model, _ = load_reward_model(flags, tokenizer, adapter=flags, dtype=dtype, seed=flags.seed)
    except UserError as error:
        raise UserError(f"{error}; if the run's model has moved, pass its place by --model_name_or_path") from error
    if frozen_mark(model) != found.state["marks"]["frozen weights"]:
        raise UserError(f"{flags.model_name_or_path} is not the model that the run started from: frozen weights differ")
    fill(model, found)

    place, progress = Place(found.state["name"], args.out, None, "main"), Progress.continued(found.state["progress"])
    if progress.evaluated_step == found.step:
        measured = calibration.statistics_of(progress.last_evaluation, pairs=found.state["held_out_pairs"])
        contract = dataclasses.replace(contract, statistics=measured)
    with disk_explained(args.out, found.step):
        saving.save_reward_model(model, model.state_dict(), tokenizer, args.out, contract)
        facts = found.state["flags"] | {
            "plan": found.state["plan"],
            "attribute_means": found.state.get("attribute_means"),  # None where no attributes were trained
            "step": found.step,
            "exported_from": str(found.path),
            "clients": list(map(dataclasses.asdict, proof.rehearse(tokenizer, contract))),
        }
        _copy_record(found, Path(args.out), title=place.name)
        card.write_card(place, contract, facts, progress.results, data=found.state["labels"])
    probe = _probe(model, found.state["probe"], tokenizer.pad_token_id)
    patched = contract.trust_remote_code or any_decoder.is_made_here(model.classifier)
    verdict = proof.check_reload(args.out, probe, tokenizer, contract, fresh_process=patched)
    return f"saved step {found.step} in {args.out}\n{verdict}"


def _copy_record(found: Checkpoint, out: Path, *, title: str) -> None:
    """The run's metrics up to the checkpoint, and their curves, where they are still there."""
    record = found.path.parent.parent / "metrics.jsonl"
    if record.exists():
        copy_start(record, out / record.name, found.state["sinks"]["files"][record.name])
        draw_curves(out / record.name, title=title)


def _whole(path: str) -> Checkpoint:
    folder = checkpoints.candidates(path, path, flag="")[0]
    damage = damage_of(folder)
    if damage is not None:
        raise UserError(f"{folder} is damaged ({damage}); name another checkpoint of the run")
    return checkpoints.read(folder)


def fill(model: RewardModel, found: Checkpoint) -> None:
    """Put a checkpoint's weights into a model that was loaded as the run loaded it."""
    shards = Shards(found.shards(), trained_sizes(model))
    for name, p in model.named_parameters():
        if p.requires_grad:
            flat = Flat(name, (Slice(name, 0, p.numel(), 0),), p.data.view(-1), {}, written=True, shape=p.shape)
            shards.load(flat, None)


@torch.no_grad()
def _probe(model: RewardModel, sequences: list[list[int]], pad_token_id: int) -> Probe:
    """Our rewards of the sequences that the run would have tried."""
    model.eval()
    rewards = []
    for ids in sequences:
        one = np.array(ids)
        batch = lay_out("padded", [(one, one)], pad_token_id=pad_token_id, prompt_ids=[0])
        rewards.append(model(**batch.inputs(torch.device("cpu")))[0].item())
    return Probe(sequences, rewards)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    given = tyro.cli(ExportArgs, use_underscores=True, prog="python -m open_rm.export")
    try:
        print(export(given))
    except UserError as mistake:
        sys.exit(f"error: {mistake}")
