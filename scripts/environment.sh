# Sourced by the other scripts: sets PYTHON to one that has the requirements of the file named in $1.
# The active python is used if it has them; otherwise .venv is made in the repository and filled, once.

python_has() {  # are all pinned packages of file $2 importable as installed distributions of python $1?
    "$1" - "$2" <<'PY' 2>/dev/null
import sys
from importlib.metadata import version
from pathlib import Path

def pins(path):
    for line in Path(path).read_text().splitlines():
        line = line.partition("#")[0].strip()
        if line.startswith("-r"):
            yield from pins(Path(path).parent / line[2:].strip())
        elif line:
            yield line.split("==")

assert sys.version_info >= (3, 11)
for name, wanted in pins(sys.argv[1]):
    # a GPU image may bring another torch (and local build tags such as 2.13.0+cpu are fine)
    assert name == "torch" and version(name) or version(name).partition("+")[0] == wanted
PY
}

set_up_python() {
    choose_python "$1"
    # what DeepSpeed compiles for NVMe offload it compiles with the ninja that was installed beside it
    PATH="$("$PYTHON" -c 'import sys; print(sys.prefix)')/bin:$PATH"
}

choose_python() {
    local requirements=$1 candidate
    for candidate in "${PYTHON:-}" .venv/bin/python python3 python; do
        if [[ -n $candidate ]] && python_has "$candidate" "$requirements"; then
            PYTHON=$candidate
            return
        fi
    done
    local base=""
    for candidate in python3.13 python3.12 python3.11 python3; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            base=$candidate
            break
        fi
    done
    if [[ -z $base ]]; then
        echo "error: no Python 3.11 or newer on the PATH; install one, or set PYTHON to one that has $requirements" >&2
        exit 1
    fi
    [[ -x .venv/bin/python ]] || "$base" -m venv .venv
    PYTHON=.venv/bin/python
    echo "installing $requirements into .venv (a few minutes, once)" >&2
    # torch first and by itself: its exact version decides which build the others accept
    "$PYTHON" -m pip install --quiet --disable-pip-version-check "$(grep -o '^torch==[^ ]*' requirements.txt)"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$requirements"
}
