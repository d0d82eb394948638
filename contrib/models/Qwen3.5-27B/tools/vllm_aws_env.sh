#!/usr/bin/env bash
# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
#
# An environment to test this package behind AWS's vLLM plugin on any CPU: vLLM 0.11.0 as pure Python, the plugin and this
# package, both editable. What the plugin needs of the Neuron SDK is not installed; see docs/testing.md.
#
#     tools/vllm_aws_env.sh PLUGIN [DIRECTORY]
#
# PLUGIN is a checkout of https://github.com/vllm-project/vllm-neuron at its tag 0.2.0. DIRECTORY is where the environment
# is made, or found; .vllm-aws beside this repository's README by default. PYTHON is the interpreter, 3.10 to 3.12.
set -euo pipefail

tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(git -C "$tools" rev-parse --show-toplevel)
plugin=${1:-}
environment=${2:-$root/.vllm-aws}
[[ -f $plugin/vllm_neuron/__init__.py ]] || {
    echo "PLUGIN=$plugin is no checkout of vllm-neuron; git clone --branch 0.2.0 https://github.com/vllm-project/vllm-neuron" >&2
    exit 1
}

python=${PYTHON:-python3}
[[ ! -x $environment/bin/python ]] || python=$environment/bin/python
found=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
[[ $found =~ ^3\.1[012]$ ]] || {
    echo "$python is Python $found: it must be 3.10 to 3.12; name one, as PYTHON=python3.12, and a new DIRECTORY" >&2
    exit 1
}
if [[ ! -x $environment/bin/python ]]; then
    "$python" -m venv "$environment"
fi
pip=("$environment/bin/python" -m pip)
options=(--quiet --disable-pip-version-check --no-warn-conflicts --constraint "$tools/constraints_vllm_aws.txt")

"${pip[@]}" install "${options[@]}" torch "setuptools>=77.0.3,<80" wheel setuptools-scm packaging ninja cmake jinja2 numpy
if ! "$environment/bin/python" -c "from importlib.metadata import version; assert version('vllm').startswith('0.11.0')" 2>/dev/null; then
    # vLLM's setup.py names its version after the CUDA that torch was built for, and pip refuses what it did not ask for.
    # While the archive is fetched, torch is one without.
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    mkdir -p "$scratch/torch/utils"
    echo "class version: cuda = hip = None" > "$scratch/torch/__init__.py"
    touch "$scratch/torch/utils/__init__.py"
    echo "CUDA_HOME = ROCM_HOME = None" > "$scratch/torch/utils/cpp_extension.py"
    PYTHONPATH=$scratch "${pip[@]}" download --quiet --disable-pip-version-check --dest "$scratch" \
        --no-deps --no-build-isolation --no-binary vllm vllm==0.11.0
    VLLM_TARGET_DEVICE=empty "${pip[@]}" install "${options[@]}" --no-deps --no-build-isolation "$scratch/vllm-0.11.0.tar.gz"
fi
# Two are installed by themselves, as by vllm_env.sh: they ask for another torch, and for triton.
"$environment/bin/python" - > "$environment/vllm-needs.txt" <<'PYTHON'
from importlib.metadata import requires

from packaging.requirements import Requirement

for requirement in map(Requirement, requires("vllm")):
    if requirement.name not in ("torch", "compressed-tensors", "xgrammar") and "extra" not in str(requirement.marker):
        print(requirement)
PYTHON
"${pip[@]}" install "${options[@]}" --no-deps compressed-tensors xgrammar
"${pip[@]}" install "${options[@]}" --requirement "$environment/vllm-needs.txt" \
    accelerate hypothesis ml_dtypes pytest pytest-xdist tenacity tqdm
# Their own requirements are vLLM's CUDA build and the Neuron SDK, and what is installed already.
"${pip[@]}" install "${options[@]}" --no-deps --no-build-isolation --editable "$plugin" --editable "$root"

"$environment/bin/python" - <<'PYTHON'
from importlib.metadata import version

for name, expected in (("vllm-neuron", "0.2.0"), ("torch", "2.9.1"), ("transformers", "4.57.6")):
    found = version(name).split("+")[0]
    assert found == expected, f"AWS's plugin was tested with {name} {expected}, and this is {found}"
PYTHON
echo "vLLM 0.11.0 and AWS's plugin in $environment"
