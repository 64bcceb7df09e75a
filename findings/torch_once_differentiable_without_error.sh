#!/usr/bin/env bash
# torch 2.13.0: once_differentiable, the decorator for backward functions that cannot be differentiated again. The
# documentation says that a second differentiation raises an error then, and one expects that wherever it would be
# wrong. The error comes only if the gradient that arrives at the function requires a gradient itself. Where the loss
# is linear in the function's output it does not: what comes out is a constant, although it was computed from a saved
# input. A penalty on that gradient, added to the loss, then adds nothing: there is no error, and the gradient is
# wrong. It matters for gradient penalties and second-order methods: the decorator is what one relies on not to get
# this.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
cd "$folder"

"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch.autograd.function import once_differentiable

print("torch", torch.__version__)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


def penalised(function, outer):
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    loss = outer(function(x)).sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + gradient.square().sum()).backward()
    return x.grad


try:
    penalised(Square.apply, torch.square)
except RuntimeError as error:
    print("a loss that is not linear in the output:", error)
else:
    raise SystemExit("Not as described: there is no error even where the loss is not linear in the output.")

try:
    silent = penalised(Square.apply, lambda output: output)
except RuntimeError as error:
    raise SystemExit(f"Not as described: a linear loss raises an error too: {error}")
right = penalised(torch.square, lambda output: output)
print("a linear loss: no error; gradient of loss and penalty", silent.tolist(), "instead of", right.tolist())
if torch.equal(silent, right):
    raise SystemExit("Not as described: the gradient with the penalty is right.")
PYTHON
