#!/bin/sh
# Installs mvhpc from the folder above with the versions of constraints.txt: the step that both recipes and the tests run.
# EXTRAS chooses what comes along (default: all that runs need).
set -eu
cd "$(dirname "$0")/.."
python -m pip install --no-cache-dir --constraint constraints.txt torch
python -m pip install --no-cache-dir --constraint constraints.txt ".[${EXTRAS:-cluster,preprocess}]"
cd /
mvhpc --help >/dev/null
shards --help >/dev/null
mvhpc-app --help >/dev/null
