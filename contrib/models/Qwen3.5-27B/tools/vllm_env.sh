#!/usr/bin/env bash
# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
#
# An environment with vLLM as pure Python, without its CUDA parts, and with this package, editable.
#
#     tools/vllm_env.sh [VERSION [DIRECTORY]]
#
# VERSION is 0.33.0, the default, or 0.23.0, the newest for NxDI's environments (torch 2.9, transformers 4.57.6).
# DIRECTORY is where the environment is made, or found: from an earlier run, or one with the torch and transformers that
# the constraints name; .vllm-VERSION beside this repository's README by default. PYTHON is the interpreter, 3.11 to 3.13.
set -euo pipefail

tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(git -C "$tools" rev-parse --show-toplevel)
version=${1:-0.33.0}
environment=${2:-$root/.vllm-$version}
constraints=$tools/constraints_vllm_$version.txt
[[ -f $constraints ]] || {
    echo "VERSION=$version: there is no $(basename "$constraints"); choose 0.33.0 or 0.23.0" >&2
    exit 1
}

python=${PYTHON:-python3}
[[ ! -x $environment/bin/python ]] || python=$environment/bin/python
found=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
[[ $found =~ ^3\.1[123]$ ]] || {
    echo "$python is Python $found: it must be 3.11 to 3.13; name one, as PYTHON=python3.12, and a new DIRECTORY" >&2
    exit 1
}
# Not the interpreter but pip, which comes last: what was left by a run that was cut off is finished.
if ! "$environment/bin/python" -m pip --version > /dev/null 2>&1; then
    "$python" -m venv "$environment"
fi
pip=("$environment/bin/python" -m pip install --quiet --disable-pip-version-check --no-warn-conflicts
    --constraint "$constraints")

if ! "$environment/bin/python" -c "from importlib.metadata import version; assert version('vllm') == '$version'" 2>/dev/null; then
    "${pip[@]}" torch "setuptools>=77.0.3,<81" wheel setuptools-scm setuptools-rust packaging ninja cmake jinja2 numpy
    # Without the override, pip refuses what it has built: its version is another than the one that was asked for.
    VLLM_TARGET_DEVICE=empty VLLM_VERSION_OVERRIDE=$version \
        "${pip[@]}" --no-build-isolation --no-deps --no-binary vllm "vllm==$version"
fi
# Two are installed by themselves, and what they need beside: compressed-tensors asks for a newer torch than NxDI's
# environments have, and runs with theirs; xgrammar asks for triton, which is of no use here.
"$environment/bin/python" - > "$environment/vllm-needs.txt" <<'PYTHON'
from importlib.metadata import requires

from packaging.requirements import Requirement

for requirement in map(Requirement, requires("vllm")):
    if requirement.name not in ("torch", "compressed-tensors", "xgrammar"):
        print(requirement)
PYTHON
"${pip[@]}" --no-deps compressed-tensors xgrammar
"${pip[@]}" --editable "$root" --requirement "$environment/vllm-needs.txt" \
    apache-tvm-ffi loguru hypothesis pytest pytest-xdist

"$environment/bin/python" - "$version" "$constraints" <<'PYTHON'
import re
import sys
from importlib.metadata import version
from pathlib import Path

pins = dict(re.findall(r"^([\w.-]+)==([\w.]+)$", Path(sys.argv[2]).read_text(encoding="utf-8"), re.MULTILINE))
for name in ("torch", "transformers"):
    found = version(name).split("+")[0]
    if found != pins[name]:
        sys.exit(f"vLLM {sys.argv[1]} is served with {name} {pins[name]} here, and this is {found}: name a new DIRECTORY")
PYTHON
echo "vLLM $version in $environment"
