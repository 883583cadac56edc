#!/bin/sh
# Brings SmolLM2-135M-Instruct to FOLDER/SmolLM2-135M-Instruct, once, with a Python environment of its own (numpy and
# gguf).
# Usage: tools/real_model.sh FOLDER
set -eu
folder=$1 model=$1/SmolLM2-135M-Instruct
[ ! -f "$model/model.safetensors" ] || exit 0
mkdir -p "$folder"
if ! python3 -m venv "$folder/python" >/dev/null 2>&1; then
  echo "the real model needs Python 3 with venv: apt-get install python3-venv" >&2
  exit 2
fi
"$folder/python/bin/pip" install -q --disable-pip-version-check numpy gguf
"$folder/python/bin/python" "$(dirname "$0")/get_model.py" "$model"
