#!/usr/bin/env bash
# The test suite in fresh environments: the oldest Python and PyTorch that setup.cfg admits, and the newest.
# bash tests/versions.sh                          every set, all tests; hours on two cores, and 20 GB of downloads
# bash tests/versions.sh newest tests/test_swap.py ...   one set (oldest, newest, python3.13), these tests
set -euo pipefail
cd "$(dirname "$0")/.."
sets="oldest newest python3.13"
case ${1:-} in oldest | newest | python3.13) sets=$1 && shift ;; esac
torch=$(sed -n 's/^    \(torch>=.*\)/\1/p' setup.cfg) # torch>=A,<B
for set in $sets; do
    tests=("$@") extras=test
    case $set in
        oldest) python=python3.11 wanted="$(sed 's/>=/==/; s/,.*//' <<< "$torch").*" ;;
        newest) python=python3.12 wanted=$torch ;;
        python3.13) # what dm_control is not needed for: its labmaze has no build for 3.13
            python=python3.13 wanted=$torch extras=gym,atari,plot
            [ $# -gt 0 ] || tests=(tests/test_{networks,losses,objectives,functional,swap,replay,records,train,resume}.py -k "not dmc")
            ;;
    esac
    command -v "$python" > /dev/null || { echo "$set: $python is not on the path"; exit 1; }
    environment=$(mktemp -d)
    trap 'rm -rf "$environment"' EXIT
    echo "== $set: $python, $wanted"
    "$python" -m venv "$environment"
    "$environment/bin/python" -m pip install --quiet -e ".[$extras]" "pytest>=8,<10" pytest-timeout pytest-xdist
    "$environment/bin/python" -m pip install --quiet --upgrade "$wanted" # the extra `test` asks for an older one than the newest
    "$environment/bin/python" -c "import torch, torchrl; print('torch', torch.__version__, 'torchrl', torchrl.__version__)"
    "$environment/bin/python" -m pytest "${tests[@]}"
    rm -rf "$environment"
done
