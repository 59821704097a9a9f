"""Eight float32 as one numba value: loads, stores, arithmetic and transposition in SIMD registers."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar, cast

import numba as nb
import numpy as np
import numpy.typing as npt
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import types
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

__all__ = ["F32", "F64", "I64", "LANES", "kernel", "load", "splat", "store", "transpose_scaled", "transpose_then_scale"]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
_F = TypeVar("_F", bound=Callable[..., Any])
LANES = 8  # floats a register


def kernel(function: _F) -> _F:
    """Compile for the machine at first use, kept on disk, without the GIL."""
    return cast(_F, nb.njit(cache=True, nogil=True, fastmath={"contract"}, boundscheck=False)(function))


def _intrinsic(function: Any) -> Any:
    """Make a numba intrinsic; as `Any`, since its Python signature is not the one it is called with."""
    return intrinsic(function)


class _Float8(types.Type):
    def __init__(self) -> None:
        super().__init__(name="float32x8")


_f8 = _Float8()
_vector = ir.VectorType(ir.FloatType(), LANES)
_contract = ("contract",)


@register_model(_Float8)
class _Float8Model(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, _vector)  # type: ignore[no-untyped-call]


def _define(op: Any, emit: str) -> None:
    class _Operator(ConcreteTemplate):
        cases: ClassVar[list[Any]] = [signature(_f8, _f8, _f8)]

    infer_global(op)(_Operator)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return getattr(builder, emit)(args[0], args[1], flags=_contract)

    lower_builtin(op, _f8, _f8)(lower)


_define(operator.add, "fadd")
_define(operator.sub, "fsub")
_define(operator.mul, "fmul")


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), _vector.as_pointer())


def _emit_load(builder: Any, pointer: Any) -> Any:
    value = builder.load(pointer)
    value.align = 4
    return value


def _emit_splat(builder: Any, value: Any) -> Any:
    first = builder.insert_element(ir.Constant(_vector, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(first, ir.Constant(_vector, ir.Undefined), zeros)


@_intrinsic
def load(typingctx: Any, array: Any, index: Any) -> Any:
    """Return ``array[index : index + 8]`` of a 1-D float32 array."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _emit_load(builder, _pointer(context, builder, sig.args[0], args[0], args[1]))

    return signature(_f8, array, types.int64), codegen


@_intrinsic
def store(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    """Write `value` to ``array[index : index + 8]`` of a 1-D float32 array."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        store = builder.store(args[2], _pointer(context, builder, sig.args[0], args[0], args[1]))
        store.align = 4
        return context.get_dummy_value()

    return signature(types.void, array, types.int64, _f8), codegen


@_intrinsic
def splat(typingctx: Any, value: Any) -> Any:
    """Return eight copies of a float32."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _emit_splat(builder, args[0])

    return signature(_f8, types.float32), codegen


def _transposer(scale_after: bool) -> Any:
    """Make ``f(src, at, step, dst, to, hop, scale, first, factor)``: transpose eight vectors of eight floats.

    Vector j is read at ``src[at + j step]`` and, transposed, written at ``dst[to + j hop]``; the vectors are
    multiplied by ``scale[first : first + 8] * factor`` after (or before) transposition.
    """

    @_intrinsic
    def transpose(
        typingctx: Any, src: Any, at: Any, step: Any, dst: Any, to: Any, hop: Any, scale: Any, first: Any, factor: Any
    ) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            i32 = ir.IntType(32)
            undefined = ir.Constant(_vector, ir.Undefined)
            weight = _emit_load(builder, _pointer(context, builder, sig.args[6], args[6], args[7]))
            weight = builder.fmul(weight, _emit_splat(builder, args[8]))
            rows = []
            index = args[1]
            for _ in range(LANES):
                rows.append(_emit_load(builder, _pointer(context, builder, sig.args[0], args[0], index)))
                index = builder.add(index, args[2])
            if not scale_after:
                rows = [builder.fmul(row, weight) for row in rows]
            for half in (1, 2, 4):  # three butterflies of pairwise exchanges, rows `half` apart
                lo = [j if not j & half else LANES + j - half for j in range(LANES)]
                hi = [j + half if not j & half else LANES + j for j in range(LANES)]
                out: list[Any] = [undefined] * LANES
                for j in range(LANES):
                    if not j & half:
                        a, b = rows[j], rows[j + half]
                        for target, mask in ((j, lo), (j + half, hi)):
                            vector = ir.Constant(ir.VectorType(i32, LANES), mask)
                            out[target] = builder.shuffle_vector(a, b, vector)
                rows = out
            if scale_after:
                rows = [builder.fmul(row, weight) for row in rows]
            index = args[4]
            for row in rows:
                store = builder.store(row, _pointer(context, builder, sig.args[3], args[3], index))
                store.align = 4
                index = builder.add(index, args[5])
            return context.get_dummy_value()

        n = types.int64
        return signature(types.void, src, n, n, dst, n, n, scale, n, types.float32), codegen

    return transpose


transpose_scaled = _transposer(scale_after=False)
transpose_then_scale = _transposer(scale_after=True)
