"""Families that transformers has no sequence classifier of are trained, saved and read by their clients; others are refused.

every_decoder.py does for all causal types what is done here for a few.
"""

import hashlib
import inspect
import json
import shutil
import sys

import every_decoder
import pytest
import torch
import transformers
from conftest import load_model
from every_decoder import TOLERANCE, apart, judge, one_by_one, pairs, read_by_clients, save_tiny, tiny, train

from open_rm.errors import UserError
from open_rm.flags import AdapterFlags, Args, ModelFlags, OpeningFlags
from open_rm.model import any_decoder, families, modeling_reward
from open_rm.model.contract import Contract
from open_rm.reward_modeling import main
from open_rm.scoring.opening import open_scorer

# By the recipe, with its flags.
BY_THE_RECIPE = {
    "granite": {},
    "olmoe": {},
    "glm4_moe": {},
    "cohere2": {"use_peft": True, "merge_adapter": True},
    "gemma4_text": {},
}
# By a step of our own: chunked attention, a backbone that knows no position_ids and gives no past_key_values, buffers that
# transformers leaves without values in custom code (Falcon-H1), weights that it saves under other names (Nemotron-H).
BY_A_STEP = ("llama4_text", "mamba", "falcon_h1", "nemotron_h")
# Refused types, and what would be wrong without that: rewards that padding changes, rewards that a client does not get.
WRONG = {"cpmant": "padding", "xglm": "client"}
SHARED = ("granite", "olmoe", "glm4_moe", "cohere2")


@pytest.fixture(scope="module")
def tokenizer_of_all(toy):
    from open_rm.data.tokenizer import load_tokenizer

    return load_tokenizer(str(toy / "model"))


@pytest.fixture(scope="module")
def trained(toy, tokenizer_of_all, tmp_path_factory, without_pictures):
    """All types trained and saved, then read by one process of plain transformers: (folders, facts, what was read)."""
    folder = tmp_path_factory.mktemp("decoders")
    folders, facts = {}, {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(any_decoder, "WHY_NOT", {})
        for kind in (*BY_A_STEP, *WRONG):
            facts[kind] = train(kind, folder / kind, tokenizer_of_all)
            folders[kind] = folder / kind / "saved"
    for kind, flags in BY_THE_RECIPE.items():
        save_tiny(kind, folder / kind, tokenizer_of_all, max_position_embeddings=512)
        folders[kind] = folder / kind / "out"
        options = dict(
            model_name_or_path=str(folder / kind),
            dataset_mixer_list=[str(toy / "data"), "32"],
            dataset_mixer_eval_list=[str(toy / "data"), "16"],
            dataset_local_cache_dir=str(folder / "cache"),
            output_dir=str(folders[kind]),
            per_device_train_batch_size=16,
            gradient_accumulation_steps=1,
            learning_rate=1e-3,
            total_episodes=32,
            num_evals=0,
            num_sample_pairs=1,
        )
        main(Args(**options | flags))
    return folders, facts, read_by_clients([*folders.values()], tokenizer_of_all.pad_token_id)


@pytest.mark.parametrize("kind", BY_A_STEP)
def test_a_type_without_a_classifier_is_padded_exactly_and_read_by_plain_transformers(trained, kind):
    folders, facts, read = trained
    assert judge(facts[kind], read[str(folders[kind])]) == ""
    assert facts[kind]["brought"] and facts[kind]["moved"] > 0.01


@pytest.mark.parametrize("kind", BY_THE_RECIPE)
def test_the_recipe_trains_it_and_plain_transformers_reads_the_same_rewards(trained, tokenizer_of_all, kind):
    folders, _, read = trained
    folder = folders[kind]
    run = json.loads((folder / "run.json").read_text())
    assert "reload check" in json.dumps(run)
    ours = load_model(folder, tokenizer_of_all).eval()
    with torch.no_grad():
        expected = one_by_one(ours, pairs(), tokenizer_of_all.pad_token_id)
    assert expected.std() > 0.01
    single, padded = read[str(folder)]
    for theirs in (single, padded):
        assert apart(torch.tensor(theirs), expected) < TOLERANCE


@pytest.mark.parametrize("kind", BY_THE_RECIPE)
def test_it_is_scored_without_trusting_code_as_plain_transformers_reads_it(trained, kind):
    folders, _, read = trained
    with open_scorer(OpeningFlags(model=str(folders[kind]))) as scorer:
        ours = scorer.rewards([ids for side in zip(*pairs(), strict=True) for ids in side])
    assert apart(torch.from_numpy(ours), torch.tensor(read[str(folders[kind])][0])) < TOLERANCE


@pytest.mark.parametrize("kind", BY_THE_RECIPE)
def test_the_folder_brings_a_file_and_is_named_so_that_vllm_converts_it(trained, kind):
    """vLLM takes XForSequenceClassification for its XForCausalLM and wants that one's weights, and score.weight."""
    folder = trained[0][kind]
    config = json.loads((folder / "config.json").read_text())
    [architecture] = config["architectures"]
    language_model = json.loads((folder.parent / "config.json").read_text())["architectures"]
    assert [architecture.replace("ForSequenceClassification", "ForCausalLM")] == language_model
    assert config["auto_map"] == {"AutoModelForSequenceClassification": f"modeling_reward.{architecture}"}
    assert [path.name for path in folder.glob("*.py")] == ["modeling_reward.py"]
    names = {at: every_decoder._names(at) for at in (folder, folder.parent)}
    assert names[folder] == names[folder.parent] - {"lm_head.weight"} | {"score.weight"}
    assert config["problem_type"] == "regression" and config["id2label"] == {"0": "reward"}
    assert Contract.read(folder).trust_remote_code


def test_our_own_folder_is_loaded_without_trust_and_its_file_is_not_run(trained, tokenizer_of_all, tmp_path):
    before = {name for name in sys.modules if "transformers_modules" in name}
    folder = shutil.copytree(trained[0]["granite"], tmp_path / "copy")
    model = load_model(folder, tokenizer_of_all)
    assert any_decoder.is_made_here(model.classifier)
    assert {name for name in sys.modules if "transformers_modules" in name} == before


def test_a_folder_whose_file_is_another_is_refused_and_runs_only_if_it_is_trusted(trained, tmp_path):
    folder = shutil.copytree(trained[0]["mamba"], tmp_path / "changed")  # not yet loaded by its file in this process
    file = folder / "modeling_reward.py"
    file.write_text(file.read_text() + "\nraise RuntimeError('THE FILE RUNS')\n")
    flags = ModelFlags(model_name_or_path=str(folder))
    changed = (
        "its modeling_reward.py is of another version of open_rm, or was changed; read it, then pass --trust_remote"
    )
    with pytest.raises(UserError, match=changed):
        families.read_config(flags, max_token_length=64)
    trusting = ModelFlags(model_name_or_path=str(folder), trust_remote_code=True)
    config = families.read_config(trusting, max_token_length=64)
    loader = any_decoder.loader(config, str(folder), trust_remote_code=True)
    with pytest.raises(RuntimeError, match="THE FILE RUNS"):
        loader.from_pretrained(folder, trust_remote_code=True)


def test_a_folder_of_an_earlier_version_is_loaded_without_trust(trained, tokenizer_of_all, tmp_path, monkeypatch):
    folder = shutil.copytree(trained[0]["granite"], tmp_path / "earlier")
    file = folder / "modeling_reward.py"
    file.write_text(file.read_text().replace("A score head over", "A head over"))
    with pytest.raises(UserError, match="of another version of open_rm, or was changed"):
        load_model(folder, tokenizer_of_all)
    earlier = inspect.getsource(modeling_reward).replace("A score head over", "A head over")
    known = (hashlib.sha256(earlier.encode()).hexdigest(), *any_decoder.COMMON)
    monkeypatch.setattr(any_decoder, "COMMON", known)
    assert any_decoder.is_made_here(load_model(folder, tokenizer_of_all).classifier)
    file.write_text(file.read_text() + "\n# a line below the family's class\n")
    with pytest.raises(UserError, match="of another version of open_rm, or was changed"):
        load_model(folder, tokenizer_of_all)


def test_the_text_that_folders_bring_is_among_those_that_later_versions_take():
    """Red after a change of modeling_reward.py: then its new sha256 goes behind those that stand in COMMON."""
    text = inspect.getsource(modeling_reward)
    assert any_decoder.COMMON[-1] == hashlib.sha256(text.encode()).hexdigest()


def test_a_folder_that_names_another_file_is_refused_as_somebodys(trained, tokenizer_of_all, tmp_path):
    folder = shutil.copytree(trained[0]["granite"], tmp_path / "theirs")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {any_decoder.AUTO: "theirs.Reward"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=r"brings a classifier of its own \(theirs.Reward\); read that code, then pass --trust"
    ):
        load_model(folder, tokenizer_of_all)


def test_a_family_that_has_a_classifier_brings_no_code(toy, tokenizer_of_all, tmp_path):
    model = load_model(toy / "model", tokenizer_of_all)
    assert not any_decoder.write_code(tmp_path, model.classifier) and not [*tmp_path.iterdir()]
    assert any_decoder.class_for(model.classifier.config) is None
    assert not any_decoder.brings_code(model.classifier.config)


def test_an_adapter_alone_is_refused_since_its_clients_could_not_load_the_base(tokenizer_of_all):
    config = tiny("granite")
    with pytest.raises(UserError, match="no sequence classifier of granite, .*; add --merge_adapter"):
        families.check_together("base", config, tokenizer_of_all, AdapterFlags(use_peft=True))
    families.check_together("base", config, tokenizer_of_all, AdapterFlags(use_peft=True, merge_adapter=True))


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("blt", "cuts bytes into patches"),
        ("cpmant", "wants its padding on the left"),
        ("xglm", "depend on which token the pad is"),
        ("bert-generation", "reads its text in both directions"),
        ("pegasus", "it is an encoder and a decoder"),
        ("musicgen", "it is an encoder and a decoder"),
        ("trocr", "transformers has no plain decoder of it"),
        ("llama4", "it also sees; save the part that reads, llama4_text, with AutoModelForCausalLM"),
        ("mllama", "it also sees, and the part that reads is no model of its own"),
    ],
)
def test_what_cannot_be_a_reward_model_is_refused_by_name_from_its_config(kind, why, tmp_path):
    transformers.CONFIG_MAPPING[kind]().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"{kind} cannot be a reward model: .*{why}"):
        families.read_config(ModelFlags(model_name_or_path=str(tmp_path)), max_token_length=64)


@pytest.mark.parametrize("kind", WRONG)
def test_refused_types_would_give_other_rewards(trained, kind):
    folders, facts, read = trained
    assert WRONG[kind] in judge(facts[kind], read[str(folders[kind])])
    assert facts[kind][WRONG[kind]] > 100 * TOLERANCE


@pytest.mark.parametrize("kind", SHARED)
def test_its_prompts_are_shared_where_that_is_exact(trained, kind):
    run = json.loads((trained[0][kind] / "run.json").read_text())
    assert "batching shared_prefix" in json.dumps(run)
