#!/usr/bin/env bash
# model.load_state_dict(weights, assign=True) leaves a mark in `weights` itself, in its attribute _metadata
# (pytorch/pytorch issue 188166). A later model.load_state_dict(weights), without assign, finds the mark
# and assigns as well: the model gets new parameters, and an optimizer that was made before goes on moving
# the old ones. Nothing is said, and training changes nothing. The mark is also saved by torch.save.
# We met it as follows: weights from a file were first checked against a model on the device meta, where
# assign=True avoids a warning for each tensor, and then loaded into the model that was to train on.
# A plain dict(weights) has no such attribute, so nothing can be left in it.
# Seen with torch 2.10.0, 2.13.0 and 2.14.1. Installs torch 2.13.0 in a temporary folder. Exit status 0
# while this is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy
venv/bin/python - <<'PYTHON'
import io, sys
import torch

def loss_before_and_after(check, copy):
    """100 steps towards outputs of 0, after `weights` may have been checked with assign=True."""
    torch.manual_seed(0)
    file = io.BytesIO()
    torch.save(torch.nn.Linear(4, 4).state_dict(), file)
    file.seek(0)
    weights = torch.load(file, weights_only=True)
    if check:
        with torch.device("meta"):
            on_meta = torch.nn.Linear(4, 4)
        on_meta.load_state_dict(copy(weights), assign=True)
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.load_state_dict(weights)
    x = torch.ones(1, 4)
    before = model(x).square().sum().item()
    for _ in range(100):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return before, model(x).square().sum().item()

print("torch", torch.__version__)
results = [loss_before_and_after(False, dict), loss_before_and_after(True, lambda weights: weights),
           loss_before_and_after(True, dict)]
for name, (before, after) in zip(("not checked before", "checked with assign=True", "checked as a plain dict"), results):
    print(f"{name:26} loss {before:.3f} -> {after:.3f}")
plain, marked, copied = results
as_seen = plain[1] < 1e-3 and marked[0] == marked[1] > 1e-2 and copied == plain
sys.exit(0 if as_seen else 1)
PYTHON
