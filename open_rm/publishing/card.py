"""The model card: the reward in a few lines of code, results, settings."""

from pathlib import Path

from huggingface_hub import ModelCardData

from open_rm.model.contract import Contract
from open_rm.publishing.run_folder import Place

WHOLE = """from transformers import AutoModelForSequenceClassification, AutoTokenizer

where = {where}
tokenizer, model = AutoTokenizer.from_pretrained(**where), AutoModelForSequenceClassification.from_pretrained(**where)"""

ADAPTER = """from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer, BitsAndBytesConfig

where = {where}
tokenizer = AutoTokenizer.from_pretrained(**where)
base = {{"num_labels": 1, "dtype": "{dtype}", "quantization_config": {packed}}}
model = AutoPeftModelForSequenceClassification.from_pretrained(**where, **base).eval()
model.base_model.model.config.pad_token_id = tokenizer.pad_token_id"""

PACKED = """BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="{dtype}"
)"""

CARD = """---
{header}
---

# {title}

A reward model: it reads {what} and returns one number, higher for the answer that people would prefer.
Trained with open_rm from `{base_model}` on {data}.

## Get the raw reward

```python
{load}
text = {text}
reward = model(**tokenizer(text, {encode}return_tensors="pt")).logits[0, 0].item()
```

{note}Differences of rewards between answers to the same prompt have a meaning: sigmoid(r_a - r_b) is the modelled
probability that a is preferred to b. A single reward has none.

## Results

{results}

![training curves](curves.png)

## Training

{facts}
"""


def write_card(
    place: Place, contract: Contract, facts: dict[str, object], results: dict[str, float], *, data: list[str]
) -> None:
    """Write README.md into the run's folder.

    Args:
        facts: flags and derived numbers of the run (run.json), as a table.  results: final metrics, as a table.
        data: names of the training sources.
    """
    base_model, adapter = str(facts["model_name_or_path"]), contract.holds_adapter
    on_hub = "/" in base_model and not Path(base_model).exists()
    header = ModelCardData(
        base_model=base_model if on_hub else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-classification",
        tags=["reward-model", "open_rm"],
    ).to_yaml()
    # What a reader passes to from_pretrained: repository and branch, or the folder.
    where = {"pretrained_model_name_or_path": place.repo_id or place.folder}
    where |= {"revision": place.revision} if place.repo_id else {}
    where |= {"trust_remote_code": True} if contract.trust_remote_code else {}
    packed = PACKED.format(dtype=contract.dtype) if contract.load_in_4bit else None
    load = ADAPTER.format(where=where, packed=packed, dtype=contract.dtype) if adapter else WHOLE.format(where=where)
    ending = contract.ending
    settings = facts["plan"] | {name: value for name, value in facts.items() if name != "plan"}
    card = CARD.format(
        header=header,
        title=place.name,
        what="a conversation" if contract.chat else "a text",
        load=load,
        base_model=base_model,
        data=", ".join(data),
        text="tokenizer.apply_chat_template(messages, tokenize=False)"
        if contract.chat
        else f'prompt + answer + "{ending}"',
        encode="add_special_tokens=False, " if contract.chat else "",
        note="" if contract.chat else f"The text must end with `{ending}`; its last token is scored. ",
        results=_table(("metric", "value"), {name: f"{value:.4g}" for name, value in results.items()}),
        facts=_table(("setting", "value"), {name: value for name, value in settings.items() if value is not None}),
    )
    (Path(place.folder) / "README.md").write_text(card, encoding="utf-8")


def _table(head: tuple[str, str], rows: dict[str, object]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "| --- | --- |"]
    return "\n".join(lines + [f"| {key} | {value} |" for key, value in rows.items()])
