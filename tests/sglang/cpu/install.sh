#!/usr/bin/env bash
# Makes a virtual environment with kdflow and the real SGLang, for a CPU: about 2 minutes, 3 GB.
#   bash tests/sglang/cpu/install.sh VENV [PYTHON]
# `pip install sglang` alone asks for CUDA builds; what it needs on a CPU stands in requirements.txt, and two small
# modules in shims/ stand in for the compiled parts that have no CPU wheel.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
venv=$1
"${2:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --requirement "$here/requirements.txt"
"$venv/bin/python" -m pip install --quiet --no-deps sglang==0.5.21 torchvision==0.28.0 xgrammar==0.2.7 apache-tvm-ffi==0.1.11
"$venv/bin/python" -m pip install --quiet --constraint "$here/requirements.txt" --editable "$here/../../.."
site=$("$venv/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
cp -r "$here"/shims/. "$site/"
echo "import kdflow_torchvision_shim" > "$site/kdflow_torchvision_shim.pth"
