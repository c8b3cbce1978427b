#!/usr/bin/env bash
# Speed and memory on one GPU: benchmarks/gpu.py, at most nine minutes, nothing downloaded.
#
# The machine needs Python 3.11 or newer with torch, lightning, transformers and torchmetrics. What
# else it lacks comes from WHEELS, a folder of wheels for diffusers, jsonargparse, docstring-parser,
# typeshed-client, open-clip-torch, ftfy, webdataset and braceexpand. On a machine with a network:
#   pip download --no-deps -d wheels diffusers jsonargparse docstring-parser typeshed-client \
#       open-clip-torch ftfy webdataset braceexpand
#   WHEELS=wheels bash benchmarks/gpu.sh
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
if [ -n "${WHEELS:-}" ]; then
  "$PYTHON" -m venv --system-site-packages .venv-gpu
  PYTHON=.venv-gpu/bin/python
  "$PYTHON" -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl
fi
OUT=${OUT:-benchmarks/results}
mkdir -p "$OUT"
PYTHONPATH=. "$PYTHON" benchmarks/gpu.py --minutes 8 --output "$OUT/gpu.md" "$@"
