//! The best published implementations, measured on an H200 (PyTorch 2.11, CUDA 13.0; random data, medians, launch
//! overhead hidden), by kernel and shape.

use std::collections::BTreeMap;

/// Name and microseconds of the peer of `op/shape dtype`.
pub fn h200() -> BTreeMap<&'static str, (&'static str, f64)> {
    [
        ("nearest/M 16384 K 131072 D 256 dot bf16", "Triton, fused", 1820.0),
        ("nearest/M 16384 K 131072 D 256 l2 bf16", "Triton, fused", 2690.0),
        ("ibq/M 16384 K 131072 D 256 bf16", "PyTorch, closed form, compiled", 32_500.0),
        ("rms_norm_fwd/9216x1536 bf16", "QuACK", 20.5),
        ("rms_norm_bwd/9216x1536 bf16", "QuACK", 41.7),
        ("rms_norm_fwd/65536x4096 bf16", "Liger", 260.0),
        ("rms_norm_bwd/65536x4096 bf16", "QuACK", 427.0),
        ("rms_norm_fwd/9216x1536 + residual bf16", "QuACK", 33.5),
        ("rms_norm_bwd/9216x1536 + residual bf16", "QuACK", 49.1),
        ("rms_norm_fwd/65536x4096 + residual bf16", "QuACK", 519.0),
        ("rms_norm_bwd/65536x4096 + residual bf16", "QuACK", 542.0),
        ("layer_norm_fwd/9216x1536 bf16", "PyTorch, eager", 33.0),
        ("layer_norm_bwd/9216x1536 bf16", "PyTorch, compiled", 76.0),
        ("layer_norm_fwd/65536x4096 bf16", "PyTorch, compiled", 378.0),
        ("layer_norm_bwd/65536x4096 bf16", "PyTorch, compiled", 555.0),
        ("adamw/1544000000 f32", "PyTorch, fused", 12_500.0),
    ]
    .into_iter()
    .map(|(key, name, us)| (key, (name, us)))
    .collect()
}
