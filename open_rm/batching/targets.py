"""What the loss is told of each pair besides its rewards: margins, how sure its label is, attributes of its answers, and the
ranked lists that pairs form.

What does not differ from plain pairs is None, so that plain pairs are trained by the plain loss.
Shapes: B pairs of a micro-batch, L lists that they are of, K answers of the longest list, A attributes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from open_rm.data.labels import TIE
from open_rm.data.pairs import PreferenceData
from open_rm.errors import UserError
from open_rm.flags import ObjectiveFlags

NO_ANSWER = -1  # level, where a list has fewer answers than the longest


@dataclass(frozen=True)
class Lists:
    """The ranked lists of a micro-batch, each whole.

    index: [L, K] int64, where the reward of each answer stands among those of B chosen and then B rejected sides; 0 where a list
        has no such answer. Of an answer of several pairs it is the first place.
    level: [L, K] int32, 0 the best or more; NO_ANSWER where there is none.
    of_pair: [B] int64, the list of each pair.
    weight: [B] float32, what a list's loss counts at its first pair, 0 at its others: see TargetColumns.of_step.
    """

    index: torch.Tensor
    level: torch.Tensor
    of_pair: torch.Tensor
    weight: torch.Tensor


@dataclass(frozen=True)
class Targets:
    """Of the pairs of a micro-batch that count.

    margins: [B] float32, by how much chosen should lead; None where the loss takes none.
    label_prob: [B] float32, how probable it is that chosen is the better one; None where it is sure of every pair of the data.
    lists: None where each pair is trained by itself.
    attributes: [B, 2, A] float32, of chosen and of rejected, less the means of the training data (attribute_means); NaN where one
        is not known. None where none are trained.
    """

    margins: torch.Tensor | None = None
    label_prob: torch.Tensor | None = None
    lists: Lists | None = None
    attributes: torch.Tensor | None = None

    def to(self, device: torch.device) -> "Targets":
        """On a device; from page-locked memory nobody waits for it."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Targets":
        """In page-locked memory; see layouts.Batch.pinned."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Targets":
        lists = self.lists and Lists(**{name: change(tensor) for name, tensor in vars(self.lists).items()})
        columns = self.margins, self.label_prob, self.attributes
        margins, label_prob, attributes = (one if one is None else change(one) for one in columns)
        return Targets(margins, label_prob, lists, attributes)

    def decided(self) -> torch.Tensor | None:
        """[B] bool, which pairs have a better side; None where all have. What is said of right and wrong leaves ties out."""
        return None if self.label_prob is None else self.label_prob != TIE


PLAIN = Targets()


@dataclass(frozen=True)
class ListColumns:
    """Of all pairs of the data, all [pairs], as PairTable and PreferenceData have them.

    best_alone: whether only the best is told from the rest (best_of_k).
    """

    list_id: np.ndarray
    ids: tuple[np.ndarray, np.ndarray]
    levels: tuple[np.ndarray, np.ndarray]
    best_alone: bool

    def of(self, pairs: np.ndarray, per_list: float) -> Lists:
        """The lists of the pairs [B]. An answer is what is equal in list, level and tokens, however many pairs it is in.

        per_list: weight of a list.
        """
        _, first, of_pair = np.unique(self.list_id[pairs], return_index=True, return_inverse=True)
        number = np.tile(of_pair, 2)
        ids, level = (np.concatenate([side[pairs] for side in sides]) for sides in (self.ids, self.levels))
        # equal answers side by side, those of a list from the best to the worst
        order = np.lexsort((ids, level, number))
        keys = np.stack((number, level, ids))[:, order]
        # lexsort is stable: the first of each
        answers = order[np.append(True, (np.diff(keys) != 0).any(axis=0))[: len(order)]]
        number, level = number[answers], level[answers].astype(np.int32)
        starts = np.searchsorted(number, np.arange(len(first)))
        if self.best_alone:
            level = (level > level[starts[number]]).astype(np.int32)
            per_list = per_list / np.bincount(number[level == 0], minlength=len(first))
        place = np.arange(len(answers)) - starts[number]
        shape = len(first), max(1, 1 + int(place.max(initial=0)))
        lists = {"index": np.zeros(shape, np.int64), "level": np.full(shape, NO_ANSWER, np.int32)}
        lists["index"][number, place], lists["level"][number, place] = answers, level
        weight = np.zeros(len(pairs), np.float32)
        weight[first] = per_list
        return Lists(
            **{name: torch.from_numpy(column) for name, column in lists.items()},
            of_pair=torch.from_numpy(of_pair),
            weight=torch.from_numpy(weight),
        )


@dataclass(frozen=True)
class TargetColumns:
    """What `Targets` are taken from: columns of all pairs of the data, [pairs] float32, attributes [pairs, 2, A]; None as there."""

    margins: np.ndarray | None = None
    label_prob: np.ndarray | None = None
    lists: ListColumns | None = None
    attributes: np.ndarray | None = None

    def of_step(self, indices: np.ndarray) -> Callable[[np.ndarray], Targets]:
        """Gives the targets of pairs [B] of a step.

        The loss of lists is a mean over the lists of a step on all ranks, and the loop divides by the step's pairs; so a list's
        loss counts (pairs of the step / lists of the step) times, for best_of_k divided by the number of its tied best.

        indices: [pairs] of the step, of all ranks.
        """
        per_list = 1.0
        if self.lists is not None:
            per_list = len(indices) / len(np.unique(self.lists.list_id[indices]))

        def targets(pairs: np.ndarray) -> Targets:
            columns = self.margins, self.label_prob, self.attributes
            margins, label_prob, attributes = (one if one is None else torch.from_numpy(one[pairs]) for one in columns)
            return Targets(margins, label_prob, self.lists and self.lists.of(pairs, per_list), attributes)

        return targets


def columns_of(data: PreferenceData, flags: ObjectiveFlags) -> TargetColumns:
    """What the flags let the loss take of the data, which `check` has looked at."""
    label_prob, lists, table = data.label_probs(), None, data.table
    if flags.list_loss != "pairs":
        ids = table.chosen_id, table.rejected_id
        lists = ListColumns(table.list_id, ids, data.levels(), best_alone=flags.list_loss == "best_of_k")
    margins = data.margins() if flags.margin_loss else None
    known = data.attributes()
    attributes = (known - attribute_means(known)).astype(np.float32) if known.shape[-1] else None
    return TargetColumns(margins, label_prob if (label_prob != 1).any() else None, lists, attributes)


def attribute_means(known: np.ndarray) -> np.ndarray:
    """[A] float64, over the answers of all pairs of which one is known; an answer that stands in several pairs counts in each.

    Heads without a bias predict attributes less these.  known: [pairs, 2, A].
    """
    return np.nanmean(known, axis=(0, 1), dtype=np.float64)


def facts(data: PreferenceData) -> dict[str, list[float]]:
    """For run.json and the model card: the means of the attributes in the order of the flag; nothing where none are trained."""
    known = data.attributes()
    return {"attribute_means": attribute_means(known).tolist()} if known.shape[-1] else {}


def check(data: PreferenceData, flags: ObjectiveFlags, pairs_per_step: int) -> None:
    """Refuse what the flags' loss cannot be told. pairs_per_step: of all ranks.

    Raises:
        UserError: a label that is not sure, where the loss takes sure ones alone; a list that is larger than a step.
    """
    label_prob = data.label_probs()
    soft = np.flatnonzero(label_prob != 1)
    if len(soft):
        _check_soft(data, flags, soft[0], label_prob[soft[0]])
    if flags.list_loss != "pairs":
        _check_sizes(data, pairs_per_step)


def _check_soft(data: PreferenceData, flags: ObjectiveFlags, index: int, label_prob: float) -> None:
    """index, label_prob: of the first pair whose label is not sure."""
    what = "a tie" if label_prob == TIE else f"a label_prob of {label_prob:g}"
    refused = {
        "--margin_loss": flags.margin_loss,
        f"--loss_type {flags.loss_type}": flags.loss_type != "ranking",
        f"--list_loss {flags.list_loss}": flags.list_loss != "pairs",
    }
    for flag, given in refused.items():
        if given:
            raise UserError(
                f"{data.places([index])[0]}: {what}, and {flag} is defined for pairs of which one side is surely the better; remove "
                "the flag, or train without --keep_ties and without votes and label_prob"
            )


def _check_sizes(data: PreferenceData, pairs_per_step: int) -> None:
    _, first, sizes = np.unique(data.table.list_id, return_index=True, return_counts=True)
    if sizes.max(initial=0) <= pairs_per_step:
        return
    index = first[sizes > pairs_per_step].min()
    size = sizes[first == index][0]
    raise UserError(
        f"{data.places([index])[0]}: a list of {size} pairs, which is trained in one step, and a step has {pairs_per_step}; raise "
        "--gradient_accumulation_steps or --per_device_train_batch_size, or pass --list_loss pairs"
    )
