#!/usr/bin/env bash
# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
#
# The default suite with what NxDI's images have: torch 2.9.1 and transformers 4.57.6, in an environment of its own.
#
#     tools/lane_torch29.sh [DIRECTORY] [pytest arguments]
#
# DIRECTORY is where the environment is made, or found from an earlier run; .lane-torch29 beside this repository's
# README by default. torch is 7 GB with its CUDA parts. PYTHON is the interpreter, 3.10 to 3.13.
set -euo pipefail

tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(git -C "$tools" rev-parse --show-toplevel)
environment=${1:-$root/.lane-torch29}
shift || true
constraints=$tools/constraints_torch29.txt

if [[ ! -x $environment/bin/python ]]; then
    "${PYTHON:-python3}" -m venv "$environment"
fi
pip=("$environment/bin/python" -m pip install --quiet --constraint "$constraints")
"${pip[@]}" --editable "$root" hypothesis matplotlib pytest pytest-xdist

"$environment/bin/python" - <<'PYTHON'
import torch
import transformers

found = torch.__version__.split("+")[0], transformers.__version__
assert found == ("2.9.1", "4.57.6"), f"this lane is for torch 2.9.1 and transformers 4.57.6, not {found}"
PYTHON
cd "$root"
exec "$environment/bin/python" -m pytest "$@"
