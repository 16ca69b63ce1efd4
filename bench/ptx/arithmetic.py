"""Arithmetic of PTX on arrays of lanes.

The value of a register is a NumPy array of unsigned integers, one for each lane, or a scalar that all lanes share.
"""

from __future__ import annotations

from typing import Any

import numpy as np

u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64
i1, i2, i4, i8 = np.int8, np.int16, np.int32, np.int64
f2, f4, f8 = np.float16, np.float32, np.float64
UNSIGNED = {1: u1, 2: u2, 4: u4, 8: u8}
SIGNED = {1: i1, 2: i2, 4: i4, 8: i8}
where = np.where
TINY = f4(2.0**-126)


def bf_wide(x: Any) -> Any:
    """Widen bf16 bits to fp32."""
    return (x.astype(u4) << u4(16)).view(f4)


def bf_round(x: Any) -> Any:
    """Round fp32 to bf16 bits, to nearest even."""
    bits = np.asarray(x, f4).view(u4)
    rounded = (bits + (u4(0x7FFF) + ((bits >> u4(16)) & u4(1)))) >> u4(16)
    return where(np.isnan(np.asarray(x)), u4(0x7FFF), rounded).astype(u2)


def bf_truncate(x: Any) -> Any:
    """Round fp32 to bf16 bits, toward zero."""
    bits = np.asarray(x, f4).view(u4)
    return where(np.isnan(np.asarray(x)), u4(0x7FFF), bits >> u4(16)).astype(u2)


def bf_round64(x: Any) -> Any:
    """Round fp64 to bf16 bits, to nearest even.

    The numbers are first rounded to fp32, and then to bf16. The first rounding is to odd, not to nearest; otherwise,
    the two roundings could give another result than one direct rounding from fp64 to bf16.
    """
    x = np.asarray(x, f8)
    near = x.astype(f4)
    bits = near.view(u4)
    inexact = (near.astype(f8) != x) & np.isfinite(near)
    toward = np.abs(near.astype(f8)) > np.abs(x)
    cut = bits - toward.astype(u4)
    return bf_round(where(inexact, cut | u4(1), bits).view(f4))


def half_wide(x: Any) -> Any:
    """Widen fp16 bits to fp32."""
    return x.view(f2).astype(f4)


def half_round(x: Any) -> Any:
    """Round floats to fp16 bits, to nearest even."""
    return np.asarray(x).astype(f2).view(u2)


def tf32_rna(x: Any) -> Any:
    """Round fp32 to tf32 bits, ties away from zero."""
    bits = np.asarray(x, f4).view(u4)
    finite = (bits & u4(0x7F800000)) != u4(0x7F800000)
    return where(finite, (bits + u4(0x1000)) & u4(0xFFFFE000), bits)


def tf32_rn(x: Any) -> Any:
    """Round fp32 to tf32 bits, to nearest even."""
    bits = np.asarray(x, f4).view(u4)
    finite = (bits & u4(0x7F800000)) != u4(0x7F800000)
    even = bits + (u4(0xFFF) + ((bits >> u4(13)) & u4(1)))
    return where(finite, even & u4(0xFFFFE000), bits)


def ftz(x: Any) -> Any:
    """Flush subnormal fp32 to zero."""
    return where(np.abs(x) < TINY, x * f4(0), x)


def pairs(group: Any, x: Any) -> Any:
    """Return the two fp32 numbers in the 64-bit register of each lane, as a flat array (2 · lanes,)."""
    return np.ascontiguousarray(group.full(x)).view(f4)


def fma(a: Any, b: Any, c: Any) -> Any:
    """Return a·b + c in fp32, computed in fp64."""
    return (a.astype(f8) * b.astype(f8) + c.astype(f8)).astype(f4)


def saturate(x: Any) -> Any:
    """Clamp to [0, 1], NaN to 0 (.sat)."""
    return np.fmin(np.fmax(x, f4(0)), f4(1))


def shl(x: Any, n: Any) -> Any:
    """Shift left. If n is greater than or equal to the width, the result is 0."""
    bits = x.dtype.itemsize * 8
    return where(n < u4(bits), x << np.minimum(n, u4(bits - 1)).astype(x.dtype), x.dtype.type(0))


def shr(x: Any, n: Any) -> Any:
    """Shift right, arithmetically for signed types.

    If n is greater than or equal to the width, every bit of the result is the sign bit (signed types) or 0 (unsigned
    types).
    """
    bits = x.dtype.itemsize * 8
    if x.dtype.kind == "i":
        return x >> np.minimum(n, u4(bits - 1)).astype(x.dtype)
    return where(n < u4(bits), x >> np.minimum(n, u4(bits - 1)).astype(x.dtype), x.dtype.type(0))


def _funnel(lo: Any, hi: Any, n: Any, wrap: bool) -> tuple[Any, Any]:
    """Return the 64-bit number (hi, lo) and the shift count, which is n mod 32 with `wrap`, otherwise min(n, 32)."""
    n = (n & u4(31)) if wrap else np.minimum(n, u4(32))
    return _joined(lo, hi), np.asarray(n).astype(u8)


def _joined(lo: Any, hi: Any) -> Any:
    return (np.asarray(hi).astype(u8) << u8(32)) | np.asarray(lo).astype(u8)


def funnel_left(lo: Any, hi: Any, n: Any, wrap: bool) -> Any:
    """Shift the 64-bit number (hi, lo) left and return its upper 32 bits (shf.l)."""
    both, n = _funnel(lo, hi, n, wrap)
    return ((both << n) >> u8(32)).astype(u4)


def funnel_right(lo: Any, hi: Any, n: Any, wrap: bool) -> Any:
    """Shift the 64-bit number (hi, lo) right and return its lower 32 bits (shf.r)."""
    both, n = _funnel(lo, hi, n, wrap)
    return (both >> n).astype(u4)


def divide(a: Any, b: Any) -> Any:
    """Divide integers toward zero; division by zero sets all bits, like the hardware."""
    a, b = np.asarray(a), np.asarray(b)
    safe = where(b == 0, a.dtype.type(1), b)
    quotient = a // safe
    if a.dtype.kind == "i":
        quotient = quotient + ((quotient * safe != a) & ((a < 0) != (safe < 0))).astype(a.dtype)
    return where(b == 0, a.dtype.type(-1) if a.dtype.kind == "i" else ~a.dtype.type(0), quotient)


def remainder(a: Any, b: Any) -> Any:
    """Return the remainder of `divide`."""
    return np.asarray(a) - divide(a, b) * np.asarray(b)


def high(a: Any, b: Any) -> Any:
    """Return the upper half of a product."""
    if a.dtype.itemsize < 8:
        wide = i8 if a.dtype.kind == "i" else u8
        return (a.astype(wide) * b.astype(wide) >> wide(8 * a.dtype.itemsize)).astype(a.dtype)
    if a.dtype.kind == "i":
        a, b = np.asarray(a), np.asarray(b)
        unsigned = high(a.view(u8), b.view(u8)).view(i8)
        return unsigned - where(a < 0, b, i8(0)) - where(b < 0, a, i8(0))
    a0, a1, b0, b1 = a & u8(0xFFFFFFFF), a >> u8(32), b & u8(0xFFFFFFFF), b >> u8(32)
    middle = a1 * b0 + (a0 * b0 >> u8(32))
    other = a0 * b1 + (middle & u8(0xFFFFFFFF))
    return a1 * b1 + (middle >> u8(32)) + (other >> u8(32))


def _lowest(length: Any, unsigned: Any) -> Any:
    """Return a mask of the lowest `length` bits."""
    one = unsigned(1) + np.zeros_like(length).astype(unsigned)
    bits = unsigned().itemsize * 8
    return where(length >= u4(bits), ~unsigned(0), shl(one, length) - unsigned(1))


def extract(x: Any, start: Any, length: Any) -> Any:
    """Extract a bit field, sign-extended for signed types (bfe)."""
    bits = x.dtype.itemsize * 8
    unsigned = UNSIGNED[x.dtype.itemsize]
    start, length = np.asarray(start & u4(255)), np.asarray(length & u4(255))
    keep = _lowest(length, unsigned)
    field = shr(np.asarray(x).view(unsigned), start) & keep
    if x.dtype.kind == "u":
        return field
    last = np.minimum(start + length - u4(1), u4(bits - 1))
    sign = (shr(np.asarray(x).view(unsigned), last) & unsigned(1)).astype(bool) & (length > 0)
    return where(sign, field | ~keep, field).view(x.dtype)


def insert(a: Any, b: Any, start: Any, length: Any) -> Any:
    """Insert the lowest bits of a into b (bfi)."""
    unsigned = UNSIGNED[b.dtype.itemsize]
    start, length = np.asarray(start & u4(255)), np.asarray(length & u4(255))
    keep = shl(np.asarray(_lowest(length, unsigned), unsigned), start)
    return (b & ~keep) | (shl(np.asarray(a, unsigned), start) & keep)


def permute(a: Any, b: Any, c: Any) -> Any:
    """Select four bytes of a and b by the nibbles of c (prmt)."""
    both, c = _joined(a, b), np.asarray(c)
    result: Any = u4(0)
    for i in range(4):
        pick = (c >> u4(4 * i)) & u4(15)
        byte = ((both >> ((pick & u4(7)).astype(u8) * u8(8))) & u8(255)).astype(u4)
        byte = where(pick & u4(8), where(byte & u4(128), u4(255), u4(0)), byte)
        result = result | (byte << u4(8 * i))
    return result


def lop3(a: Any, b: Any, c: Any, table: int) -> Any:
    """Apply a logical function of three operands, given by its truth table."""
    result: Any = u4(0)
    for i in range(8):
        if table >> i & 1:
            result = result | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
    return result


def leading(x: Any) -> Any:
    """Return the index of the highest set bit, -1 for 0."""
    x = np.asarray(x).astype(u8)
    result = np.full(x.shape, -1, i8)
    for step in (32, 16, 8, 4, 2, 1):
        big = x >= (u8(1) << u8(step))
        x = where(big, x >> u8(step), x)
        result = result + where(big, i8(step), i8(0))
    return where(x > 0, result + 1, i8(-1))


def reverse(x: Any) -> Any:
    """Reverse the order of 32 bits."""
    for mask, n in ((0x55555555, 1), (0x33333333, 2), (0x0F0F0F0F, 4), (0x00FF00FF, 8), (0x0000FFFF, 16)):
        x = ((x >> u4(n)) & u4(mask)) | ((x & u4(mask)) << u4(n))
    return x


def to_int(x: Any, kind: Any, mode: str) -> Any:
    """Convert a float to an integer with saturation, NaN to zero."""
    rounded = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[mode](
        np.asarray(x).astype(f8)
    )
    limits = np.iinfo(kind)
    clipped = np.clip(
        np.nan_to_num(rounded, nan=0.0, posinf=np.inf, neginf=-np.inf), float(limits.min), float(limits.max)
    )
    big = clipped >= float(limits.max)
    return where(big, kind(limits.max), where(big, 0.0, clipped).astype(kind))


def exp2(x: Any, flush: bool) -> Any:
    """Return 2^x; with `flush`, subnormal inputs and results are zero."""
    return ftz(np.exp2(ftz(x))) if flush else np.exp2(x)


COMPARE = {
    "eq": "({a} == {b})",
    "ne": "({a} != {b})",
    "lt": "({a} < {b})",
    "le": "({a} <= {b})",
    "gt": "({a} > {b})",
    "ge": "({a} >= {b})",
    "lo": "({a} < {b})",
    "ls": "({a} <= {b})",
    "hi": "({a} > {b})",
    "hs": "({a} >= {b})",
}
COMPARE_FLOAT = COMPARE | {
    "ne": "(({a} < {b}) | ({a} > {b}))",
    "equ": "~(({a} < {b}) | ({a} > {b}))",
    "neu": "({a} != {b})",
    "ltu": "~({a} >= {b})",
    "leu": "~({a} > {b})",
    "gtu": "~({a} <= {b})",
    "geu": "~({a} < {b})",
    "num": "(({a} == {a}) & ({b} == {b}))",
    "nan": "(({a} != {a}) | ({b} != {b}))",
}
