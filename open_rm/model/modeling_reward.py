"""A score head over a decoder that transformers has no sequence classifier of.

The reward is the head's value at each row's last token that is not the pad. Saved beside the weights, so that any client
whose transformers knows the decoder reads it with trust_remote_code=True; nothing but transformers and torch is needed.
"""

import torch
from torch import nn
from transformers import AutoModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast


class ScoreOverDecoder:
    """What makes a sequence classifier of a family's PreTrainedModel: its decoder, and a linear layer over it."""

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        setattr(self, self.base_model_prefix, AutoModel.from_config(config))
        self.score = nn.Linear(config.get_text_config().hidden_size, config.num_labels, bias=False)
        self.post_init()

    @classmethod
    def is_custom_code(cls):
        """No, so that transformers 5 fills the decoder's buffers and names its weights as in its own classes."""
        return False

    def forward(self, input_ids=None, attention_mask=None, labels=None, return_dict=None, **kwargs):
        """input_ids, attention_mask: [S, T]. Gives logits [S, num_labels]."""
        if labels is not None:
            raise ValueError("no loss is computed here: a reward model is trained on pairs")
        decoder = getattr(self, self.base_model_prefix)
        hidden = decoder(input_ids=input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state
        pad = self.config.get_text_config().pad_token_id
        if pad is None and len(input_ids) > 1:
            raise ValueError("several rows need a pad token, and config.pad_token_id is not set")
        is_text = torch.ones_like(input_ids) if pad is None else (input_ids != pad).long()
        last = (torch.arange(input_ids.shape[1], device=input_ids.device) * is_text).argmax(-1).to(hidden.device)
        logits = self.score(hidden)[torch.arange(len(hidden), device=hidden.device), last]
        return SequenceClassifierOutputWithPast(logits=logits)
