#!/usr/bin/env bash
# The test suite in fresh environments: the oldest Python and PyTorch that setup.cfg admits, and the newest.
# bash tests/versions.sh                          both sets, all tests; hours on two cores, and 12 GB of downloads
# bash tests/versions.sh newest tests/test_swap.py ...   one set, these tests
set -euo pipefail
cd "$(dirname "$0")/.."
sets="oldest newest"
case ${1:-} in oldest | newest) sets=$1 && shift ;; esac
torch=$(sed -n 's/^    \(torch>=.*\)/\1/p' setup.cfg)   # torch>=A,<B
pythons=$(sed -n 's/.*Programming Language :: Python :: \(3\.[0-9]*\)/\1/p' setup.cfg | sort -V)
for set in $sets; do
    case $set in
        oldest) python=$(head -n 1 <<< "$pythons") wanted="$(sed 's/>=/==/; s/,.*//' <<< "$torch").*" ;;
        newest) python=$(tail -n 1 <<< "$pythons") wanted=$torch ;;
    esac
    command -v "python$python" > /dev/null || { echo "$set: python$python is not on the path"; exit 1; }
    environment=$(mktemp -d)
    trap 'rm -rf "$environment"' EXIT
    echo "== $set: Python $python, $wanted"
    "python$python" -m venv "$environment"
    "$environment/bin/python" -m pip install --quiet "$wanted"
    "$environment/bin/python" -m pip install --quiet -e ".[test]"
    "$environment/bin/python" -c "import torch, torchrl; print('torch', torch.__version__, 'torchrl', torchrl.__version__)"
    "$environment/bin/python" -m pytest "$@"
    rm -rf "$environment"
done
