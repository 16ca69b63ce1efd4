"""One operator, one boundary: torch sees `srm::<name>` and `srm::<name>_backward`, whatever runs behind them.

Eager mode, torch.compile, export, FLOP counters and CUDA graphs all see these two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef, custom_op

Implementation = Callable[..., Any]


def register_operator(
    name: str,
    arguments: str,
    returns: str,
    implementations: Mapping[str, Implementation],
    *,
    fake: Callable[..., Any],
    differentiable: Sequence[str] = (),
    like: str | None = None,
) -> CustomOpDef:
    """Register `srm::name(arguments, str backend) -> returns` with its fake and its derivative.

    `implementations` maps a backend to a plain function of `arguments`; "reference" must be among them. The
    derivative is the vector-Jacobian product of the implementation, recomputed from the saved inputs inside
    `srm::name_backward`. A second derivative (`create_graph=True`) always goes through the reference, whose
    steps autograd knows. Only floating-point results carry gradients. Results are contiguous, or laid out as
    `torch.empty_like` of the argument `like`, whatever the implementation; gradients are contiguous.
    """
    schema = f"({arguments}, str backend) -> {returns}"
    names = [argument.split()[-1].split("=")[0] for argument in f"{arguments}, str backend".split(",")]
    wanted = [names.index(argument) for argument in differentiable]

    def forward(*args: Any) -> Any:
        *inputs, backend = args
        with no_autocast(inputs):
            result = implementations[backend](*inputs)
        if like is not None:
            return _laid_out(result, inputs[names.index(like)])
        return tuple(t.contiguous() for t in result) if isinstance(result, tuple) else result.contiguous()

    operator = custom_op(f"srm::{name}", forward, mutates_args=(), schema=schema)
    operator.register_fake(lambda *args: fake(*args[:-1]))
    if not wanted:
        return operator

    def derivative(grads: Sequence[Tensor], *args: Any) -> list[Tensor]:
        *inputs, backend = args
        # The dispatcher leaves autograd out below an operator; this one is made of it.
        autograd = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
        with autograd, torch.enable_grad(), no_autocast(inputs):
            for index in wanted:
                inputs[index] = inputs[index].detach().requires_grad_()
            return _product(implementations[backend], inputs, wanted, grads, create_graph=False)

    backward_operator = custom_op(
        f"srm::{name}_backward",
        derivative,
        mutates_args=(),
        schema=f"(Tensor[] grads, {arguments}, str backend) -> Tensor[]",
    )
    backward_operator.register_fake(
        lambda grads, *args: [
            torch.empty(args[i].shape, dtype=args[i].dtype, device=args[i].device) for i in wanted
        ]
    )

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.tensors = [index for index, value in enumerate(inputs) if isinstance(value, Tensor)]
        ctx.save_for_backward(*(inputs[index] for index in ctx.tensors))
        ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.floating = [index for index, value in enumerate(outputs) if value.is_floating_point()]

    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        inputs = list(ctx.others)
        for index, tensor in zip(ctx.tensors, ctx.saved_tensors, strict=True):
            inputs[index] = tensor
        grads = [grad_outputs[index] for index in ctx.floating]
        if torch.is_grad_enabled():
            *plain, _ = inputs
            with no_autocast(plain):
                for index in wanted:  # an alias each: inputs may depend on one another
                    alias = plain[index].view_as(plain[index])
                    plain[index] = alias if alias.requires_grad else alias.requires_grad_()
                products = _product(implementations["reference"], plain, wanted, grads, create_graph=True)
        else:
            products = backward_operator(grads, *inputs)
        result: list[Tensor | None] = [None] * len(inputs)
        for index, product in zip(wanted, products, strict=True):
            result[index] = product if ctx.needs_input_grad[index] else None
        return tuple(result)

    operator.register_autograd(backward, setup_context=setup_context)
    return operator


def _product(
    function: Implementation,
    inputs: list[Any],
    wanted: list[int],
    grads: Sequence[Tensor],
    *,
    create_graph: bool,
) -> list[Tensor]:
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    floating = [output for output in outputs if output.is_floating_point()]
    variables = [inputs[index] for index in wanted]
    pairs = [(output, grad) for output, grad in zip(floating, grads, strict=True) if output.requires_grad]
    products = torch.autograd.grad(
        [output for output, _ in pairs],
        variables,
        [grad for _, grad in pairs],
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return [product.contiguous() for product in products]


def _laid_out(result: Tensor, model: Tensor) -> Tensor:
    promised = torch.empty_like(model, dtype=result.dtype, device="meta")  # strides without memory
    if result.stride() == promised.stride():
        return result
    return torch.empty_like(model, dtype=result.dtype).copy_(result)


def no_autocast(inputs: Sequence[Any]) -> AbstractContextManager[Any]:
    """Autocast off on the device of the first tensor: the operators choose their own precision."""
    device = next(value.device.type for value in inputs if isinstance(value, Tensor))
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)
