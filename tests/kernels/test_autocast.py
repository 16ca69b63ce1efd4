"""Tests of operators whose arguments have different dtypes.

Under autocast, the arguments of attention are cast to autocast's dtype, as torch casts the arguments of its own
attention. If the first argument of an operator in `PROMOTED` is fp32, narrower arguments are cast to fp32. Without
autocast, or if one of the dtypes is fp64, attention, `landmark_side` and `landmark_solve` raise a TypeError.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from oracle import tokens
from test_operator_registration import CALLS, Recorder, leaves_of
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from srm_kernels import full_attention, landmark_side, landmark_solve, nystrom_attention

F32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
MIXES = [mix for mix in itertools.product((F32, BF16, FP16), repeat=3) if len(set(mix)) > 1]
DEVICE = "cpu"  # for CUDA, `test_rules_are_registered_for_both_devices` only checks that the rules exist
SEVERAL = [name for name, (_, make) in CALLS.items() if len(make()) > 1]
# Attention takes Q, K and V in one dtype. Other operators accept parameters with a wider dtype than their input.
ATTENTION = {
    "nystrom_attention": lambda q, k, v: nystrom_attention(q, k, v, 4),
    "full_attention": full_attention,
}


def mixed(name: str, mix: tuple[torch.dtype, ...]) -> list[Tensor]:
    dtypes = itertools.cycle(mix)
    return [x.to(next(dtypes)).requires_grad_() for x in CALLS[name][1](F32)]


@pytest.mark.parametrize("name", SEVERAL)
def test_every_public_function_takes_every_mix_under_autocast(name):
    """Each gradient has the dtype of its argument."""
    function, make = CALLS[name]
    expected = leaves_of(function(*make(F32)))
    for mix in MIXES:
        inputs = mixed(name, mix)
        with torch.autocast(DEVICE, BF16):
            found = leaves_of(function(*inputs))
        carrying = [out for out in found if out.requires_grad]
        grads = torch.autograd.grad(sum(o.float().sum() for o in carrying), inputs, materialize_grads=True)
        assert [g.dtype for g in grads] == [x.dtype for x in inputs]
        for one, other in zip(found, expected, strict=True):
            assert one.shape == other.shape
            assert not one.is_floating_point() or one.isfinite().all()


PROMOTED = ("landmark_solve", "dyt", "biased_gelu", "gate_logits", "gated_fusion", "tau_loss")


@pytest.mark.parametrize("name", PROMOTED)
def test_what_is_no_product_is_promoted_to_the_widest(name):
    function = CALLS[name][0]
    for mix in MIXES:
        if mix[0] == F32:
            inputs = mixed(name, mix)
            with torch.autocast(DEVICE, BF16):
                found = leaves_of(function(*inputs))
            for one, other in zip(found, leaves_of(function(*(x.float() for x in inputs))), strict=True):
                assert torch.equal(one, other)


@pytest.mark.parametrize("operator", ATTENTION)
@pytest.mark.parametrize("mix", MIXES)
def test_attention_is_cast_as_torchs_own(operator, mix):
    q, k, v = (tokens(i, 1, 2, 16, 8, dtype=dtype) for i, dtype in enumerate(mix))
    with torch.autocast(DEVICE, BF16):
        found = ATTENTION[operator](q, k, v)
        assert found.dtype == scaled_dot_product_attention(q, k, v).dtype == BF16
    assert torch.equal(found, ATTENTION[operator](*(x.to(BF16) for x in (q, k, v))))


def test_tensors_that_agree_keep_their_dtype():
    q, k, v = (tokens(i, 1, 2, 16, 8, dtype=F32) for i in range(3))
    with torch.autocast(DEVICE, BF16):
        assert torch.equal(nystrom_attention(q, k, v, 4), nystrom_attention(q, k, v, 4))
        assert nystrom_attention(q, k, v, 4).dtype == F32


@pytest.mark.parametrize("call", [
    lambda q, k, v: nystrom_attention(q, k, v, 4),
    lambda q, k, v: full_attention(q, k, v),
    lambda q, k, v: landmark_side(k, v, 4),
    lambda q, k, v: landmark_solve(k @ k.mT, v),
])  # fmt: skip
def test_without_autocast_and_in_fp64_a_mix_is_a_type_error(call):
    q, k, v = (tokens(i, 1, 2, 16, 8, dtype=dtype) for i, dtype in enumerate((BF16, F32, BF16)))
    with pytest.raises(TypeError, match="expected one dtype"):
        call(q, k, v)
    with torch.autocast(DEVICE, BF16), pytest.raises(TypeError, match="expected one dtype"):
        call(q, k.double(), v)


def test_rules_are_registered_for_both_devices():
    """Operators with several tensor arguments have casting rules for the CPU and CUDA, with two exceptions.

    `select_landmarks` and `landmark_diagnostics` have no casting rules.
    """
    for name in SEVERAL:
        with Recorder() as recorder:
            CALLS[name][0](*CALLS[name][1]())
        for operator in recorder.calls:
            several = sum("Tensor" in str(a.type) for a in operator._schema.arguments) > 1
            if several and operator._opname not in ("select_landmarks", "landmark_diagnostics"):
                for key in ("AutocastCPU", "AutocastCUDA"):
                    assert torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), key), operator


def called(name: str) -> Any:
    """Return the first operator that a public function calls, except `select_landmarks`, and its arguments in fp32."""
    with Recorder() as recorder:
        CALLS[name][0](*CALLS[name][1](F32))
    operator, calls = next((o, c) for o, c in recorder.calls.items() if o._opname != "select_landmarks")
    return operator, calls[0][0]


@pytest.mark.parametrize("name", [n for n in SEVERAL if n not in ("full_attention",)])
def test_the_operators_themselves_are_cast_too(name):
    """Registered operators cast their arguments themselves, without the public functions that call them.

    An exported program calls the operators directly. If it runs under autocast, its other steps can pass tensors of
    different dtypes to an operator.
    """
    operator, args = called(name)
    dtypes = itertools.cycle((BF16, F32, F32, BF16))

    def narrow(value: Any) -> Any:
        if isinstance(value, list) and value and isinstance(value[0], Tensor):
            return [narrow(item) for item in value]
        keep = not isinstance(value, Tensor) or not value.is_floating_point()
        return value if keep else value.to(next(dtypes))

    expected = leaves_of(operator(*args))
    with torch.autocast(DEVICE, BF16):
        found = leaves_of(operator(*map(narrow, args)))
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert not one.is_floating_point() or one.isfinite().all()


def test_an_operator_rounds_as_its_public_function_does():
    operator, (query, *others) = called("nystrom_attention")
    rounded = [x.to(BF16) if isinstance(x, Tensor) and x.is_floating_point() else x for x in (query, *others)]
    with torch.autocast(DEVICE, BF16):
        found = operator(query.to(BF16), *others)
    assert torch.equal(found, operator(*rounded))


def test_autocast_compiles():
    q, k, v = (tokens(i, 1, 2, 16, 8, dtype=dtype) for i, dtype in enumerate((BF16, F32, BF16)))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast(DEVICE, BF16):
            return nystrom_attention(q, k, v, 4)

    torch.compiler.reset()
    assert torch.equal(torch.compile(attend, fullgraph=True, backend="aot_eager")(q, k, v), attend(q, k, v))
