"""The stand-in for the Hub, seen through the real clients.

The clients read their environment on import, so each test runs its script in a process of its own.
"""

import json
import subprocess
import sys

import pytest
from hub_standin import READ_ONLY_TOKEN, HubStandin


@pytest.fixture(scope="module")
def shared():
    with HubStandin() as hub:
        yield hub


@pytest.fixture
def hub(shared):
    yield shared
    shared.clear()


def client(hub, script, *args, token="hf_standin"):
    """Run `script`, which leaves its findings in `out`, and return them."""
    whole = f"import json, sys\nout = {{}}\nargs = sys.argv[1:]\n{script}\nprint(json.dumps(out))"
    command = [sys.executable, "-c", whole, *map(str, args)]
    done = subprocess.run(command, env=hub.env(token), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


UPLOAD = """
from pathlib import Path
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
api = HfApi()
repo, folder = args
url = api.create_repo(repo, private=True)
out["again"] = api.create_repo(repo, private=True, exist_ok=True) == url
before = api.model_info(repo)
api.create_branch(repo, branch="runs/a")
commit = api.upload_folder(repo_id=repo, folder_path=folder, revision="runs/a")
api.create_tag(repo, tag="v1", revision="runs/a")
branch, main = api.model_info(repo, revision="v1"), api.model_info(repo)
out["private"] = main.private
out["commits"] = [before.sha == main.sha, branch.sha == commit.oid, len(commit.oid), commit.oid != main.sha]
out["lfs"] = {f.path: f.lfs is not None for f in api.list_repo_tree(repo, recursive=True, revision="v1") if
              hasattr(f, "lfs")}
out["main"] = api.list_repo_files(repo)
out["refs"] = [ref.name for ref in api.list_repo_refs(repo).branches]
out["found"] = [info.path for info in api.get_paths_info(repo, ["sub", "card.md", "no"], revision="v1")]
names = sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file())
local = Path(snapshot_download(repo, revision="runs/a"))
out["same"] = [(local / n).read_bytes() == (Path(folder) / n).read_bytes() for n in names]
one = hf_hub_download(repo, "card.md", revision=commit.oid)
out["one"] = Path(one).read_bytes() == (Path(folder) / "card.md").read_bytes()
out["second"] = api.upload_folder(repo_id=repo, folder_path=folder, revision="runs/a").oid == commit.oid
"""


def test_private_repository_with_a_branch(hub, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "card.md").write_text("text\n")
    (tmp_path / "sub" / "model.safetensors").write_bytes(bytes(range(256)))
    (tmp_path / "large.txt").write_bytes(b"0123456789abcdef" * 700_000)
    out = client(hub, UPLOAD, "standin/policy", tmp_path)
    assert out == {
        "again": True,
        "private": True,
        "commits": [True, True, 40, True],
        "lfs": {".gitattributes": False, "card.md": False, "large.txt": True, "sub/model.safetensors": True},
        "main": [".gitattributes"],
        "refs": ["main", "runs/a"],
        "found": ["sub", "card.md"],
        "same": [True, True, True],
        "one": True,
        "second": True,  # nothing has changed, so there is no new commit
    }
    log = hub.requests()
    assert ("POST", "/api/models/standin/policy/commit/runs%2Fa", 200) in log
    assert [status for method, path, status in log if path == "/api/repos/create"] == [200, 409]
    assert sum(method == "PUT" and path.startswith("/_lfs/") for method, path, _ in log) == 2


TOKENS = """
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
calls = {
    "whoami": lambda: HfApi().whoami()["name"],
    "create": lambda: str(HfApi().create_repo("standin/" + args[0])),
    "commit": lambda: HfApi().upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="standin/secret"),
    "read": lambda: HfApi().model_info("standin/secret").private,
}
for name, call in calls.items():
    try:
        out[name] = call()
    except HfHubHTTPError as error:
        out[name] = [error.response.status_code, type(error).__name__]
    except OSError as error:
        out[name] = type(error).__name__
"""


def test_tokens(hub):
    client(hub, "from huggingface_hub import create_repo\ncreate_repo('standin/secret', private=True)")
    refused, hidden = [401, "HfHubHTTPError"], [401, "RepositoryNotFoundError"]
    out = client(hub, TOKENS, "bad", token="hf_wrong")
    assert out == {name: refused for name in ("whoami", "create", "commit", "read")}
    out = client(hub, TOKENS, "none", token=None)
    assert out == {"whoami": "LocalTokenNotFoundError", "create": refused, "commit": refused, "read": hidden}
    out = client(hub, TOKENS, "readonly", token=READ_ONLY_TOKEN)
    forbidden = [403, "HfHubHTTPError"]
    assert out == {"whoami": "standin", "create": forbidden, "commit": forbidden, "read": True}


COMMIT = """
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
import httpx2
api = HfApi()
api.create_repo(args[0], exist_ok=True)
for attempt in ("first", "second"):
    try:
        api.upload_file(path_or_fileobj=b"x", path_in_repo="x.json", repo_id=args[0])
        out[attempt] = "done"
    except HfHubHTTPError as error:
        out[attempt] = error.response.status_code
    except httpx2.RemoteProtocolError:
        out[attempt] = "closed"
"""


@pytest.mark.parametrize("status, seen", [(503, 503), (0, "closed")])
def test_fault_at_the_commit(hub, status, seen):
    start = len(hub.requests())
    hub.fault("/commit/", method="POST", status=status)
    assert client(hub, COMMIT, f"standin/fault{status}") == {"first": seen, "second": "done"}
    commits = [entry for entry in hub.requests()[start:] if "/commit/" in entry[1]]
    assert [entry[2] for entry in commits] == [status, 200]


def test_hang_and_clear(hub):
    script = "import time, huggingface_hub as h\nt = time.time()\ntry: h.HfApi().whoami()\nexcept h.errors.HfHubHTTPError: out = time.time() - t"
    hub.fault("/whoami", times=-1, status=403, hang=1.5)
    assert client(hub, script) >= 1.5
    hub.clear()
    assert client(hub, script) == {}


DATASET = """
from pathlib import Path
import datasets
from huggingface_hub import HfApi
rows = [{"prompt": "p", "chosen": "a" * n, "rejected": "b"} for n in range(5)]
folder = Path(args[1])
datasets.Dataset.from_list(rows).to_parquet(folder / "train.parquet")
api = HfApi()
api.create_repo(args[0], repo_type="dataset", private=True)
old = api.upload_folder(repo_id=args[0], folder_path=folder, repo_type="dataset").oid
(folder / "train.parquet").unlink()
(folder / "train.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows[:2]))
api.upload_folder(repo_id=args[0], folder_path=folder, repo_type="dataset", delete_patterns="*.parquet")
load = datasets.load_dataset
out["new"] = load(args[0], split="train").to_list() == rows[:2]
out["old"] = load(args[0], split="train", revision=old).to_list() == rows
out["stream"] = list(load(args[0], split="train", revision=old, streaming=True)) == rows
for name, options in {
    "split": {"split": "nope"}, "revision": {"revision": "nope"}, "missing": {"path": "someone/missing"}
}.items():
    try:
        load(**{"path": args[0], **options})
    except Exception as error:
        out[name] = [type(error).__name__, str(error).splitlines()[0]]
"""


def test_load_dataset(hub, tmp_path):
    out = client(hub, DATASET, "someone/prefs", tmp_path)
    assert out.pop("split") == ["ValueError", "Unknown split \"nope\". Should be one of ['train']."]
    assert out.pop("revision")[0] == out.pop("missing")[0] == "DatasetNotFoundError"
    assert out == {"new": True, "old": True, "stream": True}


def test_a_root_outlives_the_process(tmp_path):
    with HubStandin(root=tmp_path) as hub:
        client(hub, COMMIT, "standin/kept")
    with HubStandin(root=tmp_path) as hub:
        script = "import huggingface_hub as h\nout = open(h.hf_hub_download('standin/kept', 'x.json')).read()"
        assert client(hub, script) == "x"
