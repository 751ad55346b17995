#!/usr/bin/env bash
# Checks that every change must pass on a bare machine with Python 3.11 to 3.13 and nothing else.
set -euo pipefail
cd "$(dirname "$0")/.."
make check
make test
# The light studies, one training step per cell.
light="llava_align or text_share or sft_balance or mm1_resolution or three_stage or fastvlm_multiscale"
make test ARGS="tests/study/test_sweep.py -m slow -k 'one_step and ($light)'"
make train
