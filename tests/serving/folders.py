"""Saved reward models of the toy, each with another template, and what training makes of a conversation."""

from pathlib import Path

import torch
from conftest import load_model

from open_rm.data.encoding import encode, render_pair
from open_rm.data.tokenizer import load_tokenizer
from open_rm.flags import AdapterFlags, DataFlags
from open_rm.model.contract import Contract
from open_rm.publishing import saving


class Trained:
    """A folder, and the trainer's own tokenizer: what is compared with."""

    def __init__(self, toy: Path, folder: Path, *, template: str | None = None, chat: bool = True, **tokenizer):
        self.tokenizer = load_tokenizer(str(toy / "model"), chat_template_name=template, **tokenizer)
        self.folder, self.chat = folder, chat
        model = load_model(toy / "model", self.tokenizer)
        contract = Contract.of(AdapterFlags(), DataFlags(), self.tokenizer, chat=chat, dtype=torch.float32, code=False)
        saving.save_reward_model(model, model.state_dict(), self.tokenizer, str(folder), contract)
        self.saved = load_tokenizer(str(folder))

    def rendered(self, messages: list[dict], **how) -> str:
        """As a client with this folder's tokenizer renders it."""
        return self.saved.apply_chat_template(messages, tokenize=False, **how)

    def ids(self, prompt, answer) -> list[int]:
        """Of training."""
        return encode(self.tokenizer, [render_pair(self.tokenizer, prompt, answer, answer).chosen], chat=self.chat)[0]

    def conversation(self, *contents: str) -> list[int]:
        """Training's ids of user, assistant, user, ..."""
        messages = turns(*contents)
        return self.ids(messages[:-1], messages[-1:])


def turns(*contents: str) -> list[dict]:
    """user, assistant, user, ..."""
    roles = ("user", "assistant")
    return [{"role": roles[number % 2], "content": content} for number, content in enumerate(contents)]
