# shellcheck shell=bash
# The environment of every script here:
#
#     source launch/env.sh        make .venv if need be, then enter it
#     bash launch/env.sh          only make it
#
# The first time it creates .venv, installs the versions pinned in launch/constraints.txt and compiles the
# extension; later it does nothing, or only compiles when csrc/ has changed. Needs Python 3.10 to 3.13 and,
# for the compiled ops, a C++ compiler.
#
#     SOLAR_MEGA_PYTHON=/path/to/python   the Python to build on. If it has its own torch (a container's, a
#                                         cluster module's) that torch is used, and none is installed.
#     SOLAR_MEGA_CUDA=0|1                 never | always build the CUDA ops (default: when nvcc is there)

if [ -z "${BASH_VERSION:-}" ]; then
    echo "launch/env.sh: needs bash; start bash first" >&2
    return 1
fi

if [[ "${BASH_SOURCE[0]}" != "$0" ]]; then
    # Sourced: the work happens in a child, so that it cannot end or reconfigure the caller's shell.
    bash "${BASH_SOURCE[0]}" || return 1
    # shellcheck source=/dev/null
    source "$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/activate" || return 1
    # Megatron overlaps tensor-parallel communication with compute only if kernels start in the order queued.
    export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
    # Tokenizers' own threads would fight with our worker processes. (OMP_NUM_THREADS is left alone: for training,
    # train.threads decides.)
    export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
    return 0
fi

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
venv=$root/.venv
stamp=$venv/solar_mega.stamp
log=$root/build/env.log

say() { echo "[env] $*"; }

fail() {
    printf '[env] error: %s\n' "$@" >&2
    exit 1
}

digest() {
    if command -v sha256sum > /dev/null; then sha256sum; else shasum -a 256; fi | cut -c1-16
}

# quietly WHAT COMMAND...: as attempt; on failure the end of the log, and exit.
quietly() {
    attempt "$@" && return
    tail -n 25 "$log" >&2
    fail "$1 failed; all of its output is in $log"
}

# attempt WHAT COMMAND...: output goes to the log; a sign of life every 20 seconds.
attempt() {
    local what=$1 began=$SECONDS beat=20 child
    shift
    printf '\n== %s: %s\n' "$what" "$*" >> "$log"
    "$@" >> "$log" 2>&1 &
    child=$!
    # A background child does not see Ctrl-C by itself.
    trap 'kill "$child" 2> /dev/null; exit 130' INT TERM
    while kill -0 "$child" 2> /dev/null; do
        sleep 0.2
        if ((SECONDS - began >= beat)); then
            say "      ... $((SECONDS - began)) s"
            beat=$((beat + 20))
        fi
    done
    trap - INT TERM
    wait "$child"
}

# Keys of what is wanted now; the stamp holds those of what was done.
dependencies_key() { cat launch/constraints.txt pyproject.toml | digest; }

extension_key() {
    {
        find csrc setup.py -type f | LC_ALL=C sort | while read -r file; do
            echo "$file"
            cat "$file"
        done
        echo "${SOLAR_MEGA_CUDA:-} ${TORCH_CUDA_ARCH_LIST:-} ${CUDA_HOME:-} ${CXX:-}"
        command -v nvcc c++ g++ "${CXX:-c++}" || true
    } | digest
}

stamped() { sed -n "s/^$1=//p" "$stamp" 2> /dev/null || true; }

# usable PYTHON: it runs and its version is supported.
usable() {
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2> /dev/null
}

can_make_venv() {
    "$1" -c 'import ensurepip, venv' 2> /dev/null || "$1" -c 'import virtualenv' 2> /dev/null
}

choose_python() {
    local candidate seen=""
    if [[ -n "${SOLAR_MEGA_PYTHON:-}" ]]; then
        command -v "$SOLAR_MEGA_PYTHON" > /dev/null ||
            fail "SOLAR_MEGA_PYTHON=$SOLAR_MEGA_PYTHON: no such program"
        usable "$SOLAR_MEGA_PYTHON" ||
            fail "SOLAR_MEGA_PYTHON=$SOLAR_MEGA_PYTHON is $("$SOLAR_MEGA_PYTHON" --version 2>&1); needed: 3.10 to 3.13"
        can_make_venv "$SOLAR_MEGA_PYTHON" ||
            fail "$SOLAR_MEGA_PYTHON has neither venv nor virtualenv" \
                "on Debian and Ubuntu: apt-get install python3-venv; elsewhere: $SOLAR_MEGA_PYTHON -m pip install virtualenv"
        python=$SOLAR_MEGA_PYTHON
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
        command -v "$candidate" > /dev/null || continue
        if ! usable "$candidate"; then
            seen+=" $candidate ($("$candidate" --version 2>&1 | head -n 1)),"
        elif ! can_make_venv "$candidate"; then
            seen+=" $candidate (without venv),"
        else
            python=$candidate
            return
        fi
    done
    fail "no usable Python found; needed: 3.10 to 3.13 with venv. Seen:${seen:- none}" \
        "install one (on Debian and Ubuntu: apt-get install python3 python3-venv), or name one: SOLAR_MEGA_PYTHON=/path/to/python"
}

# torch_of PYTHON: the version of the torch it has, or nothing.
torch_of() {
    "$1" -c 'from importlib.metadata import version; print(version("torch"))' 2> /dev/null || true
}

make_venv() {
    local options=()
    own_torch=""
    if [[ -n "${SOLAR_MEGA_PYTHON:-}" ]]; then own_torch=$(torch_of "$python"); fi
    if [[ -n "$own_torch" ]]; then
        options=(--system-site-packages)
        "$python" -c 'import sys; sys.exit(tuple(map(int, sys.argv[1].split(".")[:2])) < (2, 10))' "$own_torch" ||
            fail "$python has torch $own_torch; needed: 2.10 or newer" \
                "use a newer container or module, or unset SOLAR_MEGA_PYTHON to have torch installed into .venv"
        say "[1/4] .venv over $("$python" --version), with its own torch $own_torch"
    else
        say "[1/4] .venv with $("$python" --version)"
        if [[ -z "${SOLAR_MEGA_PYTHON:-}" && -n "$(torch_of "$python")" ]]; then
            say "      it has torch $(torch_of "$python") of its own; to use that: SOLAR_MEGA_PYTHON=$python"
        fi
    fi
    if [[ -f "$stamp" ]]; then options+=(--clear); fi # ours, but over another Python
    if "$python" -c 'import ensurepip, venv' 2> /dev/null; then
        quietly "creating .venv" "$python" -m venv "${options[@]}" "$venv"
    else
        quietly "creating .venv" "$python" -m virtualenv "${options[@]}" "$venv"
    fi
    if [[ -n "$own_torch" && "$(torch_of "$venv/bin/python")" != "$own_torch" ]]; then
        # The Python named is a virtual environment itself: what it has is not among the system's packages.
        "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
            > "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/solar_mega_base.pth"
        [[ "$(torch_of "$venv/bin/python")" == "$own_torch" ]] || fail "$venv does not see the torch of $python"
    fi
}

# Requirements beside torch. Over a Python with its own torch, what torch was built with is not replaced.
requirements() {
    grep -v '^torch==' launch/constraints.txt > build/requirements.txt
    if [[ -n "$own_torch" ]]; then
        local package
        for package in numpy setuptools ninja; do
            if "$python" -c "import importlib.metadata as m; m.version('$package')" 2> /dev/null; then
                sed -i "/^$package==/d" build/requirements.txt
            fi
        done
    fi
}

pip() {
    # A container's own constraints would contradict the pinned versions.
    env -u PIP_CONSTRAINT -u PIP_USER "$venv/bin/python" -m pip install --disable-pip-version-check "$@"
}

install_dependencies() {
    local pin
    pin=$(grep '^torch==' launch/constraints.txt)
    if [[ -n "$own_torch" ]]; then
        say "[2/4] torch $own_torch is there already"
    else
        say "[2/4] $pin (a few hundred MB; several GB when it comes with CUDA)"
        quietly "installing $pin" pip "$pin"
    fi
    requirements
    say "[3/4] the other pinned packages"
    quietly "installing launch/constraints.txt" pip -r build/requirements.txt
}

build_extension() {
    say "[4/4] compiling csrc/"
    # shellcheck disable=SC2086  # several names, of which one is enough; or CXX with its options
    if ! command -v ${CXX:-c++ g++} > /dev/null; then
        say "      NO C++ COMPILER: the slower PyTorch reference ops will be used. To get the compiled ones, install one"
        say "      (on Debian and Ubuntu: apt-get install g++) and start again."
    fi
    local build=(pip --no-build-isolation --no-deps -e . -v)
    if [[ -n "${SOLAR_MEGA_CUDA:-}" ]]; then
        quietly "building the extension" "${build[@]}"
    elif ! attempt "building the extension" "${build[@]}"; then
        # A CUDA toolkit that does not quite fit must not keep anybody from the CPU ops.
        grep -E -m 3 'error: |cannot find' "$log" | cut -c1-160 >&2 || true
        say "      the build with CUDA ops failed (build/env.log); building CPU ops ONLY. To see it fail: SOLAR_MEGA_CUDA=1"
        SOLAR_MEGA_CUDA=0 quietly "building the extension without CUDA ops" "${build[@]}"
    fi
    grep -h '^ *solar_mega build:' "$log" | tail -n 1 | sed 's/^ *solar_mega build:/[env]      /' || true
}

finished() {
    [[ "$(stamped root)" == "$root" && -x "$venv/bin/python" && -x "$venv/bin/solar-mega" &&
        "$(stamped dependencies)" == "$(dependencies_key)" && "$(stamped extension)" == "$(extension_key)" &&
        (-z "${SOLAR_MEGA_PYTHON:-}" || "$(stamped python)" == "$SOLAR_MEGA_PYTHON") ]] &&
        { [[ "$(stamped ops)" == reference ]] || compgen -G "solar_mega/_C*.so" > /dev/null; }
}

# record KEY=VALUE: into the stamp, at once, so that an interrupted installation goes on where it stopped.
record() {
    { grep -v "^${1%%=*}=" "$stamp" 2> /dev/null || true; echo "$1"; } > "$stamp.new"
    mv "$stamp.new" "$stamp"
}

prepare_venv() {
    python=$(stamped python) own_torch=$(stamped own_torch)
    if [[ "$(stamped root)" == "$root" && -x "$venv/bin/python" &&
        (-z "${SOLAR_MEGA_PYTHON:-}" || "$python" == "$SOLAR_MEGA_PYTHON") ]]; then
        say "[1/4] .venv is there"
    elif [[ ! -f "$stamp" && -x "$venv/bin/python" ]]; then
        if [[ -n "${SOLAR_MEGA_PYTHON:-}" ]] || ! usable "$venv/bin/python"; then
            fail "$venv was not made by this script, and its Python is not the one wanted; remove it and start again"
        fi
        say "[1/4] .venv is there, though not made by this script; installing into it"
        python=$venv/bin/python own_torch=""
    else
        choose_python
        make_venv
    fi
    record "root=$root"
    record "python=$python"
    record "own_torch=$own_torch"
}

main() {
    if [[ -L $venv ]]; then
        # Somebody's own environment, perhaps shared: it is used as it is, and never cleared or installed into.
        "$venv/bin/python" -c "import torch, megatron.core, transformers" 2> /dev/null ||
            fail "$venv is a link to $(readlink "$venv"), which lacks torch, megatron-core or transformers" \
                "install them there, or remove the link to have an environment made here"
        return
    fi
    if finished; then return; fi
    mkdir -p build
    exec 9> build/env.lock
    if command -v flock > /dev/null && ! flock -n 9; then
        say "another installation into $venv is going on; waiting for it"
        flock 9
        if finished; then return; fi
    fi
    : > "$log"
    say "setting up $venv (details in build/env.log)"
    local began=$SECONDS
    prepare_venv
    if [[ "$(stamped dependencies)" != "$(dependencies_key)" ]]; then
        install_dependencies
        record "dependencies=$(dependencies_key)"
    fi
    build_extension
    quietly "importing what was installed" "$venv/bin/python" -c "import torch, megatron.core, transformers, solar_mega"
    if compgen -G "solar_mega/_C*.so" > /dev/null; then record ops=compiled; else record ops=reference; fi
    record "extension=$(extension_key)"
    say "ready after $((SECONDS - began)) s: $("$venv/bin/solar-mega" --version | paste -sd, - | sed 's/,/, /g')"
}

main
