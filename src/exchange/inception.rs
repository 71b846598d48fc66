//! The Inception network whose features FID compares.

use std::path::Path;

use super::named::{Named, Shape, no_problems, tensors, write_all};
use crate::error::Result;
use crate::formats::{Archive, Encoding, Selection};

/// Classes of the network for FID; torchvision's has 1000.
const CLASSES: usize = 1008;

/// A convolution of a block: name, input and output channels, height and width of the kernel.
type Layer = (&'static str, usize, usize, (usize, usize));

/// The kernels of the network.
const ONE: (usize, usize) = (1, 1);
const THREE: (usize, usize) = (3, 3);
const FIVE: (usize, usize) = (5, 5);
/// Rows and columns of long kernels.
const ROW7: (usize, usize) = (1, 7);
const COLUMN7: (usize, usize) = (7, 1);
const ROW3: (usize, usize) = (1, 3);
const COLUMN3: (usize, usize) = (3, 1);

/// The blocks at 35 x 35; `c` input channels, `pool` of the branch that averages.
fn block_a(c: usize, pool: usize) -> Vec<Layer> {
    vec![
        ("branch1x1", c, 64, ONE),
        ("branch5x5_1", c, 48, ONE),
        ("branch5x5_2", 48, 64, FIVE),
        ("branch3x3dbl_1", c, 64, ONE),
        ("branch3x3dbl_2", 64, 96, THREE),
        ("branch3x3dbl_3", 96, 96, THREE),
        ("branch_pool", c, pool, ONE),
    ]
}

/// The blocks at 17 x 17; `n` channels within the branches.
fn block_c(n: usize) -> Vec<Layer> {
    vec![
        ("branch1x1", 768, 192, ONE),
        ("branch7x7_1", 768, n, ONE),
        ("branch7x7_2", n, n, ROW7),
        ("branch7x7_3", n, 192, COLUMN7),
        ("branch7x7dbl_1", 768, n, ONE),
        ("branch7x7dbl_2", n, n, COLUMN7),
        ("branch7x7dbl_3", n, n, ROW7),
        ("branch7x7dbl_4", n, n, COLUMN7),
        ("branch7x7dbl_5", n, 192, ROW7),
        ("branch_pool", 768, 192, ONE),
    ]
}

/// The blocks at 8 x 8; `c` input channels.
fn block_e(c: usize) -> Vec<Layer> {
    vec![
        ("branch1x1", c, 320, ONE),
        ("branch3x3_1", c, 384, ONE),
        ("branch3x3_2a", 384, 384, ROW3),
        ("branch3x3_2b", 384, 384, COLUMN3),
        ("branch3x3dbl_1", c, 448, ONE),
        ("branch3x3dbl_2", 448, 384, THREE),
        ("branch3x3dbl_3a", 384, 384, ROW3),
        ("branch3x3dbl_3b", 384, 384, COLUMN3),
        ("branch_pool", c, 192, ONE),
    ]
}

/// All blocks; the first layers have a block of their own each, without a name for the layer.
fn blocks() -> Vec<(&'static str, Vec<Layer>)> {
    let reduce_17 = vec![
        ("branch3x3", 288, 384, THREE),
        ("branch3x3dbl_1", 288, 64, ONE),
        ("branch3x3dbl_2", 64, 96, THREE),
        ("branch3x3dbl_3", 96, 96, THREE),
    ];
    let reduce_8 = vec![
        ("branch3x3_1", 768, 192, ONE),
        ("branch3x3_2", 192, 320, THREE),
        ("branch7x7x3_1", 768, 192, ONE),
        ("branch7x7x3_2", 192, 192, ROW7),
        ("branch7x7x3_3", 192, 192, COLUMN7),
        ("branch7x7x3_4", 192, 192, THREE),
    ];
    vec![
        ("Conv2d_1a_3x3", vec![("", 3, 32, THREE)]),
        ("Conv2d_2a_3x3", vec![("", 32, 32, THREE)]),
        ("Conv2d_2b_3x3", vec![("", 32, 64, THREE)]),
        ("Conv2d_3b_1x1", vec![("", 64, 80, ONE)]),
        ("Conv2d_4a_3x3", vec![("", 80, 192, THREE)]),
        ("Mixed_5b", block_a(192, 32)),
        ("Mixed_5c", block_a(256, 64)),
        ("Mixed_5d", block_a(288, 64)),
        ("Mixed_6a", reduce_17),
        ("Mixed_6b", block_c(128)),
        ("Mixed_6c", block_c(160)),
        ("Mixed_6d", block_c(160)),
        ("Mixed_6e", block_c(192)),
        ("Mixed_7a", reduce_8),
        ("Mixed_7b", block_e(1280)),
        ("Mixed_7c", block_e(2048)),
    ]
}

/// Names and shapes of the network for FID: convolutions without biases, each with a BatchNorm, and the classes.
pub fn inception_shapes() -> Vec<(String, Vec<usize>)> {
    let mut all: Vec<Shape> = vec![];
    for (block, layers) in blocks() {
        for (layer, from, to, (high, wide)) in layers {
            let name = if layer.is_empty() { block.into() } else { format!("{block}.{layer}") };
            all.push((format!("{name}.conv.weight"), vec![to, from, high, wide]));
            for what in ["weight", "bias", "running_mean", "running_var"] {
                all.push((format!("{name}.bn.{what}"), vec![to]));
            }
        }
    }
    all.push(("fc.weight".into(), vec![CLASSES, 2048]));
    all.push(("fc.bias".into(), vec![CLASSES]));
    all
}

/// Opens the usual file of PyTorch for FID. Returns its tensors under its own names, without counts of batches, and what was
/// left out, in words.
pub fn open_inception(path: &Path) -> Result<(Selection, Vec<String>)> {
    let mut file = Named::whole(Archive::open(path)?);
    let mut notes = vec![];
    let auxiliary = file.take_prefixed("AuxLogits.").names().count();
    if auxiliary > 0 {
        notes.push(format!("left out the auxiliary classifier (`AuxLogits.*`, {})", tensors(auxiliary)));
    }
    // No statistics are updated: how many batches they saw does not matter.
    file.take(|name| name.ends_with(".bn.num_batches_tracked").then(|| name.into()));
    let shapes = inception_shapes();
    let mut problems = file.misfits(&shapes, "");
    problems.extend(file.unknown(&[&shapes], ""));
    no_problems(path, "Inception-v3 for FID", problems)?;
    Ok((file.selection(path), notes))
}

/// Writes it as a safetensors file, which [`open_inception`] reads.
pub fn write_inception(path: &Path, from: &Selection, encoding: Option<Encoding>) -> Result<()> {
    write_all(path, from, |_| true, encoding)
}
