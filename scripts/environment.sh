# Sourced by the other scripts: sets PYTHON to one that has the requirements of the file named in $1.
# The active python is used if it has them; otherwise .venv is made in the repository and filled, by one of however many
# scripts and nodes ask for it at the same time. The others wait.
#
# Who fills it makes the folder .venv.fills/NUMBER, the next after the last. A folder is made by one alone, on NFS too, and as
# none is ever removed, no number is taken twice. In it stand
#   owner   process and host
#   beat    a number that grows each second. Where it stays the same for LOOKS looks, who fills is dead; nobody reads the
#           clock of another host.
#   ended   written last: `whole`, or `torn` if it failed or was stopped. Until then .venv is nobody's python.
FILLS=.venv.fills
LOOK_SECONDS=${LOOK_SECONDS:-1}
LOOKS=90

set_up_python() {
    choose_python "$1"
    # what DeepSpeed compiles for NVMe offload it compiles with the ninja that was installed beside it
    PATH="$("$PYTHON" -c 'import sys; print(sys.prefix)')/bin:$PATH"
}

choose_python() {
    local last running
    while true; do
        find_last_fill
        if (( last > 0 )) && [[ ! -e $FILLS/$last/ended ]]; then running=1; else running=0; fi
        if find_python "$1"; then return; fi
        if (( running )) && wait_for_fill; then continue; fi
        { mkdir -p $FILLS && echo '*' > $FILLS/.gitignore; } 2>/dev/null || true
        if mkdir "$FILLS/$((last + 1))" 2>/dev/null; then
            fill_venv "$1" || exit
            PYTHON=.venv/bin/python
            return
        elif [[ ! -d $FILLS/$((last + 1)) ]]; then
            echo "error: no python here has the packages of $1, and $PWD/$FILLS cannot be written to make a .venv" >&2
            exit 1
        fi
    done
}

find_python() {  # sets PYTHON to the first candidate that has the packages of file $1 and is not being filled
    local candidate last whole
    for candidate in "${PYTHON:-}" .venv/bin/python python3 python; do
        [[ -n $candidate ]] || continue
        find_last_fill
        if fill_is_whole "$last"; then whole=yes; else whole=no; fi
        if python_has "$candidate" "$1" $whole; then
            PYTHON=$candidate
            return
        fi
    done
    return 1
}

# Are all pinned packages of file $2 importable as installed distributions of python $1? If $3 is no, .venv does not count.
python_has() {
    "$1" - "$2" "$3" <<'PY' 2>/dev/null
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
assert sys.argv[2] == "yes" or Path(sys.prefix).resolve() != Path(".venv").resolve()
for name, wanted in pins(sys.argv[1]):
    # a GPU image may bring another torch (and local build tags such as 2.13.0+cpu are fine)
    assert name == "torch" and version(name) or version(name).partition("+")[0] == wanted
PY
}

find_last_fill() {  # sets last to the highest number in FILLS, or 0
    local folder
    last=0
    for folder in "$FILLS"/*; do
        folder=${folder##*/}
        if [[ $folder =~ ^[1-9][0-9]*$ ]] && (( folder > last )); then last=$folder; fi
    done
}

fill_is_whole() {  # did fill $1 end well? 0 stands for what was there before any fill, made by hand or by a container
    (( $1 == 0 )) || [[ $(cat "$FILLS/$1/ended" 2>/dev/null) == whole ]]
}

wait_for_fill() {  # until fill number $last has ended; status 1 if it is dead
    local owner beat before="" same=0 looks=0
    while [[ ! -e $FILLS/$last/ended ]]; do
        owner=$(cat "$FILLS/$last/owner" 2>/dev/null) || owner="another process"
        beat=$(cat "$FILLS/$last/beat" 2>/dev/null) || beat=none
        if (( looks++ % 30 == 0 )); then echo "waiting for $owner, which fills $PWD/.venv" >&2; fi
        if [[ $beat != "$before" ]]; then same=0 before=$beat; fi
        if (( ++same > LOOKS )); then
            echo "$owner, which filled $PWD/.venv, is dead: it was not heard of for $LOOKS looks; going on in its place" >&2
            return 1
        fi
        sleep "$LOOK_SECONDS"
    done
}

# Fill .venv with the packages of file $1, as fill number last + 1. A process of its own: the caller's traps stay as they are.
fill_venv() (
    mine=$FILLS/$((last + 1)) ended=torn beats=0
    filler=$(exec sh -c 'echo $PPID')
    trap end_fill EXIT
    trap 'exit 130' INT
    trap 'exit 143' HUP TERM USR1
    echo "process $$ on $(uname -n)" > "$mine/owner" || exit
    if [[ -e .venv ]] && ! fill_is_whole "$last" && ! venv_is_whole; then
        echo "$PWD/.venv was left half-filled; it is made again" >&2
        fill_by rm -rf .venv
    fi
    if ! python_has .venv/bin/python "$1" yes; then
        if [[ ! -x .venv/bin/python ]]; then
            find_base "$1"
            fill_by "$base" -m venv .venv
        fi
        echo "installing $1 into .venv (a few minutes, once)" >&2
        # torch first and by itself: its exact version decides which build the others accept
        fill_by .venv/bin/python -m pip install --quiet --disable-pip-version-check \
            "$(grep -o '^torch==[^ ]*' requirements.txt)"
        fill_by .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$1"
    fi
    ended=whole
)

# Run a command, one step of a fill, while its beat goes on; what fails ends the fill with its status.
fill_by() {
    local child status=0
    "$@" &
    child=$!
    # pip does not go on where nobody says that it does
    (while kill -0 $child && kill -0 $filler; do sleep 1; done; kill -0 $filler || kill $child) > /dev/null 2>&1 &
    while kill -0 $child 2>/dev/null; do
        echo $((++beats)) > "$mine/beat"
        if [[ -d $FILLS/$((last + 2)) ]]; then
            echo "error: this process was not heard of for long, and another one fills $PWD/.venv; start it again" >&2
            exit 1
        fi
        kill -0 $$ 2>/dev/null || exit 1  # the script itself was killed
        sleep "$LOOK_SECONDS"
    done
    wait $child || status=$?
    if (( status != 0 )); then
        echo "error: '$*' failed ($status), and no python here has the packages that are asked for; see above why (no network?)" \
            "and start again; in a container, build the image again" >&2
        exit $status
    fi
}

end_fill() {
    trap '' HUP INT TERM USR1
    { kill $(jobs -p); wait; } 2>/dev/null || true
    echo $ended > "$mine/ended.new" && mv "$mine/ended.new" "$mine/ended"
}

# Are all files there of what is installed? The wheel's list of them is unpacked early; pip replaces it last of all, after
# the commands in bin, by one that names its INSTALLER too.
venv_is_whole() {
    .venv/bin/python -I - <<'PY' 2>/dev/null
from importlib.metadata import distributions, version

version("pip")
for distribution in distributions():
    assert "INSTALLER" in {file.name for file in distribution.files}
    for file in distribution.files:
        assert file.size is None or file.locate().stat().st_size == file.size
PY
}

find_base() {  # sets base to a python that can make a .venv
    for base in python3.13 python3.12 python3.11 python3; do
        if "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then return; fi
    done
    echo "error: no Python 3.11 or newer on the PATH; install one, or set PYTHON to one that has $1" >&2
    exit 1
}
