"""What a request asks about, to the token ids of training. The one way from any dialect to a sequence.

A client sends a rendered conversation, plain text, a prompt with its answer, messages, or token ids. Senders differ from the
chat template in a few known ways, and each is mended where the template says how, and counted:

    no BOS             verl takes away what the tokenizer names as BOS, for vLLM to add it again
    two BOS            a text with BOS that an encoder began once more
    no end             an answer that was cut off: ended as training ends an answer, since training scores nothing else
    part of the end    a policy stops at <|im_end|> where the template writes a line break after it; or the other way round
    not printed        tools, tool calls or reasoning that the template leaves out
    another date       a template that prints today's date prints a fixed one here, as in training
    a plain prompt     beside an answer, for a model of conversations: the user's message

A text that does not begin as the template begins is scored as it stands, and counted: it comes from another template. So
does a prompt that holds what only templates write.
"""

import os.path
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from open_rm.data.encoding import special_tokens
from open_rm.data.messages import check_messages
from open_rm.data.preparation import CHARACTERS_PER_TOKEN, fault_of_ids
from open_rm.data.printed import check_printed
from open_rm.data.tokenizer import DATE
from open_rm.errors import UserError, quote, quote_error
from open_rm.scoring.scorer import Scorer
from open_rm.serving.limits import Refusal

# Words that no template writes itself.
SYSTEM, QUESTION, ANSWER = "Heed oblique walnuts.", "Whither, tangerine?", "Yonder, marmalade."
# What begins a turn in templates of other models, where it may be plain text to this tokenizer.
TURN_MARKS = ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "[INST]")
SLICE = 2**20  # characters that are encoded before their lengths are looked at


@dataclass(frozen=True)
class Text:
    """A complete text: a rendered conversation, or plain text."""

    text: str


@dataclass(frozen=True)
class Answered:
    """A prompt, text or messages, and the answer to it. whole: the answer is never sent with its end (documents to rank)."""

    prompt: str | list
    answer: str
    whole: bool = False


@dataclass(frozen=True)
class Conversation:
    """Messages, the last one the answer that is scored. template: further variables for the chat template."""

    messages: list
    template: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Ids:
    """Token ids, as they are."""

    ids: list[int]


Item = Text | Answered | Conversation | Ids


class Reader:
    """Items to token ids, with the scorer's tokenizer and template.

    Args:
        unfinished: "end" or "refuse", texts without the token that is scored.

    count: called with a word of `MENDED` and an example, for each text that was mended or looks wrong.
    lines: for the log, how texts have to begin and end.
    """

    def __init__(self, scorer: Scorer, *, unfinished: str):
        self.scorer, self.refuses_unfinished = scorer, unfinished == "refuse"
        self.count: Callable[[str, str], None] = lambda what, example: None
        self.bos, self.openings, self.common, self.example = "", [], "", []
        self.ending = scorer.ending
        if scorer.chat:
            self._read_template()
        tokens = special_tokens(scorer.tokenizer)
        ends = {self.ending.find(token) + len(token) for token in tokens if token in self.ending} | {len(self.ending)}
        parts = (self.ending[:n].rstrip() for n in sorted(ends, reverse=True))
        self.parts_of_ending = [part for part in dict.fromkeys(parts) if part]
        added = scorer.tokenizer.added_tokens_decoder.values()
        self.marks = [token.content for token in added if token.special and token.content.strip()] + [*TURN_MARKS]
        [sample] = self.sequences([self.sample()])
        self.first_id, self.scored_id = sample[0], sample[-1]
        begin = f" begin with {quote(self.openings[-1])} and" if scorer.chat else ""
        self.lines = [f"texts{begin} end with {self.ending!r}"]

    def sample(self) -> Item:
        """Something that can be scored: the trial before the server says that it serves."""
        return Conversation(self.example) if self.scorer.chat else Text(QUESTION + self.ending)

    def _read_template(self) -> None:
        """How conversations begin and end, from rendered ones."""
        turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
        endings, mistake = [], UserError("it leaves out what the messages say")
        for first, chat in ((SYSTEM, [{"role": "system", "content": SYSTEM}, *turns]), (QUESTION, turns)):
            try:
                rendered = self.scorer.tokenizer.apply_chat_template(chat, tokenize=False)
            except Exception as error:  # a template is a program; some refuse a system message, some want one
                mistake = error
                continue
            if first in rendered and ANSWER in rendered:
                self.openings.append(rendered[: rendered.index(first)])
                endings.append(rendered[rendered.rindex(ANSWER) + len(ANSWER) :])
                ids, self.example = self.scorer.encode_texts([rendered])[0], chat
        if not endings:
            raise UserError(
                f"--model {self.scorer.name}: its chat template renders no conversation ({quote_error(mistake)})"
            )
        self.ending = endings[-1]
        token = self.scorer.tokenizer.added_tokens_decoder.get(ids[0])
        if token is not None and token.special and all(opening.startswith(token.content) for opening in self.openings):
            self.bos = token.content
            self.common = os.path.commonprefix(self.openings)  # what conversations with tools begin with, too

    # ---------------------------------------------------------------- items

    def sequences(self, items: Sequence[Item], keep: int | None = None) -> list[list[int]]:
        """Token ids of each item, in order. keep: as dialects.Question has it.

        Raises:
            Refusal: 400, an item that cannot be scored or is too long; the sentence says which and why.
        """
        most = self.scorer.max_token_length
        if keep is not None and keep > most:
            raise Refusal(400, f"truncate_prompt_tokens {keep} is more than the {most} tokens that the model takes")
        result: list[list[int]] = []
        for part in _slices(items):
            for item, ids in zip(part, self._encoded(part, len(result)), strict=True):
                if fault := self._fault(item, ids):
                    raise Refusal(400, f"text {len(result)}: {fault}")
                ids = cut(ids, most if keep == -1 else keep, self.count)
                if len(ids) > most:
                    raise Refusal(400, f"text {len(result)} has {len(ids)} tokens, and the model takes at most {most}")
                result.append(ids)
        return result

    def _encoded(self, items: list[Item], before: int) -> list[list[int]]:
        """Token ids of a slice. before: how many items stand before it."""
        made: list[Item] = []
        for number, item in enumerate(items, before):
            try:
                made.append(self._prepared(item))
            except UserError as mistake:
                raise Refusal(400, f"text {number}: {mistake}") from mistake
        result: list[list[int] | None] = [item.ids if isinstance(item, Ids) else None for item in made]
        self._encode_texts(made, result)
        self._encode_conversations(made, result, before)
        return result

    def _fault(self, item: Item, ids: list[int]) -> str | None:
        """Why the ids cannot be scored. They would fail the texts that are scored together with them, too."""
        tokenizer = self.scorer.tokenizer
        if not ids:
            return "has no tokens"
        if max(ids) >= self.scorer.rows:
            return f"has the token id {max(ids)}, and the model knows those below {self.scorer.rows}"
        text_ids = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id)
        if tokenizer.pad_token_id in text_ids or (isinstance(item, Ids) and ids[-1] != self.scored_id):
            return None
        return fault_of_ids(ids, tokenizer)

    def _encode_texts(self, items: list[Item], result: list) -> None:
        where = [number for number, item in enumerate(items) if isinstance(item, Text)]
        if where:
            for number, ids in zip(where, self.scorer.encode_texts([items[n].text for n in where]), strict=True):
                result[number] = ids

    def _encode_conversations(self, items: list[Item], result: list, before: int) -> None:
        together: dict[str, list[int]] = {}
        for number, item in enumerate(items):
            if isinstance(item, Conversation):
                together.setdefault(repr(item.template), []).append(number)
        for where in together.values():
            try:
                template = items[where[0]].template
                conversations = [items[n].messages for n in where]
                encoded = self.scorer.encode_conversations(conversations, template)
            except UserError as mistake:
                raise Refusal(
                    400, f"text {before + where[0]}: {mistake}" if len(where) == 1 else str(mistake)
                ) from mistake
            for number, ids in zip(where, encoded, strict=True):
                result[number] = ids
            for messages in conversations:
                self._look_for_lost(messages, template)

    def _look_for_lost(self, messages: list[dict], template: dict) -> None:
        """Count what the template leaves out: tools, tool calls, reasoning. Training would refuse such a row."""
        if not template.get("tools") and all(len(message) == 2 for message in messages):
            return
        text = self.scorer.tokenizer.apply_chat_template(messages, tokenize=False, **template)
        try:
            check_printed(self.scorer.tokenizer, [], messages, text, template)
        except UserError as lost:
            self.count("not printed", str(lost).partition(",")[0])

    def _prepared(self, item: Item) -> Item:
        """An item with nothing left to decide: complete text, messages that the template takes, checked ids."""
        size, most = characters(item), CHARACTERS_PER_TOKEN * self.scorer.max_token_length
        if size > most:
            raise UserError(
                f"has {size} characters, and the model takes at most {self.scorer.max_token_length} tokens, so no text of more "
                f"than {most} characters is read"
            )
        if isinstance(item, Answered):
            item = self._joined(item)
        elif isinstance(item, Text):
            if not _encodable(item.text):
                raise UserError("is empty")
            return Text(self._ended(self._begun(item.text)))
        if isinstance(item, Conversation):
            if not self.scorer.chat:
                raise UserError("the model was trained on plain text and has no chat template for messages; send text")
            messages = check_messages("messages", item.messages)
            if messages[-1]["role"] != "assistant":
                raise UserError(f"ends with a message of {messages[-1]['role']}, and the assistant's answer is scored")
            for part in _parts([messages, item.template]):
                if isinstance(part, str):
                    _encodable(part)
            return Conversation(messages, item.template)
        return item if isinstance(item, Text) else self._checked(item)

    def _joined(self, item: Answered) -> Item:
        """A prompt and its answer, as training would have them."""
        prompt, answer = item.prompt, _encodable(item.answer)
        if isinstance(prompt, str) and not _encodable(prompt):
            raise UserError("has an empty prompt")
        ended = self._ended(answer, whole=item.whole)
        if isinstance(prompt, str):
            if not self.scorer.chat:
                return Text(self.scorer.complete(prompt, ended.removesuffix(self.ending)))
            if self._is_rendered(prompt):
                return Text(self._begun(prompt) + ended)
            self.count("plain prompt", prompt)
            prompt = [{"role": "user", "content": prompt}]
        return Conversation([*prompt, {"role": "assistant", "content": ended.removesuffix(self.ending)}])

    def _is_rendered(self, prompt: str) -> bool:
        """Whether a template wrote the prompt, this one or another."""
        begins = any(opening and prompt.startswith(opening) for opening in self.openings) or self._lacks_bos(prompt)
        return begins or any(mark in prompt for mark in self.marks)

    def _begun(self, text: str) -> str:
        """The text with the template's beginning."""
        text = self._dated(text)
        if not self.scorer.chat or any(text.startswith(opening) for opening in self.openings):
            return text
        if self.bos and text.startswith(2 * self.bos):
            self.count("two BOS", text[:80])
            while text.startswith(2 * self.bos):
                text = text[len(self.bos) :]
        elif self._lacks_bos(text) or (self.bos in self.openings and self.bos):
            self.count("no BOS", text[:80])
            return self.bos + text
        if not any(text.startswith(start) for start in (*self.openings, self.common) if start):
            self.count("another template", text[:80])
        return text

    def _dated(self, text: str) -> str:
        """The text with the date of training, where the template prints one."""
        for opening in (*self.openings, self.common):
            before, date, after = opening.removeprefix(self.bos).partition(DATE)
            pattern = f"((?:{re.escape(self.bos)})*{re.escape(before)})([^\\n]{{4,30}}?){re.escape(after)}"
            if date and after and (found := re.match(pattern, text)) and found[2] != DATE:
                self.count("another date", text[:80])
                return found[1] + DATE + text[found.end(2) :]
        return text

    def _lacks_bos(self, text: str) -> bool:
        """Whether the text with BOS before it would begin as conversations do, beyond BOS alone."""
        begun, starts = self.bos + text, (*self.openings, self.common)
        return bool(self.bos) and any(len(start) > len(self.bos) and begun.startswith(start) for start in starts)

    def _ended(self, text: str, *, whole: bool = False) -> str:
        """The text with the ending of training; without counting where the answer is whole."""
        if text.endswith(self.ending):
            return text
        bare = text.rstrip()
        for part in self.parts_of_ending:
            if bare.endswith(part):
                self.count("part of the end", text[-80:])
                return bare.removesuffix(part) + self.ending
        if not whole:
            if self.refuses_unfinished:
                raise UserError(
                    f"does not end with {self.ending!r}, whose last token is scored, but with {quote(text[-40:])}; send the "
                    "complete text, or start the server with --unfinished end"
                )
            self.count("no end", text[-80:])
        return text + self.ending

    def _checked(self, item: Ids) -> Ids:
        """Ids are scored as they are; one beyond the vocabulary would end a GPU's process."""
        tokenizer = self.scorer.tokenizer
        size, pad = len(tokenizer), tokenizer.pad_token_id
        worst = next((i for i in item.ids if not 0 <= i < size), None)
        if worst is not None:
            raise UserError(f"token id {worst} is outside the vocabulary of {size}")
        of_text = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id, self.scored_id)
        if pad not in of_text and pad in item.ids:  # some models pad with a token of the text
            raise UserError(f"holds the padding token {pad}; send each text's own ids without padding")
        if item.ids[-1] != self.scored_id and self.refuses_unfinished:
            raise UserError(f"ends with token id {item.ids[-1]}, and token {self.scored_id} is scored in training")
        if item.ids[-1] != self.scored_id or (self.bos and item.ids[0] != self.first_id):
            self.count("other ids", f"{item.ids[:4]} ... {item.ids[-4:]}")
        return item


MENDED = {
    "no BOS": "came without the template's BOS, which was put before them",
    "two BOS": "came with BOS twice, which was taken away",
    "no end": "came without the token that is scored, as cut-off answers do; they were ended as in training",
    "part of the end": "ended a little differently from the template, and were given its ending",
    "not printed": "hold what the chat template leaves out, so that no reward depends on it",
    "another date": "came with another date than this template prints, which was put in its place",
    "plain prompt": "came with a prompt that was not rendered, which was taken as the user's message",
    "another template": "do not begin as this model's chat template begins; their rewards mean little",
    "other ids": "came as token ids that do not begin or end as in training; they were scored as they are",
    "cut": "were longer than their truncate_prompt_tokens and lost their start",
}


def characters(item: Item, known: dict[int, int] | None = None) -> int:
    """About as many as the item has when it is written out. known: sizes of prompts, which may stand in many items."""
    if isinstance(item, Text):
        return len(item.text)
    if isinstance(item, Answered):
        known = {} if known is None else known
        if id(item.prompt) not in known:
            known[id(item.prompt)] = _size(item.prompt)
        return known[id(item.prompt)] + len(item.answer)
    return _size(item.messages) + _size(item.template) if isinstance(item, Conversation) else 0


def _size(value: object) -> int:
    """Characters in whatever JSON holds, and one for each thing in it."""
    return sum(len(part) if isinstance(part, str) else 1 for part in _parts(value))


def _parts(value: object) -> Iterator[object]:
    """Everything in whatever JSON holds, however deep."""
    left = [value]
    while left:
        part = left.pop()
        yield part
        if isinstance(part, dict):
            left += [*part, *part.values()]
        elif isinstance(part, list):
            left += part


def _slices(items: Sequence[Item]) -> Iterator[list[Item]]:
    """The items in order, some at a time: encoding stops at the first that is too long."""
    part, size, known = [], 0, {}
    for item in items:
        part.append(item)
        size += characters(item, known)
        if size >= SLICE:
            yield part
            part, size = [], 0
    if part:
        yield part


def cut(ids: list[int], most: int | None, count: Callable[[str, str], None]) -> list[int]:
    """vLLM's truncate_prompt_tokens: the last so many tokens."""
    if most is None or len(ids) <= most:
        return ids
    count("cut", f"{len(ids)} tokens to {most}")
    return ids[-most:]


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError("holds half of a surrogate pair, which is no text in UTF-8") from error
    return text
