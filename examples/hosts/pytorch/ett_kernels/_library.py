"""The C interface of the kernels through ctypes, without PyTorch.

Struct layouts, constants and the interface version are read from the header, so that this file need not change when the
header does.
"""

import ctypes
import functools
import os
import re
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parent
KERNELS = PACKAGE.parents[3] / "kernels"  # in a checkout; an installed package has its copies in lib/
C_TYPES = {
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64,
    "double": ctypes.c_double,
    "char": ctypes.c_char,
    "ett_stream": ctypes.c_void_p,
}


class KernelError(RuntimeError):
    """A launcher refused a call. code, op, argument, got and wanted say why."""

    def __init__(self, code, op, argument, got, wanted):
        super().__init__(f"{op}: argument `{argument}` is {got}, wanted {wanted}" if argument else f"{op}: {got}: {wanted}")
        self.code, self.op, self.argument, self.got, self.wanted = code, op, argument, got, wanted


class ArgumentError(KernelError, ValueError):
    """An argument is outside the contract of the header."""


class UnsupportedError(KernelError, NotImplementedError):
    """The call is within the contract, but this library does not implement it."""


class CudaError(KernelError):
    """A call of the CUDA runtime failed."""


class FaultError(IndexError):
    """A kernel found an index outside its range."""


class Array(NamedTuple):
    """A tensor argument: its address, element type (f32, bf16, f64, i32, u8), shape, and strides in elements."""

    address: int
    dtype: str
    shape: tuple
    strides: tuple


def row_stride(shape, strides):
    """Elements from row to row, or None if the tensor is not rows at equal distances of contiguous elements."""
    if 0 in shape:
        return shape[-1]
    if not shape or (shape[-1] > 1 and strides[-1] != 1):
        return None if shape else 1
    stride, expected = shape[-1], None
    for size, step in zip(reversed(shape[:-1]), reversed(strides[:-1])):
        if size == 1:
            continue
        if expected is None:
            stride = step  # the innermost dimension of rows sets the distance, the others have to continue it
        elif step != expected:
            return None
        expected = step * size
    return stride if stride >= shape[-1] else None


class Library:
    """A library of kernels and the header it was built with."""

    def __init__(self, path, header):
        self.path, self.text = str(path), Path(header).read_text()
        try:
            self.dll = ctypes.CDLL(self.path)
        except OSError as failure:
            raise ImportError(f"{path} cannot be loaded: {failure}; build it again with `make -C kernels`") from failure
        self.dll.ett_last_kernel.restype = ctypes.c_char_p
        pairs = re.findall(r"#define (ETT_\w+) (\d+)|\b(ETT_\w+) = (\d+)", self.text)
        self.constants = {a or b: int(c or d) for a, c, b, d in pairs}
        version, wanted = self.dll.ett_abi_version(), self.constants["ETT_ABI_VERSION"]
        if version != wanted:
            raise ImportError(f"{path} has interface version {version}, {header} has {wanted}: use the two of one build")
        #: Whether this is the library for the CPU (`make -C kernels shim`), which computes on the host's memory.
        self.dll.ett_targets.restype = ctypes.c_char_p
        self.on_cpu = self.dll.ett_targets() == b"shim"
        self.names = re.findall(r"^ETT_API int32_t ett_(\w+)\(const ett_\1_args\* args", self.text, re.M)
        self.struct = functools.cache(self._struct)

    def _struct(self, name):
        """The ctypes structure of `typedef struct ett_<name>`."""
        found = re.search(rf"typedef struct ett_{name} \{{(.*?)\}} ett_{name};", self.text, re.S)
        if found is None:
            raise KeyError(f"the header has no struct ett_{name}")
        fields = []
        for const, kind, pointer, field, count in re.findall(
            r"^\s*(const )?(\w+)(\*?) (\w+)(?:\[(\d+)\])?;", found.group(1), re.M
        ):
            if pointer:
                kind = ctypes.c_char_p if const and kind == "char" else ctypes.c_void_p
            else:
                kind = C_TYPES.get(kind) or self.struct(kind.removeprefix("ett_"))
            fields.append((field, kind * int(count) if count else kind))
        return type(name, (ctypes.Structure,), {"_fields_": fields})

    def view(self, name, array):
        """An ett_view of an Array. `name` is the argument's, for the error."""
        shape, strides = tuple(array.shape), tuple(array.strides)
        ld = row_stride(shape, strides)
        if len(shape) > 4 or ld is None:
            raise ValueError(
                f"argument `{name}` has shape {list(shape)} and strides {list(strides)}, wanted at most 4 dimensions, the last "
                "contiguous and the rows equally far apart; pass a contiguous copy"
            )
        dims = (ctypes.c_int64 * 4)(*shape, *[1] * (4 - len(shape)))
        # The address of an empty tensor may be null, which would mean an absent argument.
        address = array.address if 0 not in shape else 256
        return self.struct("view")(address, self.constants["ETT_" + array.dtype.upper()], len(shape), dims, ld)

    def call(self, name, **arguments):
        """A call of ett_<name>: Arrays (None: absent) and numbers by the names of the header's fields."""
        struct, view = self.struct(name + "_args"), self.struct("view")
        values = struct()
        for field, kind in struct._fields_:
            value = arguments.pop(field, None)
            if kind is view:
                if value is not None:
                    setattr(values, field, self.view(field, value))
            elif value is None:
                raise TypeError(f"{name}: argument `{field}` is missing")
            else:
                setattr(values, field, value)
        if arguments:
            raise TypeError(f"{name} has no argument `{next(iter(arguments))}`; it has {[f for f, _ in struct._fields_]}")
        return Call(self, name, values)

    def error(self, code):
        """The exception for the last failed launch of this thread."""
        status = self.struct("status")()
        self.dll.ett_last_status(ctypes.byref(status))
        kind = {1: ArgumentError, 2: UnsupportedError, 3: CudaError}.get(code, KernelError)
        return kind(code, *(getattr(status, f).decode() for f in ("op", "arg", "got", "want")))

    def implementation(self):
        """The name of the implementation that ran in this thread's last launch."""
        return self.dll.ett_last_kernel().decode()

    def number(self, name):
        """The number that marks the faults of a kernel; 0 marks none."""
        return self.names.index(name) + 1

    def fault_error(self, memory):
        """The exception for the bytes of an ett_fault, or None if there is no fault."""
        fault = self.struct("fault").from_buffer_copy(memory)
        if fault.kind == 0:
            return None
        name = self.names[fault.launch - 1] if 0 < fault.launch <= len(self.names) else "a kernel"
        return FaultError(f"{name}: element {fault.where} is {fault.value}, wanted at least 0 and below {fault.limit}")


class Call:
    """Checked arguments of a kernel, with the bytes of workspace that they need."""

    def __init__(self, library, name, values):
        self.library, self.name, self.values = library, name, values
        query = getattr(library.dll, f"ett_{name}_workspace")
        query.restype = ctypes.c_int64
        self.workspace_bytes = query(ctypes.byref(values))
        if self.workspace_bytes < 0:
            self.launch()  # refuses as well, and says why
            raise KernelError(1, name, "args", "refused by the workspace query", "what the header describes")

    def launch(self, stream=None, workspace=None, fault=None, number=0, force=None):
        """Enqueues the work. Addresses: of the stream, the workspace (256-byte aligned) and an ett_fault, or None."""
        launch = self.library.struct("launch")(stream, workspace, max(self.workspace_bytes, 0), fault, number, force)
        code = getattr(self.library.dll, "ett_" + self.name)(ctypes.byref(self.values), ctypes.byref(launch))
        if code != 0:
            raise self.library.error(code)


def _first(variable, *candidates):
    named = os.environ.get(variable)
    if named:
        if not Path(named).is_file():
            raise ImportError(f"{variable} names {named}, which is not a file")
        return Path(named)
    return next((path for path in candidates if path.is_file()), None)


@functools.cache
def load():
    """The library of ETT_KERNELS_LIBRARY, else the installed one, else that of the checkout around this package."""
    path = _first("ETT_KERNELS_LIBRARY", PACKAGE / "lib/libett_kernels.so", KERNELS / "build/libett_kernels.so")
    header = _first("ETT_KERNELS_HEADER", PACKAGE / "lib/ett_kernels.h", KERNELS / "include/ett_kernels.h")
    if path is None or header is None:
        what, variable = ("libett_kernels.so", "LIBRARY") if path is None else ("ett_kernels.h", "HEADER")
        raise ImportError(
            f"ett_kernels has no {what}: build it with `make -C kernels` (needs nvcc) in a checkout of ett and install this "
            f"package again, or set ETT_KERNELS_{variable} to the file"
        )
    return Library(path, header)
