"""One operator, one boundary: torch sees `srm::<name>` and `srm::<name>_backward`, whatever runs behind them.

Eager mode, torch.compile, export, FLOP counters and CUDA graphs all see these two. Kernels are opaque to autograd: a
backend made of them brings a derivative of its own, or takes the reference's. Where nothing could tell the difference
(no gradient, no compiler, mode, transform or profiler), a call skips torch's dispatcher, which costs more host time
than a launch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef, custom_op

Implementation = Callable[..., Any]
Place = tuple[int, int | None]  # of a tensor among arguments: which, and where in it if that is a list
OPAQUE = ("triton",)  # whose implementations autograd cannot see through
PLAIN = (Tensor, torch.nn.Parameter)  # tensors that no subclass gives another meaning


def later(module: str, name: str) -> Implementation:
    """The function `name` of a module that is imported at its first call: importing kernels imports Triton."""
    found: list[ModuleType] = []

    def call(*args: Any) -> Any:
        if not found:
            found.append(import_module(module))
        return getattr(found[0], name)(*args)

    return call


class Operator:
    """An operator as torch knows it (`definition`), called directly where that makes no difference."""

    def __init__(self, definition: CustomOpDef, implementation: Implementation) -> None:
        self.definition, self.implementation = definition, implementation

    def __call__(self, *args: Any) -> Any:
        """What the definition gives for these arguments."""
        return (self.implementation if _unobserved(args) else self.definition)(*args)


def _unobserved(args: Sequence[Any]) -> bool:
    """Whether only the results of a call matter: plain tensors, no gradient, and nobody who watches operators."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or _watched():
        return False
    for value in args:
        if type(value) is list:
            for tensor in value:
                if type(tensor) not in PLAIN and isinstance(tensor, Tensor):
                    return False
        elif type(value) not in PLAIN and isinstance(value, Tensor):
            return False
    return not _first(args).is_meta


def _watched() -> bool:
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    )


def register_operator(
    name: str,
    arguments: str,
    returns: str,
    implementations: Mapping[str, Implementation],
    *,
    fake: Callable[..., Any],
    differentiable: Sequence[str] = (),
    like: str | None = None,
    derivatives: Mapping[str, Implementation] | None = None,
    constant: Sequence[int] = (),
    recalled: Mapping[str, int] | None = None,
) -> Operator:
    """Register `srm::name(arguments, str backend) -> returns` with its fake and its derivative.

    Arguments may be lists of tensors. `implementations` maps a backend to a plain function of `arguments`; "reference"
    must be among them. The
    derivative is the vector-Jacobian product of the implementation, recomputed from the saved inputs inside
    `srm::name_backward`. A second derivative (`create_graph=True`) always goes through the reference, whose
    steps autograd knows. Only floating-point results carry gradients, and not those numbered in `constant`. Results
    are contiguous, or the first laid out as `torch.empty_like` of the argument `like`, whatever the implementation;
    gradients are contiguous.

    `derivatives` maps a backend to a function `(grads, results, *arguments)` that gives the gradients of the
    `differentiable` arguments (of those that are not None) in their order; results are then kept for it. A backend of
    kernels that has none takes the reference's derivative. `recalled` names arguments that the reference's derivative
    finds replaced by the result of that number: what the forward pass chose is not chosen again.
    """
    schema = f"({arguments}, str backend) -> {returns}"
    names = [argument.split()[-1].split("=")[0] for argument in f"{arguments}, str backend".split(",")]
    differentiables = [names.index(argument) for argument in differentiable]
    own = derivatives or {}
    known = {names.index(argument): number for argument, number in (recalled or {}).items()}

    def forward(*args: Any) -> Any:
        *inputs, backend = args
        with no_autocast(inputs):
            result = implementations[backend](*inputs)
        first, *rest = result if isinstance(result, tuple) else (result,)
        first = first.contiguous() if like is None else _laid_out(first, inputs[names.index(like)])
        return (first, *(t.contiguous() for t in rest)) if isinstance(result, tuple) else first

    operator = custom_op(f"srm::{name}", forward, mutates_args=(), schema=schema)
    called = Operator(operator, forward)
    operator.register_fake(lambda *args: fake(*args[:-1]))
    if "[]" in arguments:  # for others torch has a fallback

        def one_by_one(info: Any, dims: Sequence[Any], *args: Any) -> Any:
            results = [operator(*_entry(list(args), list(dims), i)) for i in range(info.batch_size)]
            if isinstance(results[0], Tensor):
                return torch.stack(results), 0
            return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])

        operator.register_vmap(one_by_one)
    if not differentiables:
        return called

    def present(inputs: Sequence[Any]) -> list[Place]:
        return [place for place in _places(inputs) if place[0] in differentiables]

    def carriers(outputs: Sequence[Tensor]) -> list[int]:
        return [i for i, value in enumerate(outputs) if value.is_floating_point() and i not in constant]

    def recall(inputs: Sequence[Any], results: Sequence[Tensor]) -> list[Any]:
        return [
            results[known[index]] if index in known else value for index, value in enumerate(copied(inputs))
        ]

    def copied(inputs: Sequence[Any]) -> list[Any]:
        return [list(value) if isinstance(value, list) else value for value in inputs]

    def derivative(grads: Sequence[Tensor], results: Sequence[Tensor], *args: Any) -> list[Tensor]:
        *inputs, backend = args
        if backend in own:
            with no_autocast(inputs):
                return [product.contiguous() for product in own[backend](grads, results, *inputs)]
        wanted = present(inputs)
        inputs = recall(inputs, results)
        function = implementations["reference" if backend in OPAQUE else backend]
        # The dispatcher leaves autograd out below an operator; this one is made of it.
        autograd = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
        with autograd, torch.enable_grad(), no_autocast(inputs):
            for place in wanted:
                _put(inputs, place, _at(inputs, place).detach().requires_grad_())
            return _product(function, inputs, wanted, carriers, grads, create_graph=False)

    backward_definition = custom_op(
        f"srm::{name}_backward",
        derivative,
        mutates_args=(),
        schema=f"(Tensor[] grads, Tensor[] results, {arguments}, str backend) -> Tensor[]",
    )
    backward_operator = Operator(backward_definition, derivative)
    backward_definition.register_fake(
        lambda grads, results, *args: [
            torch.empty(t.shape, dtype=t.dtype, device=t.device)
            for t in (_at(args, place) for place in present(args))
        ]
    )

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.places = _places(inputs)
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.mark_non_differentiable(
            *(outputs[i] for i in constant), *(value for value in outputs if not value.is_floating_point())
        )
        kept = outputs if own or known else ()
        ctx.save_for_backward(*(_at(inputs, place) for place in ctx.places), *kept)
        ctx.others = [
            None if isinstance(value, Tensor) else [None] * len(value) if _is_tensors(value) else value
            for value in inputs
        ]
        ctx.carriers = carriers(outputs)

    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        inputs = copied(ctx.others)
        saved = list(ctx.saved_tensors)
        results = saved[len(ctx.places) :]
        for place, tensor in zip(ctx.places, saved, strict=False):
            _put(inputs, place, tensor)
        wanted = present(inputs)
        grads = [grad_outputs[index] for index in ctx.carriers]
        if torch.is_grad_enabled():
            plain = recall(inputs[:-1], results)
            with no_autocast(plain):
                for place in wanted:  # an alias each: inputs may depend on one another
                    tensor = _at(plain, place)
                    alias = tensor.view_as(tensor)
                    _put(plain, place, alias if alias.requires_grad else alias.requires_grad_())
                products = _product(
                    implementations["reference"], plain, wanted, carriers, grads, create_graph=True
                )
        else:
            products = backward_operator(grads, results, *inputs)
        result: list[Any] = [[None] * len(value) if _is_tensors(value) else None for value in inputs]
        for place, product in zip(wanted, products, strict=True):
            _put(result, place, product if _at(ctx.needs_input_grad, place) else None)
        return tuple(result)

    operator.register_autograd(backward, setup_context=setup_context)
    return called


def _is_tensors(value: Any) -> bool:
    """Whether an argument is a list of tensors, by its first entry: a schema's lists are of one kind.

    An empty list counts as one, as torch counts it.
    """
    return isinstance(value, list) and (not value or value[0] is None or isinstance(value[0], Tensor))


def _places(inputs: Sequence[Any]) -> list[Place]:
    """Where tensors are among the arguments: (argument, position in its list, or None for a tensor itself)."""
    places: list[Place] = []
    for index, value in enumerate(inputs):
        if isinstance(value, Tensor):
            places.append((index, None))
        elif _is_tensors(value):
            places += [(index, position) for position in range(len(value))]
    return places


def _first(inputs: Sequence[Any]) -> Tensor:
    """The first tensor among the arguments, in a list or not."""
    for value in inputs:
        for tensor in value if isinstance(value, list) else (value,):
            if isinstance(tensor, Tensor):
                return tensor
    raise ValueError("no argument is a tensor; expected one at least")


def _entry(value: Any, dim: Any, i: int) -> Any:
    """Entry i of what is batched along `dim`, in lists too."""
    if isinstance(value, list):
        dims = dim if isinstance(dim, list | tuple) else [dim] * len(value)
        return [_entry(part, d, i) for part, d in zip(value, dims, strict=True)]
    return value.select(dim, i) if isinstance(value, Tensor) and dim is not None else value


def _at(inputs: Sequence[Any], place: Place) -> Any:
    index, position = place
    return inputs[index] if position is None else inputs[index][position]


def _put(inputs: list[Any], place: Place, value: Any) -> None:
    index, position = place
    if position is None:
        inputs[index] = value
    else:
        inputs[index][position] = value


def _product(
    function: Implementation,
    inputs: list[Any],
    wanted: list[Place],
    carriers: Callable[[Sequence[Tensor]], list[int]],
    grads: Sequence[Tensor],
    *,
    create_graph: bool,
) -> list[Tensor]:
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    carrying = [outputs[index] for index in carriers(outputs)]
    variables = [_at(inputs, place) for place in wanted]
    pairs = [(output, grad) for output, grad in zip(carrying, grads, strict=True) if output.requires_grad]
    products = torch.autograd.grad(
        [output for output, _ in pairs],
        variables,
        [grad for _, grad in pairs],
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    given = {grad.untyped_storage().data_ptr() for grad in grads}
    return [_apart(product, given) for product in products]


def _apart(product: Tensor, given: set[int]) -> Tensor:
    """Contiguous, in memory of its own: an operator may not return what it was given, nor parts of one tensor."""
    product = product.contiguous()
    memory = product.untyped_storage()
    alone = memory.nbytes() == product.numel() * product.element_size() and memory.data_ptr() not in given
    return product if alone else product.clone()


def _laid_out(result: Tensor, model: Tensor) -> Tensor:
    promised = torch.empty_like(model, dtype=result.dtype, device="meta")  # strides without memory
    if result.stride() == promised.stride():
        return result
    return torch.empty_like(model, dtype=result.dtype).copy_(result)


def no_autocast(inputs: Sequence[Any]) -> AbstractContextManager[Any]:
    """Autocast off on the device of the first tensor: the operators choose their own precision."""
    device = _first(inputs).device.type
    off = device == "meta" or not torch.is_autocast_enabled(device)
    return nullcontext() if off else torch.autocast(device, enabled=False)
