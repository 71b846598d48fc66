"""Writes the files of tensors under tests/fixtures/files with the programs whose formats ett reads, and MANIFEST.sha256.

    python files.py

`values.json` has what these programs read back from them: for each file, each tensor's shape and values.
"""

import collections
import json
import pickle
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

from make_fixtures import FIXTURES, manifest

FILES = FIXTURES / "files"


def tensors():
    """Of every type, and stored in every way."""
    g = torch.Generator().manual_seed(7)
    wide = torch.randn(6, 8, generator=g)
    shared = torch.arange(24, dtype=torch.float32)
    return collections.OrderedDict(
        f32=torch.randn(2, 3, generator=g),
        f16=torch.randn(5, generator=g).half(),
        bf16=torch.randn(5, generator=g).bfloat16(),
        f64=torch.randn(3, generator=g, dtype=torch.float64),
        i64=torch.tensor([-1, 2**40, 3]),
        i32=torch.tensor([[-7], [2**30]], dtype=torch.int32),
        u8=torch.tensor([0, 255], dtype=torch.uint8),
        bool=torch.tensor([True, False, True]),
        scalar=torch.tensor(2.5),
        empty=torch.zeros(0, 4),
        transposed=wide.t(),
        sliced=wide[1:5:2, 2:7],
        channels_last=torch.randn(2, 3, 2, 2, generator=g).to(memory_format=torch.channels_last),
        first=shared[:6].view(2, 3),
        second=shared[6:],
        parameter=torch.nn.Parameter(torch.randn(3, generator=g)),
    )


def lightning():
    """What PyTorch Lightning's Trainer saves, as far as it matters."""
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(torch.linspace(-1, 1, p.numel()).view_as(p) * (i + 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.linspace(0, 1, 50).view(2, 1, 5, 5)).square().mean().backward()
    optimizer.step()
    return {
        "epoch": 3,
        "global_step": 1200,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": model.state_dict(),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4, "completed": 4}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5), "best_k": {}}},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [],
        "MixedPrecision": None,
        "hparams_name": "kwargs",
        "hyper_parameters": {
            "lr": 1e-3, "betas": (0.9, 0.95), "widths": [4, 8], "dtype": torch.float32, "ids": {3},
            "size": torch.Size([2, 3]), "device": torch.device("cpu"), "raw": b"\x00\xff", "no": float("nan"),
            "large": 2**70, "flag": True, "counts": collections.defaultdict(int, a=1),
        },
    }


def names(value, path=()):
    """The tensors in nested values."""
    if isinstance(value, torch.Tensor):
        yield ".".join(path), value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from names(inner, (*path, str(key)))
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from names(inner, (*path, str(i)))


def exact(shape, values):
    """Values as texts, which parsers of JSON do not round."""
    return {"shape": list(shape), "values": [repr(float(x)) for x in values]}


def listed(value):
    return {name: exact(t.shape, t.detach().double().flatten().tolist()) for name, t in names(value)}


def write_torch(values):
    for name, content, options in [
        ("zip.pth", {"model": tensors(), "epoch": 5}, {}),
        ("legacy.pth", {"model": tensors(), "epoch": 5}, {"_use_new_zipfile_serialization": False}),
        ("protocol4.pth", tensors(), {"pickle_protocol": 4}),
        ("lightning.ckpt", lightning(), {}),
    ]:
        torch.save(content, FILES / name, **options)
        values[name] = listed(torch.load(FILES / name, weights_only=False))


def write_gguf(values):
    rng = np.random.default_rng(7)
    writer = gguf.GGUFWriter(FILES / "small.gguf", "qwen2")
    writer.add_block_count(2)
    writer.add_float32("qwen2.rope.freq_base", 1e6)
    writer.add_bool("tokenizer.ggml.add_bos_token", False)
    writer.add_array("tokenizer.ggml.tokens", ["a", "\u0120b", "c"])
    writer.add_array("tokenizer.ggml.token_type", [1, 1, 3])
    writer.add_uint64("general.large", 2**60)
    of = gguf.GGMLQuantizationType
    read = {}
    for name, kind in [("f32", of.F32), ("f16", of.F16), ("bf16", of.BF16), ("q8_0", of.Q8_0), ("q4_1", of.Q4_1)]:
        data = gguf.quants.quantize(rng.standard_normal((3, 64)).astype(np.float32), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
        read[name] = exact([3, 64], gguf.quants.dequantize(data, kind).astype(float).flatten())
    writer.add_tensor("vector", np.float32([1, -2, 3.5]))
    read["vector"] = exact([3], [1, -2, 3.5])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    values["small.gguf"] = read


def write_safetensors(values):
    content = {name: t.detach().contiguous().clone() for name, t in tensors().items()}
    save_file(content, FILES / "small.safetensors", {"format": "pt"})
    values["small.safetensors"] = listed(content)


if __name__ == "__main__":
    FILES.mkdir(exist_ok=True)
    values = {}
    write_torch(values)
    write_gguf(values)
    write_safetensors(values)
    (FILES / "values.json").write_text(json.dumps(values) + "\n")
    (FIXTURES / "MANIFEST.sha256").write_text(manifest())
