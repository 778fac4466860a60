#!/usr/bin/env bash
# What a user does first with an installed copy, in the folder given; `python` and `r2dreamer` are that copy's.
# bash tests/installed.sh FOLDER
set -euo pipefail
cd "$1"
refused() {  # refused TEXT COMMAND...: it fails, and says TEXT
    local text=$1 said
    shift
    if said=$("$@" 2>&1); then echo "not refused: $*"; exit 1; fi
    said=$(tr -s '\n ' ' ' <<< "$said")
    [[ $said == *"$text"* && $said != *Traceback* ]] || { echo "$*: expected '$text', got: $said"; exit 1; }
}

echo "-- every module imports, every packaged file is there"
python - <<'PY'
import importlib
import importlib.resources
import pkgutil
import re

import hydra
import r2dreamer

assert "site-packages" in r2dreamer.__file__, r2dreamer.__file__
modules = [module.name for module in pkgutil.walk_packages(r2dreamer.__path__, "r2dreamer.")]
for module in modules:
    importlib.import_module(module)
for file in ("config.yaml", "model/size12M.yaml", "env/gym.yaml", "reference_curves.csv"):
    assert importlib.resources.files("r2dreamer.configs").joinpath(file).is_file(), file
with importlib.resources.as_file(importlib.resources.files("r2dreamer.configs")) as folder:
    found = {name for file in folder.rglob("*.yaml") for name in re.findall(r"_target_: *([\w.]+)", file.read_text())}
for target in found:
    hydra.utils.get_object(target)
print(f"{len(modules)} modules and {len(found)} targets of version {r2dreamer.__version__} import")
PY

python -c 'import gymnasium; gymnasium.make("r2dreamer.envs:DMCSubtle/reacher-v0", shrink=1/8, physics="frozen").reset()'

echo "-- the command line"
[[ $(r2dreamer) == *"usage: r2dreamer COMMAND"* ]]
[[ $(r2dreamer --help) == *"  train "* ]]
refused "Did you mean 'r2dreamer train'" r2dreamer trian
refused 'pip install "torchrl-r2dreamer[crafter]"' r2dreamer train env=crafter logger=none progress=false
refused "no such key" r2dreamer train experiment=quickstart total_frame=4000

echo "-- the quickstart, shortened, and what reads its run"
r2dreamer train experiment=quickstart total_frames=4000 progress=false
r2dreamer evaluate checkpoint=runs/quickstart/seed0 episodes=2
r2dreamer curves runs/quickstart/seed0 --out curve.png && [ -s curve.png ]
r2dreamer doctor env=gym env.task=CartPole-v1 steps=20 model=size1M
[[ $(r2dreamer benchmark experiment=quickstart synthetic=false repeats=2) == *update* ]]

echo "-- a grid of two seeds, in workers"
r2dreamer compare experiment=quickstart name=two seed=0,1 total_frames=800 warmup_steps=100 env.parallel=true \
    env.num_envs=2 eval.video=false

echo "-- Ctrl-C saves and leaves"
r2dreamer train experiment=quickstart name=stopped log_every=100 env.parallel=true env.num_envs=2 progress=false > stopped.txt &
running=$!
until grep -q '"speed/' runs/stopped/seed0/metrics.jsonl 2> /dev/null; do kill -0 $running && sleep 1; done
kill -INT $running && wait $running && grep -q "interrupted, resume with the same command" stopped.txt
