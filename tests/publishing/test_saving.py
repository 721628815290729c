"""What a client of the saved folder has to know besides: contract.json, and how rewards are spread in config.json."""

import dataclasses
import json

import pytest
import torch
from conftest import REPOSITORY, load_model, read_metrics
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    GenerationConfig,
    GraniteConfig,
    GraniteForCausalLM,
)

from open_rm.data.tokenizer import ending
from open_rm.flags import Args
from open_rm.model.contract import Contract, RewardStatistics
from open_rm.model.loading import load_reward_model
from open_rm.publishing.saving import save_reward_model
from open_rm.reward_modeling import main

PLAIN = {"chat": True, "adapter": False, "merged": False, "dtype": "float32", "load_in_4bit": False}
PLAIN |= {"max_token_length": 512, "max_prompt_token_length": 256}
NEWER = ("statistics", "max_token_length", "max_prompt_token_length")
PLAIN |= {"trust_remote_code": False, "statistics": None}
RUNS = {
    "a whole model on conversations": ({}, {}),
    "on plain text, with a reward token": ({"reward_token": "<|reward|>", "text": True}, {"chat": False}),
    "in bfloat16": (
        {"dtype": "bfloat16", "deepspeed": str(REPOSITORY / "configs/ds/zero2.json")},
        {"dtype": "bfloat16"},
    ),
    "an adapter": ({"use_peft": True}, {"adapter": True}),
    "an adapter of 4-bit weights": (
        {"use_peft": True, "load_in_4bit": True, "dtype": "bfloat16"},
        {"adapter": True, "load_in_4bit": True, "dtype": "bfloat16"},
    ),
    "a merged adapter": (
        {"use_peft": True, "merge_adapter": True, "load_in_4bit": True},
        {"adapter": True, "merged": True},  # load_in_4bit: false, since the sum's weights are whole
    ),
    "with trusted code": ({"trust_remote_code": True}, {"trust_remote_code": True}),
}
HELD_OUT = ("a whole model on conversations", "an adapter")


@pytest.fixture
def text_rows(write_rows):
    rows = [{"prompt": f"Say {n}. ", "chosen": f"It is {n}.", "rejected": "No."} for n in range(8)]
    return write_rows(rows)


@pytest.mark.parametrize("name", RUNS)
def test_the_contract_in_the_folder_says_what_the_run_was_and_is_read_back(toy, tmp_path, text_rows, name):
    flags, said = RUNS[name]
    flags = {"dtype": "float32"} | flags
    source = str(text_rows) if flags.pop("text", False) else str(toy / "data")
    if name in HELD_OUT:
        flags["dataset_mixer_eval_list"] = [source, "8"]
    main(
        Args(
            model_name_or_path=toy / "model",  # a Path, as Python users have them
            dataset_mixer_list=[source, "8"],
            dataset_local_cache_dir=str(tmp_path / "cache"),
            output_dir=str(tmp_path / "out"),
            per_device_train_batch_size=8,
            gradient_accumulation_steps=1,
            **flags,
        )
    )
    tokenizer_config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    expected = PLAIN | said | {"ending": tokenizer_config["eos_token"] + flags.get("reward_token", "")}
    if name in HELD_OUT:
        last = read_metrics(tmp_path / "out")[-1]
        numbers = [last.get(f"eval/rm/{part}") for part in ("reward_mean", "reward_std", "temperature")]
        expected["statistics"] = dict(zip(("mean", "std", "temperature"), numbers, strict=True)) | {"pairs": 8}
        why = None if numbers[2] else "chosen answers have no higher rewards than rejected ones"
        expected["statistics"]["no_temperature"] = why
    assert json.loads((tmp_path / "out" / "contract.json").read_text()) == expected
    contract = Contract.read(tmp_path / "out")
    assert dataclasses.asdict(contract) == expected
    assert contract.holds_adapter is (tmp_path / "out" / "adapter_config.json").is_file()
    assert contract.holds_adapter is not (tmp_path / "out" / "model.safetensors").is_file()
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"it reads {'a conversation' if contract.chat else 'a text'} and returns one number" in card
    assert json.loads((tmp_path / "out" / "run.json").read_text())["model_name_or_path"] == str(toy / "model")


def test_a_contract_without_statistics_of_an_older_folder_is_read(tmp_path):
    older = {name: value for name, value in PLAIN.items() if name not in NEWER} | {"ending": "<|eos|>"}
    (tmp_path / "contract.json").write_text(json.dumps(older))
    assert Contract.read(tmp_path) == Contract(chat=True, ending="<|eos|>")


# ---------------------------------------------------------------- how rewards are spread

STATISTICS = RewardStatistics(mean=-1.25, std=2.5, temperature=0.75, pairs=60)
UNFITTED = dataclasses.replace(STATISTICS, temperature=None, no_temperature="every pair is ranked right")
NAMES = ("mean", "std", "reward_temperature")


@pytest.fixture(scope="module")
def classifier(toy):
    """A reward model, which a test may give a config; made once."""
    from open_rm.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(toy / "model"))
    return load_model(toy / "model", tokenizer), tokenizer


@pytest.fixture
def save(classifier, tmp_path):
    """Save it with these statistics; returns the folder and its config.json."""
    (model, tokenizer), folder = classifier, tmp_path / "saved"

    def save(statistics: RewardStatistics | None, **in_config) -> tuple:
        config = model.classifier.config
        for name, value in in_config.items():
            setattr(config, name, value)
        try:
            contract = Contract(chat=True, ending=ending(tokenizer), statistics=statistics)
            save_reward_model(model, model.state_dict(), tokenizer, str(folder), contract)
        finally:
            for name in in_config:
                delattr(config, name)
        return folder, json.loads((folder / "config.json").read_text())

    return save


@pytest.mark.parametrize("statistics", [STATISTICS, UNFITTED], ids=["fitted", "unfitted"])
def test_the_statistics_of_rewards_are_in_the_config_and_in_the_contract(save, statistics):
    folder, config = save(statistics)
    assert [config.get(name) for name in NAMES] == [-1.25, 2.5, statistics.temperature]
    assert "temperature" not in config
    assert Contract.read(folder).statistics == statistics


def test_those_of_a_model_that_was_trained_on_are_not_kept(save):
    _, config = save(None, mean=9.0, std=9.0, reward_temperature=9.0)
    assert not set(NAMES) & set(config)
    _, config = save(UNFITTED, mean=9.0, std=9.0, reward_temperature=9.0)
    assert [config.get(name) for name in NAMES] == [-1.25, 2.5, None]


def test_openrlhf_normalises_by_them(save):
    """What its reward model does with a config (openrlhf/models/model.py at 3c3be62), step by step."""
    folder, _ = save(STATISTICS)
    config, model = AutoConfig.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)
    mean, std = torch.zeros(1), torch.ones(1)
    if hasattr(config, "mean"):
        mean[0] = config.mean
        std[0] = config.std
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        reward = model(ids, attention_mask=torch.ones_like(ids)).logits[0, 0]
    assert ((reward - mean) / std).item() == pytest.approx((reward.item() + 1.25) / 2.5, rel=1e-6)


def test_no_name_is_a_setting_for_generating_text(save):
    """transformers reads such settings from config.json: 4 as they are, 5 takes them out; vLLM samples by them."""
    folder, _ = save(STATISTICS)
    assert not set(NAMES) & set(GenerationConfig().to_dict())
    assert "temperature" in GenerationConfig().to_dict()  # the name that would have been
    assert AutoConfig.from_pretrained(folder).reward_temperature == 0.75
    assert not set(NAMES) & set(GenerationConfig.from_model_config(AutoConfig.from_pretrained(folder)).to_dict())


def test_an_adapter_says_them_in_its_contract(toy, classifier, tmp_path):
    _, tokenizer = classifier
    how = {"model_name_or_path": str(toy / "model"), "use_peft": True, "lora_r": 2}
    flags = Args(**how)
    model, _ = load_reward_model(flags, tokenizer, adapter=flags)
    contract = Contract(chat=True, ending=ending(tokenizer), adapter=True, statistics=STATISTICS)
    save_reward_model(model, model.state_dict(), tokenizer, str(tmp_path), contract)
    assert not (tmp_path / "config.json").exists()
    assert Contract.read(tmp_path).statistics == STATISTICS


# ---------------------------------------------------------------- code that a folder brings


def test_a_family_without_a_classifier_brings_its_class_and_the_contract_says_so(classifier, save, tmp_path):
    plain, tokenizer = classifier
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = GraniteConfig(vocab_size=plain.classifier.config.vocab_size, num_key_value_heads=2, **sizes)
    GraniteForCausalLM(config).save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base", tokenizer)
    contract = Contract(chat=True, ending=ending(tokenizer))
    save_reward_model(model, model.state_dict(), tokenizer, str(tmp_path / "out"), contract)
    assert Contract.read(tmp_path / "out") == dataclasses.replace(contract, trust_remote_code=True)
    [code] = (tmp_path / "out").glob("*.py")
    assert code.stat().st_mode & 0o044 == 0o044
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", trust_remote_code=False)
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert torch.equal(reloaded.score.weight, model.classifier.score.weight)
    folder, _ = save(None)
    assert not list(folder.glob("*.py")) and not Contract.read(folder).trust_remote_code
