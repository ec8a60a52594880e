"""Triton's interpreter without what it repeats at every operation and call: the same results in a fifth of the time."""

import dataclasses
import inspect
from functools import wraps

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def hasten() -> None:
    """Change the interpreter of this process; before or after kernels are defined."""
    _leave_out_unread_checks()
    _patch_the_language_once()
    _look_dtypes_up()
    _look_shapes_up()


def _leave_out_unread_checks() -> None:
    """Every sum, difference and product of integers is computed a second time in int64 and compared with the limits
    of its type, for an assertion that is dropped unless `debug` is on."""
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _patch_the_language_once() -> None:
    """Every call from one function to another goes through all members of triton.language to replace its builtins,
    which the launch of the kernel has replaced already."""
    patch = interpreter._patch_lang
    modules = {}  # of a function's globals

    def patch_once(fn):
        if fn not in modules:
            found = fn.__globals__.values()
            modules[fn] = [m for m in found if inspect.ismodule(m) and m in (tl, tl.core)]
        if modules[fn] and not any(tl.core.is_builtin(module.load) for module in modules[fn]):
            return interpreter._LangPatchScope()  # of no changes
        return patch(fn)

    interpreter._patch_lang = patch_once


def _look_dtypes_up() -> None:
    """Every operation makes a dictionary of all types to find the one of its result."""
    find, found = interpreter._get_np_dtype, {}

    def look_up(dtype):
        element = dtype.scalar
        if isinstance(element, tl.pointer_type):
            return np.dtype(np.uint64)
        if element.name not in found:
            found[element.name] = find(element)
        return found[element.name]

    interpreter._get_np_dtype = look_up


def _look_shapes_up() -> None:
    """Every tensor checks and wraps the sizes of its shape, and operands of one shape are compared size by size."""
    make_type, broadcast = tl.block_type.__init__, TritonSemantic.broadcast_impl_value
    shapes, wrapped = {}, {}

    @wraps(make_type)
    def block_type(self, element_ty, shape):
        sizes = (*shape,)
        if any(type(size) is not int for size in sizes):
            sizes = tuple(getattr(size, "value", size) for size in sizes)
        if sizes not in shapes:
            make_type(self, element_ty, shape)
            shapes[sizes] = self.shape, self.numel, str(self.shape)
        self.element_ty = element_ty
        self.shape, self.numel, written = shapes[sizes]
        self.name = f"<{written}, {element_ty}>"

    @wraps(tl.tensor.__init__)
    def tensor(self, handle, type):
        sizes = (*type.shape.values,) if type.is_block() else ()
        if sizes not in wrapped:
            wrapped[sizes] = tl.constexpr(int(np.prod(sizes))), tl.tuple([tl.constexpr(size) for size in sizes])
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = wrapped[sizes]

    @wraps(broadcast)
    def broadcast_impl_value(self, lhs, rhs):
        if lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape is rhs.type.shape:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    tl.block_type.__init__ = block_type
    tl.tensor.__init__ = tensor
    TritonSemantic.broadcast_impl_value = broadcast_impl_value
