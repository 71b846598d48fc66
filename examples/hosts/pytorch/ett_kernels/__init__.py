"""The CUDA kernels of ett in PyTorch. Without PyTorch, only the C interface through ctypes (`library`) is there."""

import importlib.util

from ._library import ArgumentError, CudaError, FaultError, KernelError, UnsupportedError, load

library = load()

if importlib.util.find_spec("torch") is not None:
    from . import nn
    from .functional import (
        Quantized,
        attention,
        attention_varlen,
        cross_entropy,
        group_norm_silu,
        ibq_quantize,
        layer_norm,
        linear_cross_entropy,
        nearest,
        rms_norm,
    )
    from .ops import check_faults
