"""Register operators with torch as `srm::<name>` and `srm::<name>_backward`, for all backends.

torch.compile, torch.export and FLOP counters do not look into an operator: they see one call of `srm::<name>` or
`srm::<name>_backward`. Eager mode and CUDA graphs run the same two operators. Autograd cannot differentiate through
Triton kernels. For the backend "triton", an operator therefore has a derivative of its own (the argument `derivatives`
of `register_operator`), or uses the derivative of the reference.

If a call is differentiated under torch.func or by forward-mode differentiation, it does not run a registered
operator. It runs the reference in plain PyTorch instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import forward_ad

from .checks import RENAMED, transforming
from .options import WRITTEN

Implementation = Callable[..., Any]
Place = tuple[
    int, int | None
]  # place of a tensor: index of the argument, and index in the argument if it is a list
OPAQUE = ("triton",)  # backends that autograd cannot differentiate
_plain = False  # whether differentiable operators run the operations of their reference
_library = torch.library.Library("srm", "FRAGMENT")  # operators exist as long as this object
_running: list[dict[str, set[str]]] = []


@contextmanager
def running() -> Iterator[dict[str, set[str]]]:
    """Record which operators run inside the context, and with which backends.

    The context manager yields a dict: operator name → set of backends. Each call inside the context adds to this dict.

    Operators are recorded in eager and in compiled code. In a CUDA graph, they are recorded during the capture, not
    during a replay. Calls that are differentiated under torch.func or by forward-mode differentiation are not recorded,
    because they run no registered operator.
    """
    found: dict[str, set[str]] = {}
    _running.append(found)
    try:
        yield found
    finally:
        _running[:] = [other for other in _running if other is not found]


@contextmanager
def plainly() -> Iterator[None]:
    """Run the reference in plain PyTorch in place of each differentiable operator that is called in the context.

    Inside the context, torch sees the PyTorch operations of the reference, and not the registered operator. The backend
    of the call has no effect. Operators without a derivative run as usual.
    """
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before


def later(module: str, name: str) -> Implementation:
    """Return a function that calls `module.name`. The module, which can need Triton, is imported by the first call."""

    def call(*args: Any) -> Any:
        return getattr(import_module(module), name)(*args)

    return call


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
    autocast: Callable[..., tuple[Any, ...]] | None = None,
) -> OpOverload:
    """Register `srm::name(arguments, str backend) -> returns` with its fake implementation and its derivative.

    `srm::name_backward` computes the derivative, a vector-Jacobian product, from the saved inputs. Gradients are
    contiguous. Second derivatives (`create_graph=True`) use the backend "reference", which autograd can differentiate.
    A call that is differentiated under torch.func or by forward-mode differentiation runs the reference instead of the
    operator.

    Args:
        name: Name of the operator.
        arguments: Arguments of the operator, as in a torch schema. An argument whose type is in `options.WRITTEN` is
            replaced by the fields of this type, because torch does not know the type.
        returns: Results of the operator, as in a torch schema. All results are contiguous, except for the first one if
            `like` is given.
        implementations: Backend → function of `arguments`. "reference" is required.
        fake: Function of `arguments` that returns empty tensors of the right shapes, for torch.compile and export.
        differentiable: Names of the differentiable arguments.
        like: Name of an argument. The first result has the layout that `torch.empty_like` gives for this argument.
        derivatives: Backend → function `(grads, results, *arguments)`. The function returns a gradient for each tensor
            among the differentiable arguments, in the order of the arguments. If `derivatives` has no function for the
            backend "triton", autograd differentiates the reference. If it has no function for "reference" or "torch",
            autograd differentiates the implementation of that backend. If `derivatives` or `recalled` is given, the
            forward pass also saves the results of the operator for the backward pass.
        constant: Indices of results without a gradient. Results that are not floating point never have a gradient.
        recalled: Name of an argument → index of the result that replaces this argument in the backward pass. If
            autograd differentiates an implementation, the backward pass runs this implementation a second time. The
            second run then receives, for example, the landmarks that the forward pass chose, and does not choose
            landmarks again.
        autocast: Function that casts `arguments` under autocast; see `autocast.py`.

    Returns:
        The operator.
    """
    kinds = _kinds(arguments)
    implementations = {key: _packed(function, kinds) for key, function in implementations.items()}
    own = {key: _packed(function, kinds, 2) for key, function in (derivatives or {}).items()}
    for old, new in RENAMED.items():  # programs that the last release exported use the old names
        for functions in (implementations, own):
            if new in functions:
                functions[old] = functions[new]
    while found := WRITTEN.keys() & set(_kinds(arguments)):
        for kind in found:
            arguments = re.sub(rf"\b{kind} \w+", WRITTEN[kind].SCHEMA, arguments)
    schema = f"({arguments}, str backend) -> {returns}"
    names = [argument.split()[-1].split("=")[0] for argument in f"{arguments}, str backend".split(",")]
    differentiables = [names.index(argument) for argument in differentiable]
    known = {names.index(argument): number for argument, number in (recalled or {}).items()}

    def forward(*args: Any) -> Any:
        *inputs, backend = args
        for found in _running:
            found.setdefault(name, set()).add(backend)
        with no_autocast(inputs):
            result = implementations[backend](*inputs)
        first, *rest = result if isinstance(result, tuple) else (result,)
        first = first.contiguous() if like is None else _laid_out(first, inputs[names.index(like)])
        return (first, *(t.contiguous() for t in rest)) if isinstance(result, tuple) else first

    operator = _define(name, schema, forward, lambda *args: fake(*args[:-1]))
    _register_vmap(operator)
    if autocast is not None:
        _register_autocast(operator, autocast)
    if not differentiables:
        _register_autograd(operator)
        return operator

    def present(inputs: Sequence[Any]) -> list[Place]:
        return [place for place in _places(inputs) if place[0] in differentiables]

    def carriers(outputs: Sequence[Tensor]) -> list[int]:
        return [i for i, value in enumerate(outputs) if value.is_floating_point() and i not in constant]

    def recall(inputs: Sequence[Any], results: Sequence[Tensor]) -> list[Any]:
        inputs = _copied(inputs)
        for index, number in known.items():
            inputs[index] = results[number]
        return inputs

    def derivative(grads: Sequence[Tensor], results: Sequence[Tensor], *args: Any) -> list[Tensor]:
        *inputs, backend = args
        if backend in own:
            with no_autocast(inputs):
                return [product.contiguous() for product in own[backend](grads, results, *inputs)]
        wanted = present(inputs)
        inputs = recall(inputs, results)
        function = implementations["reference" if backend in OPAQUE else backend]
        with recording(), no_autocast(inputs):
            for place in wanted:
                _put(inputs, place, _at(inputs, place).detach().requires_grad_())
            products = _product(function, inputs, wanted, carriers, grads, create_graph=False)
        given = {grad.untyped_storage().data_ptr() for grad in grads}
        return [_apart(product, given) for product in products]

    backward_operator = _define(
        f"{name}_backward",
        f"(Tensor[] grads, Tensor[] results, {arguments}, str backend) -> Tensor[]",
        derivative,
        lambda grads, results, *args: [
            torch.empty(t.shape, dtype=t.dtype, device=t.device)
            for t in (_at(args, place) for place in present(args))
        ],
    )
    _register_autograd(backward_operator)

    def plainly(*args: Any) -> Any:
        """Run the reference, whose operations every transform of torch supports."""
        inputs = args[:-1]
        with no_autocast(inputs):
            outputs = implementations["reference"](*_copied(inputs))
        if not isinstance(outputs, tuple):
            return outputs.contiguous()
        return tuple((t.detach() if i in constant else t).contiguous() for i, t in enumerate(outputs))

    def setup(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
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
        inputs = _copied(ctx.others)
        saved = list(ctx.saved_tensors)
        results = saved[len(ctx.places) :]
        for place, tensor in zip(ctx.places, saved, strict=False):
            _put(inputs, place, tensor)
        wanted = present(inputs)
        grads = [grad_outputs[index] for index in ctx.carriers]
        again = torch.is_grad_enabled()
        if again or transforming():
            plain = recall(inputs[:-1], results)
            with no_autocast(plain), torch.enable_grad():
                for place in wanted:  # an alias for each, because one input can depend on another
                    tensor = _at(plain, place)
                    alias = tensor.view_as(tensor)
                    _put(plain, place, alias if alias.requires_grad else alias.requires_grad_())
                products = _product(
                    implementations["reference"], plain, wanted, carriers, grads, create_graph=again
                )
        else:
            products = backward_operator(grads, results, *inputs)
        by_place = dict(zip(wanted, products, strict=True))
        needed = ctx.needs_input_grad[-len(ctx.places) :]
        return tuple(
            by_place.get(place) if need else None for place, need in zip(ctx.places, needed, strict=True)
        )

    _register_autograd(operator, _Rules(plainly, setup, backward))
    return operator


@contextmanager
def recording() -> Iterator[None]:
    """Enable autograd in the context. This is needed inside an operator, where the dispatcher disables autograd."""
    autograd = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with autograd, torch.enable_grad():
        yield


def _kinds(arguments: str) -> list[str]:
    return [argument.split()[0] for argument in arguments.split(",")]


def _packed(function: Implementation, kinds: Sequence[str], ahead: int = 0) -> Implementation:
    """Wrap `function`, which has arguments of the types in `options.WRITTEN`.

    The types in `options.WRITTEN` are dataclasses, which torch does not accept as arguments of an operator. The wrapper
    therefore takes the fields of each dataclass as separate arguments. It builds the dataclasses from the fields, and
    calls `function` with them. The first `ahead` arguments are passed to `function` unchanged.

    Args:
        function: The function to wrap.
        kinds: Types of the arguments of `function`, except for its first `ahead` arguments. The types are written as in
            a torch schema.
        ahead: Number of arguments at the start of `function` whose types are not in `kinds`.
    """
    if not WRITTEN.keys() & set(kinds):
        return function

    def taken(kind: str, flat: Iterator[Any]) -> Any:
        if kind not in WRITTEN:
            return next(flat)
        return WRITTEN[kind](*(taken(part, flat) for part in _kinds(WRITTEN[kind].SCHEMA)))

    def call(*args: Any) -> Any:
        flat = iter(args[ahead:])
        return function(*args[:ahead], *(taken(kind, flat) for kind in kinds))

    return call


def _define(name: str, schema: str, implementation: Implementation, fake: Callable[..., Any]) -> OpOverload:
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, torch._disable_dynamo(implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"srm::{name}", fake, lib=_library)
    overload: OpOverload = getattr(torch.ops.srm, name).default
    return overload


def _register_vmap(operator: OpOverload) -> None:
    @torch._disable_dynamo
    def one_by_one(info: Any, dims: Sequence[Any], *args: Any) -> Any:
        results = [operator(*_entry(list(args), list(dims), i)) for i in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])

    torch.library.register_vmap(operator.name(), one_by_one, lib=_library)


def _register_autocast(operator: OpOverload, rule: Callable[..., tuple[Any, ...]]) -> None:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    keys = keys | torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)

    @torch._disable_dynamo
    def kernel(*args: Any) -> Any:
        *inputs, backend = args
        cast = rule(*inputs)  # before the guard, because autocast appears disabled inside it
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return operator(*cast, backend)

    for key in ("AutocastCPU", "AutocastCUDA"):
        _library.impl(operator._opname, kernel, key)


class _Rules(NamedTuple):
    """How autograd differentiates an operator."""

    plainly: Implementation  # the operator in operations of torch
    setup: Callable[[Any, Sequence[Any], Any], None]
    backward: Callable[..., tuple[Any, ...]]  # gradients of the tensors among the arguments, in their order


class _Recorded(torch.autograd.Function):
    """The autograd function of an operator call. `tensors` are the tensors among the arguments of the call."""

    @staticmethod
    def forward(ctx: Any, run: Implementation, rules: _Rules, args: Sequence[Any], *tensors: Tensor) -> Any:
        result = run(*args)
        ctx.rules = rules
        rules.setup(ctx, args, result)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, None, None, *ctx.rules.backward(ctx, *grads)


def _register_autograd(operator: OpOverload, rules: _Rules | None = None) -> None:
    """Register the autograd behaviour of an operator. Without rules, its results have no gradient."""
    node: Any = type(operator._opname, (_Recorded,), {})  # the name that profilers show

    @torch._disable_dynamo
    def kernel(keyset: Any, *args: Any) -> Any:
        def run(*args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)

        if rules is None:
            return run(*args)
        if _plain:
            return rules.plainly(*args)
        tensors = [_at(args, place) for place in _places(args)]
        recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        if transforming() and (recorded or any(map(_has_tangent, tensors))):
            return rules.plainly(*args)
        return node.apply(run, rules, args, *tensors) if recorded else run(*args)

    _library.impl(operator._opname, kernel, "Autograd", with_keyset=True)


def _has_tangent(tensor: Tensor | None) -> bool:
    return tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None


def _is_tensors(value: Any) -> bool:
    """Return whether `value` is a list in which each entry is a tensor or None. As in torch, the list may be empty."""
    return isinstance(value, list) and all(isinstance(t, Tensor) or t is None for t in value)


def _places(inputs: Sequence[Any]) -> list[Place]:
    places: list[Place] = []
    for index, value in enumerate(inputs):
        if isinstance(value, Tensor):
            places.append((index, None))
        elif _is_tensors(value):
            places += [(index, position) for position in range(len(value))]
    return places


def _entry(value: Any, dim: Any, i: int) -> Any:
    """Return sample i of a value that is batched along `dim`.

    If `value` is a list, `dim` is either a list with one axis for each element, or a single axis for all elements. A
    value or an element whose axis is None is not batched, and is returned unchanged.
    """
    if isinstance(value, list):
        dims = dim if isinstance(dim, list | tuple) else [dim] * len(value)
        return [_entry(part, d, i) for part, d in zip(value, dims, strict=True)]
    return value.select(dim, i) if isinstance(value, Tensor) and dim is not None else value


def _copied(inputs: Sequence[Any]) -> list[Any]:
    return [list(value) if isinstance(value, list) else value for value in inputs]


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
) -> Sequence[Tensor]:
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    carrying = [outputs[index] for index in carriers(outputs)]
    variables = [_at(inputs, place) for place in wanted]
    pairs = [(output, grad) for output, grad in zip(carrying, grads, strict=True) if output.requires_grad]
    return torch.autograd.grad(
        [output for output, _ in pairs],
        variables,
        [grad for _, grad in pairs],
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )


def _apart(product: Tensor, given: set[int]) -> Tensor:
    """Return `product` as a contiguous tensor with memory of its own.

    An operator must not return one of its inputs, or a view of another tensor. In these two cases, `product` is copied.
    `given` contains the memory addresses of the gradients that the operator received as inputs.
    """
    product = product.contiguous()
    memory = product.untyped_storage()
    alone = memory.nbytes() == product.numel() * product.element_size() and memory.data_ptr() not in given
    return product if alone else product.clone()


def _laid_out(result: Tensor, model: Tensor) -> Tensor:
    promised = torch.empty_like(model, dtype=result.dtype, device="meta")  # only for its strides
    if result.stride() == promised.stride():
        return result
    return torch.empty_like(model, dtype=result.dtype).copy_(result)


def no_autocast(inputs: Sequence[Any]) -> AbstractContextManager[Any]:
    """Disable autocast on the device of the first tensor: operators choose their own precision."""
    device = _at(inputs, _places(inputs)[0]).device.type
    off = device == "meta" or not torch.is_autocast_enabled(device)
    return nullcontext() if off else torch.autocast(device, enabled=False)
