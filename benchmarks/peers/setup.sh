#!/usr/bin/env bash
# Make the environment of the other tools: benchmarks/peers/setup.sh [VENV]. Nothing of theirs enters .venv.
# torch, MONAI and med_gradcam are taken from the environment MAIN (default .venv) where it has them, else installed.
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=${1:-.venv-peers}
main=${MAIN:-.venv}
here=$PWD/benchmarks/peers

if "$main/bin/python" -c 'import monai, torch' 2>/dev/null; then
    "$main/bin/python" -m venv --clear "$venv"
    site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    shared=$("$main/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    printf 'import site; site.addsitedir(%s)\n' "'$shared'" >"$site/00_shared.pth"
else
    VENV=$venv TORCH=${TORCH:-torch} TORCH_INDEX=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu} scripts/venv.sh monai
    site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
fi

pip=("$venv/bin/python" -m pip --disable-pip-version-check --quiet install)
"${pip[@]}" -c constraints.txt -r "$here/support.txt"
"${pip[@]}" --no-deps -r "$here/requirements.txt"
# Last on the path, so that a torchvision that is really there wins.
if ! "$venv/bin/python" -c 'import torchvision' 2>/dev/null; then
    printf '%s\n' "$here/stub" >"$site/zz_torchvision_stub.pth"
fi
"$venv/bin/python" -c 'import captum.attr, medcam, monai, pytorch_grad_cam, torch, torchcam, zennit; print("peers ready, torch", torch.__version__)'
