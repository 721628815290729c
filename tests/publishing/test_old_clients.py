"""Clients of earlier days, themselves and not readings of their rules: transformers 4.51 and 4.57 and the RewardBench command.

They open folders of ours, run the model card's lines as they stand, and give the rewards that training computes. Not covered:
a GPU, and with it the half precision in which RewardBench computes there by default.
"""

import ast
import json
import re
import shutil
import string
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from old_clients import REWARDBENCH, TRANSFORMERS_4_57, run
from tokenizers import pre_tokenizers, processors
from transformers import AutoModel, PreTrainedTokenizerFast

from open_rm.batching.layouts import lay_out
from open_rm.data.encoding import encode, render_pair
from open_rm.data.tokenizer import ending, load_tokenizer
from open_rm.flags import AdapterFlags, ModelFlags
from open_rm.model.contract import Contract, RewardStatistics
from open_rm.model.loading import load_reward_model
from open_rm.publishing.card import write_card
from open_rm.publishing.run_folder import Place
from open_rm.publishing.saving import save_reward_model

# float32 on both sides and the same weights: the order of sums differs, with the padding and the kernels of the versions.
TOLERANCE = 1e-5
# By how much a setting that is read wrong has to change a reward, for these tests to be able to see it.
SEEN = 1e-3

# ---------------------------------------------------------------- bases

# Weights large enough that attention is not even and positions matter; rotary settings that are no family's defaults.
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=1024)
SIZES |= {"initializer_range": 0.2}
GQA = SIZES | {"num_key_value_heads": 1}
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
PLAIN = {"rope_type": "default"}
OF_64 = {"original_max_position_embeddings": 64}
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | OF_64
YARN = {"rope_type": "yarn", "factor": 4.0} | OF_64
LONG = {"rope_type": "longrope", "short_factor": [1 + i / 5 for i in range(8)], "long_factor": [2.0] * 8} | OF_64
LOCAL, LINEAR = PLAIN | {"rope_theta": 100.0}, {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0}
BASES = {
    "llama": ("LlamaConfig", GQA | {"rope_parameters": LLAMA_3 | {"rope_theta": 500.0}}),
    "mistral": ("MistralConfig", GQA | {"sliding_window": 8, "rope_parameters": PLAIN | {"rope_theta": 300.0}}),
    "qwen2": ("Qwen2Config", GQA | {"rope_parameters": PLAIN | {"rope_theta": 77.0}}),
    "qwen3": (
        "Qwen3Config",
        GQA | {"head_dim": 16, "max_position_embeddings": 256, "rope_parameters": YARN | {"rope_theta": 200.0}},
    ),
    "gemma2": (  # scores so large that capping them matters
        "Gemma2Config",
        GQA | {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 1, "rope_parameters": LOCAL},
    ),
    "gemma3_text": (  # the last of its six layers sees everything, and turns by another angle
        "Gemma3TextConfig",
        GQA
        | {"head_dim": 16, "sliding_window": 8, "num_hidden_layers": 6}
        | {"rope_parameters": {"sliding_attention": LOCAL, "full_attention": LINEAR}},
    ),
    "phi3": ("Phi3Config", GQA | IDS | {"rope_parameters": PLAIN | {"rope_theta": 30.0, "partial_rotary_factor": 0.5}}),
    "phi3, long": ("Phi3Config", GQA | IDS | OF_64 | {"rope_parameters": LONG | {"rope_theta": 300.0}}),
    "olmo2": ("Olmo2Config", GQA | IDS | {"rope_parameters": PLAIN | {"rope_theta": 300.0}}),
    "gpt_neox": (
        "GPTNeoXConfig",
        SIZES | IDS | {"rope_parameters": PLAIN | {"rope_theta": 40.0, "partial_rotary_factor": 0.5}},
    ),
    "gpt2": (
        "GPT2Config",
        IDS | {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 1024, "initializer_range": 0.2},
    ),
    "bert": ("BertConfig", SIZES),
    "deberta-v2": (
        "DebertaV2Config",
        SIZES
        | {"relative_attention": True, "position_buckets": 16, "norm_rel_ebd": "layer_norm", "share_att_key": True}
        | {"pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0, "position_biased_input": False},
    ),
    "modernbert": (
        "ModernBertConfig",
        SIZES
        | IDS
        | {"cls_token_id": 0, "sep_token_id": 1, "global_attn_every_n_layers": 2, "local_attention": 8}
        | {"rope_parameters": {"sliding_attention": LOCAL, "full_attention": PLAIN | {"rope_theta": 5000.0}}},
    ),
}
# Old versions compute these with attention that leaves the soft-capping of scores out, unless they are told.
SOFT_CAPPED = ("gemma2",)
ENCODERS = ("bert", "deberta-v2", "modernbert")


def save_base(name: str, folder: Path) -> None:
    """A backbone on random weights; Llama's in the words of transformers 4, as most of the Hub's are: an old client loads an
    adapter's base from there, and no folder of ours can mend that."""
    kind, sizes = BASES[name]
    torch.manual_seed(1)
    AutoModel.from_config(getattr(transformers, kind)(**sizes)).save_pretrained(folder)
    if name == "llama":
        file = folder / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        rope = config.pop("rope_parameters")
        config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": config.pop("dtype")}
        file.write_text(json.dumps(config), encoding="utf-8")


# ---------------------------------------------------------------- folders

DATED = (
    "{{ bos_token + strftime_now('%d %b %Y') }}{% for message in messages %}"
    "{{ '\n' + message['role'] + ': ' + message['content'] + eos_token }}{% endfor %}"
)


@dataclass(frozen=True)
class Kind:
    """A reward model to be saved: on which base, how trained. tokenizer: one of `tokenizer_of`'s.

    template: a name of ours, "dated" (it prints a date), or None: trained on plain text.
    """

    base: str
    tokenizer: str = "toy"
    template: str | None = "tulu"
    adapter: bool = False
    merged: bool = False

    @property
    def whole(self) -> bool:
        """Not an adapter, which no pipeline and no RewardBench can open."""
        return self.merged or not self.adapter


KINDS = {name: Kind(name) for name in BASES if name not in ("llama", "bert")} | {
    "llama, BOS, llama3": Kind("llama", "bos", "llama3"),
    "llama, BOS, plain text": Kind("llama", "bos", None),
    "llama, BOS, dated": Kind("llama", "bos", "dated"),
    "llama, reward token": Kind("llama", "reward token", "chatml"),
    "llama, merged LoRA": Kind("llama", adapter=True, merged=True),
    "llama, LoRA": Kind("llama", adapter=True),
    "qwen2, chatml": Kind("qwen2", "toy", "chatml"),
    "gpt_neox, plain text": Kind("gpt_neox", "toy", None),
    "gpt2, prefix space": Kind("gpt2", "prefix space"),
    "llama, CohereTokenizer, plain text": Kind("llama", "CohereTokenizer", None),
    "llama, LlamaTokenizer, plain text": Kind("llama", "LlamaTokenizer", None),
    "bert": Kind("bert", "words", "encoder"),
    "bert, plain text": Kind("bert", "words", None),
    "bert, own tokenizer class": Kind("bert", "words, BertTokenizer", "encoder"),
}
STATISTICS = RewardStatistics(mean=0.25, std=1.5, temperature=1.25, pairs=60)


def tokenizer_of(kind: Kind, toy: Path, words: list[str], where: Path):
    """As training has it.

    toy: names a BOS that its encoder does not write.  bos: its encoder does, as Llama 3's.  reward token: has one.
    prefix space: its encoder puts one before a text, though its configuration says nothing of it.
    CohereTokenizer: toy's in a class that writes BOS by default in transformers 4.
    LlamaTokenizer: letters; where add_prefix_space is set, transformers 4 makes this class from a file of SentencePiece's.
    words: [CLS] words [SEP] as BERT's, in the plain class or in BERT's own.
    """
    name, template = kind.tokenizer, kind.template
    if template == "dated":
        where.mkdir()
        template = str(where / "dated.jinja")
        Path(template).write_text(DATED, encoding="utf-8")
    if name.startswith("words"):
        vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
        tokenizer = transformers.BertTokenizer(vocab=vocabulary)
        if name == "words":
            special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **special)
        tokenizer.save_pretrained(where)
        return load_tokenizer(str(where), chat_template_name=template)
    if name == "CohereTokenizer":
        shutil.copytree(toy / "model", where)
        file = where / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | {"tokenizer_class": name}))
        return load_tokenizer(str(where), chat_template_name=template)
    if name == "LlamaTokenizer":
        letters = dict.fromkeys(["<unk>", "<s>", "</s>", "<pad>", "▁", *string.printable])
        letters = {letter: i for i, letter in enumerate(letters)}
        tokenizer = transformers.LlamaTokenizer(vocab=letters, merges=[], add_prefix_space=True, add_bos_token=False)
        tokenizer.save_pretrained(where)
        return load_tokenizer(str(where), chat_template_name=template)
    token = "<|reward|>" if name == "reward token" else None
    tokenizer = load_tokenizer(str(toy / "model"), chat_template_name=template, reward_token=token)
    if name == "prefix space":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    if name == "bos":
        bos = tokenizer.bos_token
        adds = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)])
        level = processors.ByteLevel(trim_offsets=False)
        tokenizer.backend_tokenizer.post_processor = processors.Sequence([level, adds])
    return tokenizer


def model_of(kind: Kind, tokenizer, base: Path):
    """A reward model on random weights, and random adapters where it has them."""
    adapter = AdapterFlags(use_peft=kind.adapter, merge_adapter=kind.merged)
    model, _ = load_reward_model(ModelFlags(model_name_or_path=str(base)), tokenizer, adapter=adapter)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    return model.eval()


def trainers_rewards(model, tokenizer, triples, chat: bool) -> tuple[list[list[int]], list[float]]:
    """Token ids and rewards of chosen, rejected, chosen, ... as training computes them."""
    texts = [render_pair(tokenizer, *triple) for triple in triples]
    ids = encode(tokenizer, [side for text in texts for side in (text.chosen, text.rejected)], chat=chat)
    pairs = list(zip(ids[::2], ids[1::2], strict=True))
    batch = lay_out("padded", pairs, pad_token_id=tokenizer.pad_token_id, prompt_ids=range(len(pairs)))
    with torch.no_grad():
        chosen, rejected = model(**batch.inputs(torch.device("cpu"))).chunk(2)
    return ids, torch.stack([chosen, rejected], 1).flatten().tolist()


@dataclass(frozen=True)
class Folder:
    """A saved reward model. inputs: what the card's lines take, for each sequence.  ids, rewards: of training."""

    path: Path
    kind: Kind
    inputs: list[dict]
    ids: list[list[int]]
    rewards: list[float]

    def job(self) -> dict:
        """For `CLIENT`. lines: all of the card's, in order."""
        card = (self.path / "README.md").read_text(encoding="utf-8")
        return {
            "folder": self.path.name,
            "lines": "".join(re.findall(r"```python\n(.*?)```", card, re.DOTALL)),
            "inputs": self.inputs,
            "chat": self.kind.template is not None,
            "ending": Contract.read(self.path).ending,
            "whole": self.kind.whole,
            "how": {"attn_implementation": "eager"} if self.kind.base in SOFT_CAPPED else {},
        }


@pytest.fixture(scope="module")
def rows(toy) -> list[dict]:
    lines = (toy / "data" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:3]]


@pytest.fixture(scope="module")
def folders(toy, rows, tmp_path_factory) -> dict[str, Folder]:
    root = tmp_path_factory.mktemp("folders")
    contents = [message["content"] for row in rows for key in ("prompt", "chosen", "rejected") for message in row[key]]
    words = sorted({word for text in contents for word in re.findall(r"\w+|[^\w\s]", text.lower())})
    for name in BASES:
        save_base(name, root / "bases" / name)
    tokenizers = root / "tokenizers"
    tokenizers.mkdir()
    saved = {}
    for number, (name, kind) in enumerate(KINDS.items()):
        tokenizer = tokenizer_of(kind, toy, words, tokenizers / str(number))
        saved[name] = save(kind, tokenizer, rows, root / "bases" / kind.base, root / f"folder{number}")
    return saved


def save(kind: Kind, tokenizer, rows: list[dict], base: Path, path: Path) -> Folder:
    chat = kind.template is not None
    triples = [(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
    inputs = [{"messages": prompt + answer} for prompt, *answers in triples for answer in answers]
    if not chat:
        triples = [(prompt[0]["content"] + "\n", *(a[0]["content"] for a in answers)) for prompt, *answers in triples]
        inputs = [{"prompt": prompt, "answer": answer} for prompt, *answers in triples for answer in answers]
    model = model_of(kind, tokenizer, base)
    ids, rewards = trainers_rewards(model, tokenizer, triples, chat)
    assert max(rewards) - min(rewards) > 100 * SEEN  # a constant would be equal too
    path.mkdir()
    contract = Contract(
        chat=chat, ending=ending(tokenizer), adapter=kind.adapter, merged=kind.merged, statistics=STATISTICS
    )
    save_reward_model(model, model.state_dict(), tokenizer, str(path), contract)
    place = Place(name="toy", folder=str(path), repo_id=None, revision="main")
    write_card(place, contract, {"plan": {}, "model_name_or_path": "base"}, {}, data=["toy"])
    return Folder(path, kind, inputs, ids, rewards)


# ---------------------------------------------------------------- clients

# The card's lines, and the pipeline in a padded batch; and what both say meanwhile.
CLIENT = """
import json, logging, sys, traceback, warnings
import transformers
from transformers import pipeline

said = []
class Listener(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())
root = transformers.utils.logging.get_logger("transformers")
root.handlers, root.propagate = [Listener()], False
warnings.showwarning = lambda message, *_: said.append(str(message))
warnings.simplefilter("always")

def of_the_card(job):
    rewards, normalised = [], []
    for given in job["inputs"][:2]:  # each loads the model
        names = dict(given)
        exec(job["lines"], names)
        rewards.append(names["reward"])
        normalised.append(names["normalised"])
    return {"card": rewards, "normalised": normalised, "preferred": names["preferred"](2.0, 1.0)}, names["tokenizer"]

def of_the_pipeline(job, tokenizer):
    if job["chat"]:
        texts = [tokenizer.apply_chat_template(given["messages"], tokenize=False) for given in job["inputs"]]
    else:
        texts = [given["prompt"] + given["answer"] + job["ending"] for given in job["inputs"]]
    found = {"encoded": [tokenizer(text)["input_ids"] for text in texts]}
    if job["whole"]:
        score = pipeline("text-classification", model=job["folder"], device="cpu", model_kwargs=job["how"])
        found["pipeline"] = [one["score"] for one in score(texts, batch_size=len(texts))]
    return found

jobs, results = json.load(open(sys.argv[1])), {}
for name, job in jobs.items():
    said.clear()
    try:
        result, tokenizer = of_the_card(job)
        result |= of_the_pipeline(job, tokenizer)
    except Exception:
        result = {"failed": traceback.format_exc()}
    results[name] = result | {"said": list(said)}
"""

# The command, once for each folder; imports would take longer than all of it. It names the device "cuda" outright.
BENCH = """
from transformers import BatchEncoding
on_its_device = BatchEncoding.to
BatchEncoding.to = lambda batch, device, **how: on_its_device(batch, "cpu" if device == "cuda" else device, **how)
from rewardbench import rewardbench
for name, flags in json.loads(sys.argv[2]).items():
    folder = jobs[name]["folder"]
    sys.argv[1:] = ["--model", folder, "--dataset", "rows.jsonl", "--load_json", "--not_quantized", "--torch_dtype", "float32", *flags]
    rewardbench.main()
    scored = [json.loads(line) for line in open(f"results/{folder}_outputs.jsonl")]
    results[name]["rewardbench"] = [row[f"scores_{side}"] for row in scored for side in ("chosen", "rejected")]
"""
SAY = "print(json.dumps({'version': transformers.__version__, 'results': results}))"

# What the command is asked to score, with which flags.
BENCHED = {
    "llama, BOS, llama3": [],
    "llama, merged LoRA": [],
    "qwen2, chatml": [],
    "gpt_neox": [],
    "gemma2": ["--attn_implementation", "eager"],
    "bert": ["--batch_size", "1"],  # it pads on the left, and encoders read [CLS] and positions from there
}


@pytest.fixture(scope="module")
def jobs(folders) -> Path:
    """The folders' jobs, and two that are spoilt: they must not give our rewards, or nothing here could."""
    named = {name: folder.job() for name, folder in folders.items()}
    for spoilt, (name, file, key) in SPOILT.items():
        copy = shutil.copytree(folders[name].path, folders[name].path.parent / spoilt)
        content = json.loads((copy / file).read_text(encoding="utf-8"))
        del content[key]
        (copy / file).write_text(json.dumps(content), encoding="utf-8")
        job = named[name]
        named[spoilt] = job | {"folder": spoilt, "lines": job["lines"].replace(job["folder"], spoilt)}
    path = next(iter(folders.values())).path.parent / "jobs.json"
    path.write_text(json.dumps(named), encoding="utf-8")
    return path


# Rotary settings in the words of transformers 5 alone; token types, of which GPT-2 adds embeddings.
SPOILT = {
    "spoilt_rope": ("mistral", "config.json", "rope_theta"),
    "spoilt_inputs": ("gpt2", "tokenizer_config.json", "model_input_names"),
}


@pytest.fixture(scope="module")
def of_4_57(jobs) -> dict:
    return run(TRANSFORMERS_4_57, CLIENT + SAY, jobs, cwd=jobs.parent)


@pytest.fixture(scope="module")
def of_4_51(jobs, rows) -> dict:
    """RewardBench's own environment."""
    lines = []
    for row in rows:
        sides = {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}
        lines.append(json.dumps({"prompt": row["prompt"][0]["content"], **sides}) + "\n")
    (jobs.parent / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    return run(REWARDBENCH, CLIENT + BENCH + SAY, jobs, json.dumps(BENCHED), cwd=jobs.parent)


@pytest.fixture(params=["4.51", "4.57"])
def old(request) -> dict:
    """What an old version made of the folders."""
    answer = request.getfixturevalue(f"of_{request.param.replace('.', '_')}")
    assert answer["version"].startswith(request.param)
    return answer


# Families that a version has no sequence classifier for.
ABSENT = {"4.51.0": ("gemma3_text", "olmo2"), "4.57.6": ("olmo2",)}


@pytest.mark.parametrize("name", KINDS)
def test_the_cards_lines_and_the_pipeline_give_the_trainers_rewards(old, folders, name):
    folder, found = folders[name], old["results"][name]
    if name in ABSENT[old["version"]]:
        assert "Unrecognized configuration class" in found["failed"]  # a refusal, no wrong number
        return
    assert "failed" not in found, found["failed"]
    assert found["encoded"] == folder.ids
    assert found["card"] == pytest.approx(folder.rewards[:2], rel=0, abs=TOLERANCE)
    assert found["normalised"] == pytest.approx([(reward - 0.25) / 1.5 for reward in found["card"]])
    assert found["preferred"] == pytest.approx(torch.tensor(0.8).sigmoid().item())
    assert not folder.kind.whole or found["pipeline"] == pytest.approx(folder.rewards, rel=0, abs=TOLERANCE)


@pytest.mark.parametrize("name", BENCHED)
def test_the_rewardbench_command_gives_the_trainers_rewards(of_4_51, folders, name):
    assert of_4_51["results"][name]["rewardbench"] == pytest.approx(folders[name].rewards, rel=0, abs=TOLERANCE)


# Said of any folder: where it computes, and that torch is newer than this transformers.
HARMLESS = (r"Device set to use cpu", r"`torch.jit.script(_method)?` is deprecated")
# Of an adapter: the base has no head, it comes with the adapter; peft's settings of later days.
OF_AN_ADAPTER = (r"Some weights of .* newly initialized: \['score.weight'\]", r"`torch_dtype` is deprecated")
IGNORED = re.compile(r"Unexpected keyword arguments (\[.*?\]) for class LoraConfig")


@pytest.mark.parametrize("name", KINDS)
def test_an_old_version_has_nothing_to_say_against_a_folder(old, folders, name):
    folder = folders[name]
    harmless = HARMLESS if folder.kind.whole else HARMLESS + OF_AN_ADAPTER
    said = {line for line in old["results"][name]["said"] if not any(re.match(one, line) for one in harmless)}
    for line in sorted(said) if not folder.kind.whole else ():
        if ignored := IGNORED.match(line):
            said.remove(line)
            config = json.loads((folder.path / "adapter_config.json").read_text(encoding="utf-8"))
            set_ones = {key for key in ast.literal_eval(ignored[1]) if config[key] not in (None, False)}
            # who wrote it, and the size of groups that are not used
            assert set_ones <= {"peft_version", "qalora_group_size"}
    assert said == set()


def test_a_folder_that_is_spoilt_gives_other_rewards(old, folders):
    """Else equal rewards would show nothing."""
    for spoilt, (name, *_) in SPOILT.items():
        rewards = old["results"][spoilt]["card"]
        worst = max(abs(a - b) for a, b in zip(rewards, folders[name].rewards[:2], strict=True))
        assert worst > SEEN, spoilt
