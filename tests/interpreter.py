"""Mends of Triton's interpreter, which runs kernels on the CPU. Import this before kernels.py, in a process of its own.

The interpreter keeps bf16 as the uint16 of its bits. Its `dot` multiplies these integers, and its cast from fp32 drops
the low bits, where a GPU rounds to the nearest even. Sums of two bf16 values are wrong too and are not mended, because
the kernels work in fp32. With NumPy 2.4 a number on the device cannot be a loop's end.
Each call in a kernel prepares triton.language anew, which takes half of the time; here the first call of a module does.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def to_float(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """The bits of fp32 values rounded to bf16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def mend() -> None:
    cast, dot, patch = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot, interpreter._patch_lang_tensor

    def cast_impl(self, src, dst_type):
        pair = src.dtype.scalar, dst_type.scalar
        if pair == (tl.float32, tl.bfloat16):
            return TensorHandle(to_bf16(src.data), tl.bfloat16)
        if pair == (tl.bfloat16, tl.float32):
            return TensorHandle(to_float(src.data), tl.float32)
        return cast(self, src, dst_type)

    def create_dot(self, a, b, *rest):
        a, b = (TensorHandle(to_float(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *rest)

    def patch_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def call(self, *args, **kwargs):  # a kernel's own function, or one of Triton's, in a kernel
        if self.fn.__module__ not in patched:
            patched.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl, create_dot
    interpreter._patch_lang_tensor, interpreter.InterpretedFunction.__call__, patched = patch_tensor, call, set()


mend()
