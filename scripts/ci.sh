#!/usr/bin/env bash
# What every change must pass, on a bare machine with Python 3.11 to 3.13 and nothing else.
set -euo pipefail
cd "$(dirname "$0")/.."
make check
make test
make train
