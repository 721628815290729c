"""LoRA and QLoRA (peft, bitsandbytes): small trained matrices beside a frozen backbone, the score head always in full.

Sources: LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685; QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314.
What is saved is a plain peft folder (adapter and head), or the sum of both in a plain transformers folder.
Not covered: encoders, whose pooling would have to be trained and saved too.
"""

import json
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from open_rm.errors import UserError
from open_rm.flags import AdapterFlags
from open_rm.model import any_decoder

ADAPTER_CONFIG = "adapter_config.json"
HEAD = "score"


def quantization(dtype: torch.dtype | str) -> BitsAndBytesConfig:
    """4-bit NF4 weights that compute in `dtype`; the score head stays as it is."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[HEAD],
    )


def adapt(classifier: PreTrainedModel, flags: AdapterFlags, *, name: str, revision: str | None, seed: int):
    """Freeze the classifier, put adapters into its backbone in place and leave its score head trainable.

    Args:
        name, revision: of the checkpoint, as the adapter's folder will name it.
        seed: decides the matrices A; B starts at zero, so the rewards are those without an adapter.

    Returns:
        peft's wrapper, which knows how to save it.

    Raises:
        UserError: a target that is no linear layer of the backbone.
    """
    import peft

    for module in classifier.modules():
        # In evaluation on some CPUs bitsandbytes repacks its weights for a bfloat16 kernel that has no gradient, and does
        # not unpack them for training again: what is trained after the first evaluation would be wrong without a word.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    targets = _targets(classifier, flags.lora_target_modules)
    config = peft.LoraConfig(
        task_type="SEQ_CLS",
        r=flags.lora_r,
        lora_alpha=flags.lora_alpha,
        lora_dropout=flags.lora_dropout,
        target_modules=targets,
        modules_to_save=[HEAD],
        revision=revision,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in classifier.modules()),
    )
    torch.manual_seed(seed)
    # peft would make float32 of its matrices beside a bfloat16 base; DeepSpeed keeps float32 masters of everything anyway.
    wrapped = peft.get_peft_model(classifier, config, autocast_adapter_dtype=False)
    local = Path(name).expanduser()
    wrapped.peft_config["default"].base_model_name_or_path = str(local.resolve()) if local.is_dir() else name
    return wrapped


def _targets(classifier: PreTrainedModel, wanted: list[str]) -> list[str]:
    """Last parts of the names of the backbone's linear layers: the wanted ones, or all; never the score head."""
    backbone = getattr(classifier, classifier.base_model_prefix)
    layers = {path.rpartition(".")[2] for path, m in backbone.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    if unknown := sorted(set(wanted) - layers):
        raise UserError(
            f"--lora_target_modules {unknown[0]}: no linear layer of the backbone; it has {', '.join(sorted(layers))}"
        )
    return sorted(wanted or layers)


def describe(classifier: PreTrainedModel, flags: AdapterFlags) -> str:
    """One line on what is trained."""
    sizes = [(p.requires_grad, getattr(p, "ds_numel", p.numel())) for p in classifier.parameters()]
    trained = sum(size for trains, size in sizes if trains)
    base = "4-bit (NF4) frozen weights" if flags.load_in_4bit else "frozen weights"
    return f"LoRA of rank {flags.lora_r}, alpha {flags.lora_alpha:g}, over {base}: {trained} weights are trained, the score head in full"


def save(wrapped, state: dict[str, torch.Tensor], folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors, the head among them.

    state: weights by the names of the classifier. Embeddings are not saved: at most the pad's row is new, and no reward
    depends on it.
    """
    named = {f"base_model.model.{name}": value for name, value in state.items()}
    wrapped.save_pretrained(folder, state_dict=named, save_embedding_layers=False)


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter instead of a whole model."""
    return (Path(folder) / ADAPTER_CONFIG).is_file()


def load(folder: str, *, pad_token_id: int, dtype: str, load_in_4bit: bool, trust_remote_code: bool) -> nn.Module:
    """The adapter on its base, as a client of peft loads it; see contract.Contract."""
    import peft

    how = _of_base(dtype, load_in_4bit, trust_remote_code)
    model = peft.AutoPeftModelForSequenceClassification.from_pretrained(folder, **how)
    config = model.base_model.model.config  # set when the embeddings have grown: the base may have no row for the pad
    config.pad_token_id = config.get_text_config().pad_token_id = pad_token_id
    return model.eval()


def _of_base(dtype: str, load_in_4bit: bool, trust_remote_code: bool) -> dict:
    """How from_pretrained loads the base that an adapter was trained beside."""
    how = {"num_labels": 1, "dtype": dtype, "trust_remote_code": trust_remote_code}
    return how | ({"quantization_config": quantization(dtype)} if load_in_4bit else {})


def merge(folder: str, tokenizer, *, dtype: str, load_in_4bit: bool, trust_remote_code: bool) -> PreTrainedModel:
    """Adapter plus base as one plain model; see contract.Contract.

    A base of 4 bits is unpacked to `dtype` first: that is what the adapter was trained beside, while the original weights
    differ from it by the quantization's rounding.
    """
    import peft

    named = json.loads((Path(folder) / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    name, revision = named["base_model_name_or_path"], named["revision"]
    code = {"revision": revision, "trust_remote_code": trust_remote_code}
    loader = any_decoder.loader(AutoConfig.from_pretrained(name, **code), name, **code)
    base = loader.from_pretrained(name, revision=revision, **_of_base(dtype, load_in_4bit, trust_remote_code))
    if load_in_4bit:
        base = base.dequantize().to(getattr(torch, dtype))
    if len(tokenizer) > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return peft.PeftModel.from_pretrained(base, folder).merge_and_unload()
