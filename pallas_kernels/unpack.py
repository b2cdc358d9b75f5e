# SPDX-License-Identifier: Apache-2.0
"""How kernels read the codes of narrow weights: words of several codes become tiles of bfloat16 or float16.

A word has a code in each of its places. All words' codes in one place are unpacked at a time, by two or three integer
instructions for two codes: they put the bits of a code into the mantissa of a number whose other bits are known, such
as 128 in bfloat16, so that the value is that of the code plus a bias. Subtracting the bias is exact. Triton does not
find such instructions by itself: its own conversion takes about ten times as many.

The interpreter has no inline assembly. It computes the same values by plain jax.numpy; tests run the assembly below in
an emulator of the few instructions in it.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import triton as plt

from pallas_kernels import dispatch

BF16, F16 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)
FLOAT8 = (jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e5m2))
_ONE_PER_UNIT = {BF16: 0x4300, F16: 0x6400}  # 128 and 1024: the lowest bit of the mantissa counts 1
_SIGNED = 0x08  # this bit flipped, a signed code of 4 bits is one from 0 to 15, 8 above its value


@dataclass(frozen=True)
class Float8Bits:
    """Where a float8's exponent and mantissa go in a wider float: below its sign by `shift`, within `mask`. The
    exponents' biases differ, so the value has to be multiplied by `factor`."""

    shift: int
    mask: int
    factor: float


_FLOAT8 = {
    (FLOAT8[0], BF16): Float8Bits(4, 0x07F0, 2.0**120),
    (FLOAT8[0], F16): Float8Bits(1, 0x3F80, 2.0**8),
    (FLOAT8[1], BF16): Float8Bits(3, 0x0FE0, 2.0**112),
    (FLOAT8[1], F16): Float8Bits(0, 0x7FFF, 1.0),
}


@dataclass(frozen=True)
class Form:
    """The codes of a weight as a kernel reads them."""

    codes: jnp.dtype  # int8, uint8 or a float8; 4-bit codes are of the first two
    bits: int  # 4 or 8
    places: int  # codes of a word: 4 in 16 bits, or 1 in a byte

    @property
    def word(self) -> jnp.dtype:
        return jnp.dtype(jnp.uint16 if self.places == 4 else jnp.uint8)

    @property
    def signed(self) -> bool:
        return self.codes == jnp.int8

    def words(self, codes: jax.Array) -> jax.Array:
        """Codes [n, bytes] as words [n, words]: the same bytes."""
        if self.places == 4:
            codes = codes.reshape(codes.shape[0], -1, 2)
        return lax.bitcast_convert_type(codes, self.word)

    def bias(self, dtype: jnp.dtype) -> float:
        """What `unpack` adds to each code."""
        if self.bits == 4:
            return (128.0 if dtype == BF16 else 1024.0) + (8.0 if self.signed else 0.0)
        return 1152.0 if self.codes == jnp.int8 and dtype == F16 else 0.0

    def unpack(self, words: jax.Array, place: int, dtype: jnp.dtype) -> jax.Array:
        """The codes in one place of these words plus the bias, exactly, in bfloat16 or float16."""
        if dispatch.implementation() == "interpret":
            return self._plainly(words, place, dtype)
        if self.bits == 4:
            return _run(self.assembly(place, dtype)[0], words, dtype)
        first, *others = (_run(asm, words, dtype) for asm in self.assembly(place, dtype))
        if self.codes == jnp.int8:
            return first - others[0] if others else first
        factor = _FLOAT8[self.codes, dtype].factor
        return first if factor == 1 else first * jnp.asarray(factor, dtype)

    def assembly(self, place: int, dtype: jnp.dtype) -> tuple[str, ...]:
        """Two words of 16 bits become two floats ($0 of $1), four bytes become four ($0 and $1 of $2). The values of
        int8 in bfloat16 are the difference of two results; see `unpack` for float8."""
        magic = _ONE_PER_UNIT[dtype]
        if self.places == 4:
            shift = f"shr.b32 t, $1, {4 * place};" if place else "mov.b32 t, $1;"
            flip = magic | (_SIGNED if self.signed else 0)
            return (f"{{ .reg .b32 t; {shift} lop3.b32 $0, t, 0x000f000f, {_twice(flip)}, 0x6a; }}",)
        if self.codes == jnp.int8 and dtype == F16:
            return (_bytes("xor.b32 t, $2, 0x80808080;", "low", magic >> 8, "mov.b32 {out}, u;"),)
        if self.codes == jnp.int8:  # 7 bits, less 128, or 256 where the sign bit is set
            kept = (f"lop3.b32 {{out}}, u, {_twice(mask)}, {_twice(magic)}, 0x6a;" for mask in (0x7F, 0x80))
            return tuple(_bytes("mov.b32 t, $2;", "low", 0, each) for each in kept)
        bits = _FLOAT8[self.codes, dtype]
        moved = f"shr.b32 v, u, {bits.shift}; and.b32 v, v, {_twice(bits.mask)};"
        return (_bytes("mov.b32 t, $2;", "high", 0, f"{moved} lop3.b32 {{out}}, u, 0x80008000, v, 0xea;"),)

    def _plainly(self, words: jax.Array, place: int, dtype: jnp.dtype) -> jax.Array:
        if self.bits == 8:
            values = lax.bitcast_convert_type(words, self.codes).astype(jnp.float32)
        else:
            code = jnp.right_shift(words, words.dtype.type(4 * place)) & words.dtype.type(15)
            values = code.astype(jnp.int32)
            values = (jnp.where(values > 7, values - 16, values) if self.signed else values).astype(jnp.float32)
        return (values + np.float32(self.bias(dtype))).astype(dtype)


def _twice(half: int) -> str:
    return f"0x{half:04x}{half:04x}"


def _bytes(prepare: str, half: str, other: int, finish: str) -> str:
    """Spreads four bytes, which `prepare` leaves in t, over the low or high halves of 16 bits, with `other` as the
    other half, into u; `finish` makes two floats of them."""
    spread = {"low": ("0x4140", "0x4342"), "high": ("0x1404", "0x3424")}[half]
    steps = (
        f"prmt.b32 u, t, 0x{other * 0x01010101:08x}, {selector}; {finish.format(out=out)}"
        for selector, out in zip(spread, ("$0", "$1"), strict=True)
    )
    return f"{{ .reg .b32 t, u, v; {prepare} {' '.join(steps)} }}"


def _run(asm: str, words: jax.Array, dtype: jnp.dtype) -> jax.Array:
    wide = words.dtype == jnp.uint16
    result: Any = jax.ShapeDtypeStruct(words.shape, dtype)
    [found] = plt.elementwise_inline_asm(
        asm,
        args=[words],
        constraints="=r,r" if wide else "=&r,=&r,r",
        pack=2 if wide else 4,
        result_shape_dtypes=[result],
    )
    return found
