"""A stand-in for the Hugging Face Hub, for tests that must not reach the network.

The real clients (huggingface_hub, datasets, transformers) work against it when HF_ENDPOINT points at
it, and they must be started with the environment of `HubStandin.env`, because they read it on import:

    with HubStandin() as hub:
        subprocess.run([sys.executable, "-c", script], env=hub.env(), check=True)

It covers model and dataset repositories: creating them, branches, tags, commits of regular and LFS
files, listings, downloads with ranges, private repositories, and tokens that may write or only read.
Every namespace belongs to the one user, "standin". Faults are armed with `HubStandin.fault` and the
traffic is read with `HubStandin.requests`. Everything lies below one folder (--root), which may be used
again by a later process; without it a temporary folder lasts as long as the process.

Not covered: Xet, Spaces, pull requests and discussions, the list of commits, multipart LFS uploads,
paging (a listing is always one page), deleting or changing repositories and references, what the Hub
derives from a repository (card data, tags, the dataset viewer, last commit per file), rate limits,
gated repositories (but a fault may say GatedRepo).
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

USER = "standin"
TOKEN = "hf_standin"
READ_ONLY_TOKEN = "hf_standin_read_only"
CHUNK = 1 << 20

# The Hub stores a file as LFS when it is larger than 10 MB or when .gitattributes says so.
LFS_SIZE = 10_000_000
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".parquet", ".arrow", ".npz", ".gz", ".zip")
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)


class HubError(Exception):
    """An answer other than success; the client turns `code` (X-Error-Code) into its exception types."""

    def __init__(self, status, message, code=None, headers=None, **extra):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **(headers or {})}
        if code:
            self.headers["X-Error-Code"] = code
        self.body = {"error": message, **extra}


def now():
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())


def lfs_pointer(sha256, size):
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def file_info(path, file):
    info = {"type": "file", "path": path, "size": file["size"], "oid": file["oid"]}
    if file["lfs"]:
        pointer_size = len(lfs_pointer(file["sha256"], file["size"]))
        info["lfs"] = {"oid": file["sha256"], "size": file["size"], "pointerSize": pointer_size}
    return info


def folder_info(path):
    return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}


class Store:
    """The repositories (one JSON file) and the contents of their files (named by SHA-256) in a folder."""

    def __init__(self, root):
        self.lock = threading.RLock()
        self.blobs = root / "blobs"
        self.blobs.mkdir(parents=True, exist_ok=True)
        self.state = root / "repos.json"
        self.repos = json.loads(self.state.read_text()) if self.state.exists() else {}

    def save(self):
        # Written aside and renamed, so that a process killed here leaves a readable state behind.
        aside = self.state.with_suffix(".tmp")
        aside.write_text(json.dumps(self.repos))
        aside.replace(self.state)

    def put_blob(self, chunks):
        digest = hashlib.sha256()
        with tempfile.NamedTemporaryFile(dir=self.blobs, delete=False) as out:
            for chunk in chunks:
                digest.update(chunk)
                out.write(chunk)
        os.replace(out.name, self.blobs / digest.hexdigest())
        return digest.hexdigest()

    def file(self, sha256, lfs):
        blob = self.blobs / sha256
        if not blob.is_file():
            raise HubError(400, f"LFS object {sha256} has not been uploaded")
        size = blob.stat().st_size
        content = lfs_pointer(sha256, size) if lfs else blob.read_bytes()
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return {"sha256": sha256, "size": size, "lfs": lfs, "oid": oid}

    def create(self, key, private):
        repo = {"private": private, "createdAt": now(), "branches": {}, "tags": {}, "commits": {}}
        attributes = self.file(self.put_blob([GITATTRIBUTES.encode()]), lfs=False)
        self.repos[key] = repo
        self.commit(repo, "main", "initial commit", {".gitattributes": attributes})

    def commit(self, repo, branch, title, files):
        oid = secrets.token_hex(20)
        parent = repo["branches"].get(branch)
        repo["commits"][oid] = {"parent": parent, "title": title, "date": now(), "files": files}
        repo["branches"][branch] = oid
        self.save()
        return oid

    def find_commit(self, repo, rev):
        """The commit that a branch, a tag or a commit id (at least 7 digits of it) stands for."""
        for names in (repo["branches"], repo["tags"]):
            if rev in names:
                return names[rev]
        found = [oid for oid in list(repo["commits"]) if len(rev) >= 7 and oid.startswith(rev)]
        if len(found) != 1:
            raise HubError(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        return found[0]

    def apply(self, files, key, value):
        """Apply one operation of a commit to `files` (path -> file)."""
        path = value["path"]
        if key == "file":
            files[path] = self.file(self.put_blob([base64.b64decode(value["content"])]), lfs=False)
        elif key == "lfsFile":
            files[path] = self.file(value["oid"], lfs=True)
        elif key == "deletedFile" and path in files:
            del files[path]
        elif key == "deletedFolder":
            for name in [name for name in files if name.startswith(path.rstrip("/") + "/")]:
                del files[name]
        else:
            raise HubError(404, f"{key}: A file with this name doesn't exist: {path}", "EntryNotFound")


REPO = r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)"
PAGE = r"/((?P<kind>datasets)/)?(?P<name>[^/]+/[^/]+?)"
REV = r"(?P<rev>[^/]+)"
# Method, path, name of the handler and the role that the token must have. To upload an LFS object the
# client sends no token: the address is signed instead.
ROUTES = [
    (method, re.compile(pattern), handler, role)
    for method, pattern, handler, role in [
        ("GET", r"/api/whoami-v2", "whoami", "read"),
        ("POST", r"/api/validate-yaml", "validate_yaml", "none"),
        ("POST", r"/api/repos/create", "create_repo", "write"),
        ("GET", rf"{REPO}(/revision/{REV})?", "info", "none"),
        ("GET", rf"{REPO}/refs", "refs", "none"),
        ("GET", rf"{REPO}/tree/{REV}(/(?P<path>.+))?", "tree", "none"),
        ("POST", rf"{REPO}/paths-info/{REV}", "paths_info", "none"),
        ("POST", rf"{REPO}/branch/{REV}", "create_branch", "write"),
        ("POST", rf"{REPO}/tag/{REV}", "create_tag", "write"),
        ("POST", rf"{REPO}/preupload/{REV}", "preupload", "write"),
        ("POST", rf"{REPO}/commit/{REV}", "commit", "write"),
        ("POST", rf"{PAGE}\.git/info/lfs/objects/batch", "lfs_batch", "write"),
        ("PUT", r"/_lfs/(?P<oid>[0-9a-f]{64})", "lfs_put", "none"),
        ("POST", r"/_lfs/verify", "lfs_verify", "write"),
        ("GET", rf"{PAGE}/resolve/{REV}/(?P<path>.+)", "download", "none"),
        ("HEAD", rf"{PAGE}/resolve/{REV}/(?P<path>.+)", "download", "none"),
    ]
]
# The client asks for this list once per process, whatever it does, and does without it. It is kept out
# of the log and of the faults, so that both see only what a test is about.
UNASKED = "/api/agent-harnesses"
# What `HubStandin.fault` takes, with its defaults.
NO_FAULT = {"method": None, "status": None, "times": 1, "hang": 0, "code": None, "cut": None, "spoil": False}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # the head and the body are sent apart; waiting would cost 40 ms

    def handle_request(self):
        url = urlsplit(self.path)
        self.url_path, self.query, self.body = url.path, parse_qs(url.query), self.read_chunks()
        self.fault = None
        try:
            if url.path in ("/_control", "/_requests", UNASKED):
                self.reply_json(self.control(url.path))
            elif not self.meet_fault():
                self.dispatch()
        except HubError as error:
            self.reply_json(error.body, error.status, error.headers)
        except ConnectionError:
            raise
        except Exception:
            traceback.print_exc()
            self.reply_json({"error": "the stand-in failed, see its stderr"}, 500)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def dispatch(self):
        for method, pattern, handler, needed in ROUTES:
            match = pattern.fullmatch(self.url_path)
            if match and method == self.command:
                self.check_role(needed)
                groups = {name: unquote(text) for name, text in match.groupdict().items() if text}
                answer = getattr(self, handler)(**groups)
                if answer is not None:
                    self.reply_json(answer)
                return
        raise HubError(404, f"Not part of the stand-in: {self.command} {self.url_path}")

    # What the helper class asks for.

    def control(self, path):
        server = self.server
        if path == "/_requests":
            return list(server.log)
        if path == UNASKED:
            return {"standardEnvVars": [], "harnesses": {}}
        order = self.read_json()
        with server.store.lock:
            if order.get("clear"):
                server.faults.clear()
            else:
                server.faults.append({**NO_FAULT, **order})
        return {}

    def meet_fault(self):
        """Act on the first armed fault that matches; True if that was all the client gets."""
        with self.server.store.lock:
            for fault in self.server.faults:
                matches = fault["match"] in self.url_path and fault["method"] in (None, self.command)
                if matches and fault["times"]:
                    fault["times"] -= 1  # a negative count never comes to 0: such a fault stays for ever
                    break
            else:
                return False
        if fault["cut"] is None:
            time.sleep(fault["hang"])
        if fault["status"] is None:
            self.fault = fault
            return False
        if fault["status"]:
            raise HubError(fault["status"], "injected fault", fault["code"])
        self.drain()
        self.log_request(0)
        self.close_connection = True
        return True

    # Requests and answers.

    def read_chunks(self):
        """The request body; the client sends it in chunks when it does not know the length."""
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        left = int(self.headers.get("Content-Length", 0))
        while left and (chunk := self.rfile.read(min(left, CHUNK))):
            left -= len(chunk)
            yield chunk

    def read_json(self):
        return json.loads(b"".join(self.body))

    def drain(self):
        """Read what is left of the body: the connection is used again for the next request."""
        for _ in self.body:
            pass

    def reply_json(self, value, status=200, headers=None):
        data = json.dumps(value).encode()
        head = {"Content-Type": "application/json", "Content-Length": len(data)}
        self.reply_head(status, head | (headers or {}))
        if self.command != "HEAD":
            self.wfile.write(data)

    def reply_head(self, status, headers):
        self.drain()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def log_request(self, code="-", size="-"):
        # Called before the answer is sent, so that a client that has its answer finds it in the log.
        # The query is left out: it holds the signature of LFS uploads.
        if self.url_path not in ("/_control", "/_requests", UNASKED):
            self.server.log.append((self.command, self.url_path, int(code)))

    def log_message(self, *_):
        """The log is kept for `requests`, not printed."""

    # Who asks, and for which repository.

    def find_role(self):
        if "Authorization" not in self.headers:
            return "none"
        token = self.headers["Authorization"].removeprefix("Bearer ")
        if token not in self.server.tokens:
            # Like the Hub, which refuses an unknown token even where none is needed.
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.server.tokens[token]

    def check_role(self, needed):
        self.role = self.find_role()
        if needed in ("read", "write") and self.role == "none":
            raise HubError(401, "Invalid username or password.")
        if needed == "write" and self.role == "read":
            raise HubError(403, "This token may only read: use one that may write")

    def find_repo(self, kind, name):
        repo = self.server.store.repos.get(f"{kind}/{name}")
        if repo is None or (repo["private"] and self.role == "none"):
            # Like the Hub, which does not tell strangers what exists.
            raise HubError(401 if self.role == "none" else 404, "Repository not found", "RepoNotFound")
        return repo

    def find_files(self, kind, name, rev):
        repo = self.find_repo(kind, name)
        return repo["commits"][self.server.store.find_commit(repo, rev)]["files"]

    def page_url(self, kind, name):
        return f"{self.server.endpoint}/{'' if kind == 'models' else kind + '/'}{name}"

    # The account and the repositories.

    def whoami(self):
        token = {"displayName": "tests", "role": self.role}
        auth = {"type": "access_token", "accessToken": token}
        return {"type": "user", "id": "0" * 24, "name": USER, "fullname": USER, "orgs": [], "auth": auth}

    def validate_yaml(self):
        return {"errors": [], "warnings": []}

    def create_repo(self):
        order, store = self.read_json(), self.server.store
        kind = order.get("type", "model") + "s"
        name = f"{order.get('organization') or USER}/{order['name']}"
        url = self.page_url(kind, name)
        with store.lock:
            if f"{kind}/{name}" in store.repos:
                raise HubError(409, "You already created this repo", url=url)
            store.create(f"{kind}/{name}", private=order.get("visibility") == "private")
        return {"url": url, "name": name}

    def info(self, kind, name, rev="main"):
        repo = self.find_repo(kind, name)
        sha = self.server.store.find_commit(repo, rev)
        commit = repo["commits"][sha]
        # The client takes most of the other fields as optional.
        return {
            "id": name,
            "author": name.split("/")[0],
            "sha": sha,
            "private": repo["private"],
            "gated": False,
            "disabled": False,
            "createdAt": repo["createdAt"],
            "lastModified": commit["date"],
            "tags": [],
            "siblings": [{"rfilename": path} for path in commit["files"]],
        }

    def refs(self, kind, name):
        repo = self.find_repo(kind, name)
        found = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
        for group, folder in (("branches", "heads"), ("tags", "tags")):
            for ref, oid in list(repo[group].items()):
                found[group].append({"name": ref, "ref": f"refs/{folder}/{ref}", "targetCommit": oid})
        return found

    def create_branch(self, kind, name, rev):
        return self.add_ref(kind, name, "branches", rev, self.read_json().get("startingPoint") or "main")

    def create_tag(self, kind, name, rev):
        return self.add_ref(kind, name, "tags", self.read_json()["tag"], rev)

    def add_ref(self, kind, name, group, ref, rev):
        repo, store = self.find_repo(kind, name), self.server.store
        with store.lock:
            if ref in repo[group]:
                raise HubError(409, f"Reference already exists: {ref}")
            repo[group][ref] = store.find_commit(repo, rev)
            store.save()
        return {}

    # Writing files.

    def preupload(self, kind, name, rev):
        known = self.find_files(kind, name, rev)
        answers = []
        for file in self.read_json()["files"]:
            lfs = file["size"] > LFS_SIZE or file["path"].endswith(LFS_SUFFIXES)
            answer = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if old := known.get(file["path"]):
                # The client leaves a file out of the commit when this equals what it is about to send.
                answer["oid"] = old["sha256"] if old["lfs"] else old["oid"]
            answers.append(answer)
        return {"files": answers}

    def lfs_batch(self, name, kind="models"):
        self.find_repo(kind, name)
        server, objects = self.server, []
        for item in self.read_json()["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if not (server.store.blobs / item["oid"]).exists():  # no actions: nothing is left to upload
                upload = {"href": f"{server.endpoint}/_lfs/{item['oid']}?signature={server.signature}"}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{server.endpoint}/_lfs/verify"}}
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, oid):
        if self.query.get("signature") != [self.server.signature]:
            raise HubError(403, "The address of this upload is not signed")
        if self.server.store.put_blob(self.body) != oid:
            raise HubError(400, "The content does not match its SHA-256")
        return {}

    def lfs_verify(self):
        order = self.read_json()
        if self.server.store.file(order["oid"], lfs=True)["size"] != order["size"]:
            raise HubError(400, "The size does not match")
        return {}

    def commit(self, kind, name, rev):
        repo, store = self.find_repo(kind, name), self.server.store
        if "create_pr" in self.query:
            raise HubError(501, "Pull requests are not part of the stand-in")
        (_, header), *operations = [json.loads(line).values() for line in b"".join(self.body).splitlines()]
        with store.lock:
            if rev not in repo["branches"]:
                raise HubError(404, f"Invalid rev id: {rev}", "RevisionNotFound")
            head = repo["branches"][rev]
            if not head.startswith(header.get("parentCommit", "")):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            files = dict(repo["commits"][head]["files"])
            for key, value in operations:
                store.apply(files, key, value)
            oid = store.commit(repo, rev, header["summary"], files)
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.page_url(kind, name)}/commit/{oid}"}

    # Reading files.

    def tree(self, kind, name, rev, path=None):
        files, entries = self.find_files(kind, name, rev), {}
        recursive = self.query.get("recursive") == ["true"]
        prefix = f"{path}/" if path else ""
        for file in sorted(file for file in files if file.startswith(prefix)):
            parts = file[len(prefix) :].split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                folder = prefix + "/".join(parts[:depth])
                entries[folder] = folder_info(folder)
            if recursive or len(parts) == 1:
                entries[file] = file_info(file, files[file])
        if path and not entries:
            raise HubError(404, f"{path} does not exist on {rev}", "EntryNotFound")
        return list(entries.values())

    def paths_info(self, kind, name, rev):
        files, answers = self.find_files(kind, name, rev), []
        for path in parse_qs(b"".join(self.body).decode()).get("paths", []):
            if path in files:
                answers.append(file_info(path, files[path]))
            elif any(file.startswith(path + "/") for file in files):
                answers.append(folder_info(path))
        return answers

    def download(self, name, rev, path, kind="models"):
        repo = self.find_repo(kind, name)
        commit = self.server.store.find_commit(repo, rev)
        headers = {"X-Repo-Commit": commit}
        file = repo["commits"][commit]["files"].get(path)
        if file is None:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        etag = '"{}"'.format(file["sha256"] if file["lfs"] else file["oid"])
        headers |= {"ETag": etag, "Accept-Ranges": "bytes"}
        if file["lfs"]:
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": file["size"]}
        self.send_file(self.server.store.blobs / file["sha256"], file["size"], headers)

    def send_file(self, blob, size, headers):
        status, start, stop = 200, 0, size
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            status, start, stop = 206, int(match[1]), min(size, int(match[2] or size) + 1)
            if start >= size:
                raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        self.reply_head(status, {**headers, "Content-Length": stop - start})
        if self.command == "HEAD":
            return
        fault = self.fault or NO_FAULT
        cut = stop if fault["cut"] is None else min(stop, start + fault["cut"])
        with blob.open("rb") as source:
            source.seek(start)
            while start < cut:
                chunk = source.read(min(CHUNK, cut - start))
                self.wfile.write(bytes([chunk[0] ^ 1]) + chunk[1:] if fault["spoil"] else chunk)
                start += len(chunk)
        if cut < stop:
            time.sleep(fault["hang"])
            self.close_connection = True


class Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # that is a client that has gone away
            super().handle_error(request, client_address)


def stop_on_eof():
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)


def main():
    parser = argparse.ArgumentParser(description="A stand-in for the Hugging Face Hub on 127.0.0.1.")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one; the address is printed")
    parser.add_argument("--root", type=Path, help="keep the repositories in this folder")
    parser.add_argument("--token", default=TOKEN, help="the token that may read and write")
    parser.add_argument("--read-only-token", help="a token that may only read")
    parser.add_argument("--stop-on-eof", action="store_true", help="stop when standard input is closed")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the temporary folder is removed
    if args.stop_on_eof:
        threading.Thread(target=stop_on_eof, daemon=True).start()
    with tempfile.TemporaryDirectory(prefix="hub-standin-") as folder:
        server = Server(("127.0.0.1", args.port), Handler)
        server.endpoint = f"http://127.0.0.1:{server.server_port}"
        server.store = Store(args.root or Path(folder))
        server.tokens = {args.read_only_token: "read", args.token: "write"}
        server.signature, server.faults, server.log = secrets.token_hex(8), [], []
        print(server.endpoint, flush=True)
        server.serve_forever()


class HubStandin:
    """Runs the stand-in in a process of its own for the length of a `with` block."""

    def __init__(self, token=TOKEN, read_only_token=READ_ONLY_TOKEN, root=None):
        self.command = [sys.executable, __file__, "--stop-on-eof", "--token", token]
        self.command += ["--read-only-token", read_only_token]
        self.command += ["--root", str(root)] if root else []

    def __enter__(self):
        self._homes = tempfile.TemporaryDirectory(prefix="hub-standin-homes-")
        # The pipe to its standard input ends with this process, also if this process is killed.
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(self.command, stdin=pipe, stdout=pipe, text=True)
        self.endpoint = self._process.stdout.readline().strip()
        if not self.endpoint:
            self.__exit__()
            raise RuntimeError("the stand-in for the Hub did not start, see its stderr")
        self.requests()
        return self

    def __exit__(self, *_):
        self._process.communicate()  # closes its standard input, which ends it
        self._homes.cleanup()

    def env(self, token=TOKEN):
        """The environment of a client process, with an HF_HOME of its own; no token if `token` is None."""
        foreign = ("HF_", "HUGGING", "TRANSFORMERS_")
        env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        env |= {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": tempfile.mkdtemp(dir=self._homes.name),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            # These would go to addresses outside of HF_ENDPOINT.
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        return env | ({"HF_TOKEN": token} if token else {})

    def fault(self, match, **how):
        """Arm a fault for the next `times` requests whose path contains `match` (-1: for all) and whose verb is `method`.

        They wait for `hang` seconds; then they get `status`, with `code` to tell what kind of error it is (0: the
        connection is closed without an answer), or their usual answer if `status` is None. A file's usual answer
        has a bit turned in every block if `spoil`, and ends after `cut` bytes, the hang and a closed connection.
        """
        assert set(how) <= set(NO_FAULT), how
        self._call("/_control", {"match": match, **how})

    def clear(self):
        """Disarm all faults."""
        self._call("/_control", {"clear": True})

    def requests(self):
        """All requests so far as (method, path without its query, status); 0 for a closed connection."""
        return [tuple(entry) for entry in self._call("/_requests")]

    def _call(self, path, order=None):
        data = None if order is None else json.dumps(order).encode()
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(self.endpoint + path, data, timeout=10) as answer:
            return json.load(answer)


if __name__ == "__main__":
    main()
