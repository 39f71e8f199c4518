#!/usr/bin/env bash
# Make .venv, or bring it up to date: scripts/venv.sh [EXTRAS]. The Makefile calls this when pyproject.toml or constraints.txt changed.
# Settings from the environment: VENV, PYTHON, TORCH, TORCH_INDEX (the Makefile holds their defaults).
set -euo pipefail
cd "$(dirname "$0")/.."
extras=${1:-}

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.14; do
        if new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
        if [ "$candidate" = "${PYTHON:-}" ]; then break; fi
    done
    echo "expected Python 3.11 or newer, found none${PYTHON:+ at PYTHON=$PYTHON}; name one: make PYTHON=/path/to/python3.12" >&2
    return 3
}

# A .venv is kept when its Python runs and it was made here: its scripts hold absolute paths, so a copied one is useless.
if ! new_enough "$VENV/bin/python" || { [ -e "$VENV/.made-for" ] && [ "$(cat "$VENV/.made-for")" != "$PWD" ]; }; then
    python=$(find_python)
    echo "making $VENV with $("$python" --version)"
    if ! "$python" -m venv --clear "$VENV"; then
        echo "$python cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2
        exit 3
    fi
fi
printf '%s\n' "$PWD" >"$VENV/.made-for"
pip=("$VENV/bin/python" -m pip --disable-pip-version-check)

# The version pip knows it by: torch.__version__ may add a suffix like +cu130 that the installed wheel does not have.
torch_version() {
    "$VENV/bin/python" - 2>/dev/null <<'PY'
import sys
from importlib.metadata import version

import torch  # broken torches have a version too

print(found := version("torch"))
sys.exit(tuple(int(part) for part in found.split(".")[:2]) < (2, 6))
PY
}

# Torch first, from PyTorch's index of CPU builds: the one on PyPI for Linux brings gigabytes of CUDA. Where that index cannot be
# reached, pip goes on with its usual ones at once (no retries); a download that breaks off gets a second, patient try.
pins="$VENV/constraints.txt"
grep -v '^torch==' constraints.txt >"$pins"
if ! torch=$(torch_version); then
    install_torch=("${pip[@]}" install -c "$pins" --extra-index-url "$TORCH_INDEX" "$TORCH")
    "${install_torch[@]}" --retries 0 --timeout 10 || "${install_torch[@]}"
    torch=$(torch_version) || { echo "expected torch 2.6 or newer after installing $TORCH, got '$torch'" >&2; exit 1; }
fi

# The torch that is there stays, whatever constraints.txt would pick.
echo "torch==$torch" >>"$pins"
"${pip[@]}" install --quiet -c "$pins" -e ".${extras:+[$extras]}"

# nnU-Net's own networks, for the tests alone: what it asks for beside them (timm, torchvision) is not needed to build one.
if [[ ",$extras," == *,dev,* ]]; then
    "${pip[@]}" install --quiet --no-deps dynamic-network-architectures==0.4.4
fi
