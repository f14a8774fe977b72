"""Triton's interpreter, for scripts that run kernels in it: faster, exact, and silent as a GPU."""

import os
import warnings


def interpret():
    """Have Triton interpret kernels on the CPU; to be called before anything imports Triton.

    The interpreter replaces Triton's functions at each call of a function. It looks for what to
    replace at every call, thousands a launch, and finds all replaced: up to three quarters of its
    time. Here it replaces them once a launch and module. So no two threads may launch at a time.

    The interpreter widens subnormal bfloat16 to other numbers (3.6 and 3.7), and truncates where a
    GPU rounds to bfloat16. Here PyTorch converts.

    The interpreter of 3.6 makes an int of a block of one element as NumPy 2.4 no longer does.

    To the interpreter of 3.9 a comparison of integers has their type: a block of it is no mask.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    # It computes with NumPy, which warns where a GPU's arithmetic is silent: infinities that the
    # kernels mean.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    def converted(numbers, dtype, to, rounding):
        if (dtype, to) == (tl.bfloat16, tl.float32):
            return (numbers.astype("uint32") << 16).reshape(numbers.shape)
        if (dtype, to) == (tl.float32, tl.bfloat16):
            narrow = torch.from_numpy(numbers.view("float32").copy()).bfloat16()
            return narrow.view(torch.int16).numpy().view("uint16")
        return convert(numbers, dtype, to, rounding)

    convert, interpreter._convert_float = interpreter._convert_float, converted

    def splat(self, block, number):
        if number.data.dtype == bool:
            number = interpreter.TensorHandle(number.data, tl.int1)
        return splatted(self, block, number)

    splatted = interpreter.InterpreterBuilder.create_splat
    interpreter.InterpreterBuilder.create_splat = splat

    def patch_tensor(tensor, scope):
        patched_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    patched_tensor, interpreter._patch_lang_tensor = interpreter._patch_lang_tensor, patch_tensor

    patch, launch, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def launch_afresh(self, *args, **kwargs):
        patched.clear()  # a launch puts back what it replaced
        return launch(self, *args, **kwargs)

    def patch_module_of(function):
        if function.__module__ in patched:
            return None  # nobody puts back what a call of a function replaced
        patched.add(function.__module__)
        return patch(function)

    interpreter.GridExecutor.__call__, interpreter._patch_lang = launch_afresh, patch_module_of
