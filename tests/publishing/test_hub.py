"""The Hub seen by a user: pushing a model, what goes wrong on the way, and training data that lies there.

Everything runs in processes of its own against a stand-in for the Hub, because the clients read their environment on
import. Only the schedule of attempts is tested in this process, where the pauses can be skipped.
"""

import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx2
import pytest
from conftest import REPOSITORY, read_metrics, run_recipe, toy_flags
from hub_standin import READ_ONLY_TOKEN, TOKEN, HubStandin
from huggingface_hub.errors import HfHubHTTPError

from open_rm.errors import UserError
from open_rm.publishing import hub_calls, pushing

# Enough for a model that is saved: these runs are about what comes before and after the training.
SHORT = {"total_episodes": 16, "dataset_mixer_eval_list": None, "num_sample_pairs": 0}


@pytest.fixture(scope="module")
def standin():
    with HubStandin() as hub:
        yield hub


@pytest.fixture
def hub(standin):
    yield standin
    standin.clear()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of all output folders; the runs share one cache of tokenized data beside them."""
    return tmp_path_factory.mktemp("runs")


def environment(hub, token=TOKEN) -> dict:
    """Of a process that talks to the stand-in, whatever the environment of the tests says about tokens and offline."""
    switches = {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}
    return {"HF_TOKEN": "", "HUGGING_FACE_HUB_TOKEN": "", **hub.env(token), **switches}


def train(hub, toy, output_dir, *, token=TOKEN, env=None, **flags):
    return run_recipe(*toy_flags(toy, output_dir, **flags), env=environment(hub, token) | (env or {}))


def client(hub, folder, script, *args, token=TOKEN):
    """Run `script` in `folder`, as somebody elsewhere who has the token; it leaves its findings in `out`."""
    whole = f"import json, sys\nout = {{}}\nargs = sys.argv[1:]\n{script}\nprint(json.dumps(out))"
    command = [sys.executable, "-c", whole, *map(str, args)]
    done = subprocess.run(command, env=hub.env(token), cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def the_one_sentence(done) -> str:
    """What a run that failed says to its user: one line, the last one, and no traceback."""
    assert done.returncode not in (0, None), done.stdout
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    lines = done.stderr.strip().splitlines()
    assert [line.startswith("error: ") for line in lines].count(True) == 1, done.stderr
    assert lines[-1].startswith("error: "), done.stderr
    return lines[-1]


def assert_nothing_was_trained(output_dir):
    metrics = output_dir / "metrics.jsonl"
    assert not metrics.exists() or metrics.read_text() == ""
    assert not list(output_dir.glob("*.safetensors"))


def statuses(log, method, part) -> list[int]:
    return [status for verb, path, status in log if verb == method and part in path]


# ---------------------------------------------------------------- a push that works


PUSHED_NAME = "pushed-run"


@pytest.fixture(scope="module")
def pushed(standin, toy, runs):
    # Tracked, so that there is something in the folder that must stay at home.
    done = train(
        standin,
        toy,
        runs / "pushed",
        env={"WANDB_MODE": "offline", "WANDB_DATA_DIR": str(runs / "wandb-data")},
        run_name=PUSHED_NAME,
        push_to_hub=True,
        hf_repo_id="toy_rm",
        with_tracking=True,
    )
    assert done.returncode == 0, done.stderr
    return runs / "pushed", done


DOWNLOAD = """
import re
from pathlib import Path
import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoModelForSequenceClassification, AutoTokenizer

repo, revision, local, conversations = *args[:3], json.loads(args[3])

def rewards(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in conversations]
    with torch.no_grad():
        batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
        return model(**batch).logits[:, 0].tolist()

api = HfApi()
out["private"] = api.model_info(repo, revision=revision).private
try:
    HfApi(token=False).model_info(repo)
except HfHubHTTPError as error:
    out["stranger"] = error.response.status_code
out["branches"] = sorted(branch.name for branch in api.list_repo_refs(repo).branches)
out["files"], out["main"] = (sorted(api.list_repo_files(repo, revision=name)) for name in (revision, "main"))
downloaded = snapshot_download(repo, revision=revision)
out["hub"], out["local"] = rewards(downloaded), rewards(local)
names = {"messages": conversations[0]}
exec(re.search("```python\\n(.*?)```", (Path(downloaded) / "README.md").read_text(), re.S)[1], names)
out["card"] = names["reward"]
"""


@pytest.fixture(scope="module")
def downloaded(standin, pushed, runs):
    conversations = [
        [{"role": "user", "content": "Write a happy line about the lake."}, {"role": "assistant", "content": answer}]
        for answer in ("Today the lake looks golden.", "Today the lake looks weeping. At noon the lake grows cold.")
    ]
    arguments = ["standin/toy_rm", PUSHED_NAME, pushed[0], json.dumps(conversations)]
    return client(standin, runs, DOWNLOAD, *arguments)


def test_a_run_pushes_to_a_private_repository_on_a_branch_of_its_name(pushed, downloaded):
    assert f"/standin/toy_rm/tree/{PUSHED_NAME}" in pushed[1].stdout
    assert downloaded["private"] is True
    assert downloaded["stranger"] == 401
    assert downloaded["branches"] == ["main", PUSHED_NAME]
    assert downloaded["main"] == [".gitattributes"]


def test_the_pushed_model_gives_the_rewards_of_the_local_folder(downloaded):
    assert downloaded["hub"] == pytest.approx(downloaded["local"], abs=1e-6)
    assert downloaded["local"][0] != pytest.approx(downloaded["local"][1], abs=1e-3)


def test_the_code_on_the_card_of_the_pushed_model_gives_the_reward(downloaded):
    assert downloaded["card"] == pytest.approx(downloaded["local"][0], abs=1e-5)


def test_only_what_belongs_to_the_model_is_uploaded(pushed, downloaded):
    folder, _ = pushed
    assert (folder / "samples.jsonl").stat().st_size
    for name in ("wandb", "tensorboard"):
        assert any(path.is_file() for path in (folder / name).rglob("*"))
    assert downloaded["files"] == sorted(
        [".gitattributes", *(path.name for path in folder.iterdir() if path.is_file() and path.name != "samples.jsonl")]
    )
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= set(downloaded["files"])


# ---------------------------------------------------------------- refused before training


@pytest.fixture(scope="module")
def giving_up(toy, runs):
    """The run of `given_up`, below, on its way: (its folder, its own stand-in, its future).

    It sleeps for half a minute; started here, it does so while the tests of this section run.
    """
    with HubStandin() as hub, ThreadPoolExecutor(1) as background:
        hub.fault("/commit/", method="POST", status=503, times=-1)
        flags = {"run_name": "kept-run", "push_to_hub": True, "hf_repo_id": "later", **SHORT}
        yield runs / "kept", hub, background.submit(train, hub, toy, runs / "kept", **flags)


@pytest.mark.usefixtures("giving_up")
@pytest.mark.parametrize(
    "token, said",
    [("hf_wrong", ("401", "HF_TOKEN")), (None, ("no Hub token", "HF_TOKEN")), (READ_ONLY_TOKEN, ("403", "write"))],
    ids=["wrong", "none", "read_only"],
)
def test_a_token_that_cannot_push_is_refused_before_training(hub, toy, runs, token, said):
    output_dir, start = runs / f"refused-{token}", len(hub.requests())
    done = train(hub, toy, output_dir, token=token, push_to_hub=True, hf_repo_id="standin/refused", **SHORT)
    sentence = the_one_sentence(done)
    assert sentence.startswith("error: --push_to_hub: ")
    assert all(words in sentence for words in said), sentence
    assert_nothing_was_trained(output_dir)
    assert "trying again" not in done.stderr  # a refusal does not pass
    assert not [path for _, path, _ in hub.requests()[start:] if "commit" in path or "lfs" in path]
    assert token is None or token not in done.stdout + done.stderr


def test_a_token_that_may_only_read_is_refused_for_a_repository_that_exists(hub, pushed):
    script = """if True:
        from open_rm.errors import UserError
        from open_rm.publishing.pushing import check_access
        try:
            out = check_access(entity=None, repo_id="toy_rm", revision="main", private=True)
        except UserError as error:
            out = str(error)
        """
    assert "403" in client(hub, REPOSITORY, script, token=READ_ONLY_TOKEN)


@pytest.mark.parametrize("repo_id", ["two words", "one/two/three"])
def test_a_repository_name_that_the_hub_cannot_have_is_one_sentence(monkeypatch, repo_id):
    monkeypatch.setattr(pushing, "get_token", lambda: TOKEN)
    monkeypatch.setattr(pushing.HfApi, "whoami", lambda self: {"name": "standin"})
    with pytest.raises(UserError, match=repo_id):
        pushing.check_access(entity=None, repo_id=repo_id, revision="main", private=True)


# ---------------------------------------------------------------- faults that pass, and one that stays


def test_a_push_survives_a_503_and_a_broken_connection(hub, toy, runs):
    start = len(hub.requests())
    hub.fault("/api/repos/create", method="POST", status=503)
    hub.fault("/commit/", method="POST", status=503)
    hub.fault("/commit/", method="POST", status=0)  # the connection is closed without an answer
    done = train(hub, toy, runs / "survivor", push_to_hub=True, hf_repo_id="survivor", hf_repo_revision="main", **SHORT)
    assert done.returncode == 0, done.stderr
    log = hub.requests()[start:]
    assert statuses(log, "POST", "/api/repos/create")[:2] == [503, 200]
    assert statuses(log, "POST", "/api/models/standin/survivor/commit/main") == [503, 0, 200]
    assert "the Hub answered 503; trying again in 2 s" in done.stderr
    assert "the Hub cannot be reached" in done.stderr and "trying again in 4 s" in done.stderr


LISTING = """
import hashlib
from pathlib import Path
from huggingface_hub import HfApi, hf_hub_download
out["files"] = HfApi().list_repo_files(args[0], revision=args[1])
out["private"] = HfApi().model_info(args[0]).private
if "model.safetensors" in out["files"]:
    weights = hf_hub_download(args[0], "model.safetensors", revision=args[1])
    out["sha256"] = hashlib.sha256(Path(weights).read_bytes()).hexdigest()
"""


@pytest.fixture(scope="module")
def given_up(giving_up):
    """A run whose commit was answered 503 for ever: (its folder, the finished process, the requests it made)."""
    folder, hub, running = giving_up
    done = running.result()
    hub.clear()
    return folder, done, hub.requests()


def test_a_push_is_given_up_after_five_attempts_and_the_exit_status_tells(given_up):
    _, done, log = given_up
    assert statuses(log, "POST", "/commit/") == [503] * 5
    assert re.findall(r"trying again in (\d+) s", done.stderr) == ["2", "4", "8", "16"]
    assert the_one_sentence(done).startswith("error: push to standin/later failed: the Hub answered 503.")


def test_a_model_that_could_not_be_pushed_is_complete_on_the_disk(given_up):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder, done, _ = given_up
    assert f"The model is safe in {folder}" in the_one_sentence(done)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    inputs = AutoTokenizer.from_pretrained(folder)("Today the lake looks golden.", return_tensors="pt")
    assert model(**inputs).logits.shape == (1, 1)
    assert all((folder / name).stat().st_size for name in ("README.md", "curves.png", "run.json"))
    assert len(read_metrics(folder)) == 2


def test_the_command_in_the_message_pushes_the_model_later(giving_up, given_up, runs):
    (folder, hub, _), (_, done, _) = giving_up, given_up
    assert client(hub, runs, LISTING, "standin/later", "kept-run")["files"] == [".gitattributes"]
    command = shlex.split(re.search(r"python -m open_rm\.hub push .*", the_one_sentence(done))[0])
    command[0] = sys.executable
    env = {**environment(hub), "PYTHONPATH": str(REPOSITORY)}
    later = subprocess.run(command, env=env, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert later.returncode == 0, later.stderr
    assert later.stdout.strip() == f"{hub.endpoint}/standin/later/tree/kept-run"
    found = client(hub, runs, LISTING, "standin/later", "kept-run")
    assert found["sha256"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert {"config.json", "tokenizer.json", "README.md"} <= set(found["files"])
    assert found["private"] is True


# ---------------------------------------------------------------- attempts and messages, without processes


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    """The pauses that were asked for; none is made."""
    made = []
    monkeypatch.setattr("time.sleep", made.append)
    return made


def answered(status: int) -> HfHubHTTPError:
    return HfHubHTTPError("no", response=httpx2.Response(status, request=httpx2.Request("POST", "http://hub")))


def failing(*errors):
    """A call that raises these one after another, then returns "done"."""
    left = list(errors)

    def call():
        if left:
            raise left.pop(0)
        return "done"

    return call


def test_pauses_between_attempts_double_from_two_seconds(pauses, capsys):
    with pytest.raises(HfHubHTTPError):
        hub_calls.persistently(failing(*[answered(503)] * 5))
    assert pauses == [2, 4, 8, 16]
    assert len(capsys.readouterr().err.splitlines()) == 4


PASSING = [answered(500), answered(502), answered(503), answered(429), httpx2.ConnectError("no"), ConnectionError()]


@pytest.mark.parametrize("error", [*PASSING, httpx2.RemoteProtocolError("no"), httpx2.ReadTimeout("no")], ids=str)
def test_a_fault_that_may_pass_is_tried_again(pauses, error):
    assert hub_calls.persistently(failing(error, error)) == "done"
    assert pauses == [2, 4]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 422])
def test_an_answer_that_will_not_change_is_not_asked_for_again(pauses, status):
    with pytest.raises(HfHubHTTPError):
        hub_calls.persistently(failing(answered(status)))
    assert pauses == []


@pytest.mark.parametrize(
    "entity, repo_id, complete",
    [(None, None, "me/open_rm_dev"), (None, "rm", "me/rm"), ("team", "rm", "team/rm"), (None, "team/rm", "team/rm")],
)
def test_the_repository_is_named_by_what_is_given_and_else_by_the_token(monkeypatch, entity, repo_id, complete):
    created = []
    api = SimpleNamespace(
        whoami=lambda: {"name": "me"}, create_repo=lambda repo, private: created.append((repo, private))
    )
    monkeypatch.setattr(pushing, "HfApi", lambda: api)
    monkeypatch.setattr(pushing, "get_token", lambda: TOKEN)
    assert pushing.check_access(entity=entity, repo_id=repo_id, revision="main", private=False) == complete
    assert created == [(complete, False)]


def given_up_message(monkeypatch, folder, private=True) -> str:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    api = SimpleNamespace(create_repo=lambda *_, **__: failing(answered(400))())
    monkeypatch.setattr(pushing, "HfApi", lambda: api)
    with pytest.raises(UserError) as caught:
        pushing.push_folder(str(folder), "me/rm", revision="b", private=private)
    return str(caught.value)


@pytest.mark.parametrize("private, end", [(True, ["b"]), (False, ["b", "--no_private"])])
def test_the_command_in_the_message_keeps_the_repository_as_private_as_it_was_to_be(
    monkeypatch, tmp_path, private, end
):
    command = shlex.split(given_up_message(monkeypatch, tmp_path / "x", private).rpartition("with: ")[2])
    assert command[-len(end) :] == end


def test_the_command_in_the_message_works_for_a_folder_with_a_space(monkeypatch, tmp_path):
    command = shlex.split(given_up_message(monkeypatch, tmp_path / "my run").rpartition("with: ")[2])
    assert command[command.index("--folder") + 1] == str(tmp_path / "my run")


def test_pushing_a_folder_that_is_not_there_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(pushing.HfApi, "create_repo", lambda *_, **__: None)
    with pytest.raises(UserError, match="nowhere"):
        pushing.push_folder(str(tmp_path / "nowhere"), "me/rm", revision="main")


# ---------------------------------------------------------------- training data from the Hub


UPLOAD_DATA = """
from huggingface_hub import HfApi
HfApi().create_repo(args[0], repo_type="dataset", private=True)
HfApi().upload_folder(repo_id=args[0], folder_path=args[1], repo_type="dataset")
"""


@pytest.fixture(scope="module")
def prefs(standin, toy, tmp_path_factory):
    """The toy's rows as a private dataset repository; returns its name."""
    folder = tmp_path_factory.mktemp("prefs")
    for split in ("train", "test"):
        shutil.copy(toy / "data" / f"{split}.jsonl", folder)
    client(standin, folder, UPLOAD_DATA, "standin/prefs", folder)
    return "standin/prefs"


def test_training_on_a_dataset_of_the_hub_equals_training_on_its_files(hub, toy, runs, prefs, pushed):
    lists = {"dataset_mixer_list": [prefs, "1.0"], "dataset_mixer_eval_list": [prefs, "1.0"]}
    done = train(hub, toy, runs / "by-name", **lists)
    assert done.returncode == 0, done.stderr
    assert "train: standin/prefs[train]: 240 rows (messages, prompt given), 240 taken, 240 pairs kept" in done.stdout
    assert "eval: standin/prefs[test]: 60 rows (messages, prompt given), 60 taken, 60 pairs kept" in done.stdout
    by_name, by_file = (
        [(row["step"], row.get("train/rm/loss"), row.get("eval/rm/loss")) for row in read_metrics(folder)]
        for folder in (runs / "by-name", pushed[0])
    )
    assert by_name == by_file


@pytest.mark.parametrize(
    "name, split, said",
    [("standin/prefs", "nope", "standin/prefs, split 'nope'"), ("standin/missing", "train", "standin/missing")],
    ids=["split", "name"],
)
def test_an_unknown_split_or_dataset_is_one_sentence(hub, toy, runs, prefs, name, split, said):
    lists = {"dataset_mixer_list": [name, "1.0"], "dataset_mixer_list_splits": split}
    done = train(hub, toy, runs / f"unknown-{split}", **SHORT | lists)
    sentence = the_one_sentence(done)
    assert said in sentence and "cannot be loaded" in sentence
    assert_nothing_was_trained(runs / f"unknown-{split}")


# ---------------------------------------------------------------- models that lie there

FETCH = """
import sys
sys.path.insert(0, args[1])
import shutil
from huggingface_hub import HfApi, scan_cache_dir
from transformers import AutoModelForCausalLM
from open_rm.errors import UserError
from open_rm.flags import ModelFlags
from open_rm.model.loading import fetch

api, model = HfApi(), AutoModelForCausalLM.from_pretrained(args[0])
for name, how in {"whole": {}, "parts": {"max_shard_size": "200KB"}}.items():
    model.save_pretrained(name, **how)
    api.create_repo(f"standin/{name}", private=True)
    api.upload_folder(repo_id=f"standin/{name}", folder_path=name)
    fetch(ModelFlags(model_name_or_path=f"standin/{name}"))
try:
    fetch(ModelFlags(model_name_or_path="standin/missing"))
except UserError as error:
    out["said"] = str(error)
fetch(ModelFlags(model_name_or_path=args[0]))
for repo in scan_cache_dir().repos:
    out[repo.repo_id] = sorted(file.file_name for revision in repo.revisions for file in revision.files)
"""


def test_a_models_weights_are_downloaded_before_ranks_load_them_together(hub, toy, tmp_path):
    found = client(hub, tmp_path, FETCH, toy / "model", REPOSITORY)
    assert found["standin/whole"] == ["model.safetensors"]
    assert found["standin/parts"][-1] == "model.safetensors.index.json" and len(found["standin/parts"]) > 3
    assert "standin/missing" not in found and "no weights are found here" in found["said"]
