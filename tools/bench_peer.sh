#!/bin/sh
# make bench-peer: a Python environment with pinned versions and SmolLM2-135M-Instruct, both in build/, once; then
# tools/bench_peer.py with these options.
# Usage: tools/bench_peer.sh [OPTION...]
set -eu
tools=$(dirname "$0")
"$tools/real_model.sh" build/real
if [ ! -f build/peer/.ready ]; then
  python3 -m venv build/peer
  build/peer/bin/pip install -q --disable-pip-version-check torch==2.15.0 transformers==5.23.0 trl==1.16.0 \
    datasets==5.2.0 accelerate==1.15.0
  touch build/peer/.ready
fi
exec python3 "$tools/bench_peer.py" --model build/real/SmolLM2-135M-Instruct --python build/peer/bin/python \
  --json build/bench_peer.json "$@"
