#!/usr/bin/env bash
# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
#
# The tests of serving with a version of vLLM, in an environment of its own.
#
#     tools/lane_vllm.sh [VERSION [DIRECTORY [pytest arguments]]]
#
# VERSION, DIRECTORY and PYTHON are those of tools/vllm_env.sh, which makes the environment, or finds it from an earlier
# run. Without the slow schedules; -m vllm as a pytest argument has all.
set -euo pipefail

tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(git -C "$tools" rev-parse --show-toplevel)
version=${1:-0.33.0}
environment=${2:-$root/.vllm-$version}
shift $(($# < 2 ? $# : 2))
"$tools/vllm_env.sh" "$version" "$environment"
# One process: modules share engines and servers, and a server has processes of its own.
cd "$root"
exec "$environment/bin/python" -m pytest -n 0 -m "vllm and not slow" contrib/models/Qwen3.5-27B/test/vllm_lane "$@"
