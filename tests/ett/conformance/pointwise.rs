//! Element-wise kernels and those over channels.

use ett::backend::{
    Accumulate, Add, Cast, ChannelAffineBwd, ChannelAffineFwd, DType, Dims, Fill, ScaleBytes, Stream,
    SwigluBwd, SwigluFwd, Unary, UnaryBwd, UnaryFwd,
};

use super::Size;
use super::case::{Case, Draw, Judge, Type, act, add as add_to, input, near, out};

const S: Stream = Stream::COMPUTE;

/// Any shape; all dimensions but the last are rows.
fn shapes() -> Vec<(Size, Dims)> {
    let small: [Dims; 12] = [
        [1].into(),
        [257].into(),
        [1000].into(),
        [7, 1].into(),
        [5, 31].into(),
        [3, 2, 5, 8].into(),
        [33, 64].into(),
        [2, 17, 13].into(),
        [4, 127].into(),
        [2, 256].into(),
        [3, 1025].into(),
        [0, 8].into(),
    ];
    let large: [Dims; 5] = [
        [257, 8960].into(),
        [1031, 1536].into(),
        [4, 64, 64, 33].into(),
        [1_000_003].into(),
        [4099, 31].into(),
    ];
    let all = [(Size::Sanitizer, [3, 40].into())].into_iter();
    let all = all.chain(small.into_iter().map(|d| (Size::Tiny, d)));
    all.chain(large.into_iter().map(|d| (Size::Full, d))).collect()
}

/// N and C for kernels that work on rows.
fn rows() -> impl Iterator<Item = (Size, [usize; 2])> {
    shapes().into_iter().map(|(size, d)| (size, [d.rows(), d.cols()]))
}

// ---- functions -----------------------------------------------------------------------------------------

const FUNCTIONS: [Unary; 5] = [Unary::Silu, Unary::Gelu, Unary::GeluTanh, Unary::Relu, Unary::LeakyRelu(0.2)];

/// Values with some zeros, where functions have kinks.
fn with_zeros(d: &Draw, n: usize) -> Vec<f64> {
    let mut x = d.normal(n);
    x.iter_mut().skip(2).step_by(7).for_each(|v| *v = 0.0);
    x
}

/// Amplification of rounding errors by e^x and erf in f32: a few roundings.
const FUNCTION: f64 = 1.0;

fn unary_fwd_case(dims: Dims, f: Unary) -> Case {
    Case::new(
        format!("{f:?} of {dims}"),
        move |d| {
            let near = near().size(0.5 * d.scale).conditioning(FUNCTION);
            vec![act("x", dims, with_zeros(d, dims.numel())), out("y", Type::Act, dims, near)]
        },
        move |dev, v| dev.unary_fwd(S, &UnaryFwd { x: v.input("x"), y: v.out("y"), f }),
    )
}

fn unary_bwd_case(dims: Dims, f: Unary) -> Case {
    Case::new(
        format!("{f:?} of {dims}"),
        move |d| {
            let n = dims.numel();
            let near = near().size(0.5 * d.scale).conditioning(FUNCTION);
            vec![
                act("dy", dims, d.normal(n)),
                act("x", dims, with_zeros(d, n)),
                out("dx", Type::Act, dims, near),
            ]
        },
        move |dev, v| dev.unary_bwd(S, &UnaryBwd { dy: v.input("dy"), x: v.input("x"), dx: v.out("dx"), f }),
    )
}

/// Every function on the first shapes, then one function per shape.
fn unary(case: fn(Dims, Unary) -> Case) -> Vec<Case> {
    let of = |(i, (size, dims)): (usize, (Size, Dims))| {
        let every = i < 4;
        let chosen = FUNCTIONS.into_iter().enumerate().filter(move |(j, _)| every || i % 4 == *j);
        chosen.map(move |(_, f)| case(dims, f).from(size)).collect::<Vec<_>>()
    };
    shapes().into_iter().enumerate().flat_map(of).collect()
}

/// NaN stays NaN, and the rectifiers keep infinities: divergence in training has to show.
fn special(f: Unary) -> Case {
    let values: &[f64] = match f {
        Unary::Silu | Unary::Gelu | Unary::GeluTanh => &[f64::NAN, 1.0, -1.0],
        _ => &[f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1.0, -1.0, 0.0, -0.0],
    };
    let dims: Dims = [values.len()].into();
    Case::new(
        format!("{f:?} of {values:?}"),
        move |_| {
            let near = near().conditioning(FUNCTION).specials();
            vec![act("x", dims, values.to_vec()), out("y", Type::Act, dims, near)]
        },
        move |dev, v| dev.unary_fwd(S, &UnaryFwd { x: v.input("x"), y: v.out("y"), f }),
    )
    .named("special values")
}

pub fn unary_fwd() -> Vec<Case> {
    unary(unary_fwd_case).into_iter().chain(FUNCTIONS.map(special)).collect()
}

pub fn unary_fwd_sample() -> Case {
    unary_fwd_case([3, 4].into(), Unary::Gelu)
}

pub fn unary_bwd() -> Vec<Case> {
    unary(unary_bwd_case)
}

pub fn unary_bwd_sample() -> Case {
    unary_bwd_case([3, 4].into(), Unary::Gelu)
}

// ---- sums, casts, constants ----------------------------------------------------------------------------

fn add_case(dims: Dims) -> Case {
    Case::new(
        format!("{dims}"),
        move |d| {
            let n = dims.numel();
            let y = out("y", Type::Act, dims, near());
            vec![act("a", dims, d.normal(n)), act("b", dims, d.normal(n)), y]
        },
        |dev, v| dev.add(S, &Add { a: v.input("a"), b: v.input("b"), y: v.out("y") }),
    )
}

pub fn add() -> Vec<Case> {
    shapes().into_iter().map(|(size, dims)| add_case(dims).from(size)).collect()
}

pub fn add_sample() -> Case {
    add_case([3, 4].into())
}

/// Types of two arguments that may differ, beginning with the activation type for both.
const PAIRS: [[Type; 2]; 5] = [
    [Type::Act, Type::Act],
    [Type::Is(DType::Bf16), Type::Is(DType::F32)],
    [Type::Is(DType::F32), Type::Is(DType::Bf16)],
    [Type::Is(DType::F32), Type::Is(DType::F32)],
    [Type::Is(DType::Bf16), Type::Is(DType::Bf16)],
];

fn name(t: Type) -> &'static str {
    match t {
        Type::Act => "act",
        Type::Acc => "acc",
        Type::Is(dtype) => dtype.name(),
    }
}

/// Every pair of types on the first shapes, then one pair per shape.
fn pairs(case: fn([usize; 2], [Type; 2]) -> Case) -> Vec<Case> {
    let of = |(i, (size, dims)): (usize, (Size, [usize; 2]))| {
        let chosen = PAIRS.into_iter().enumerate().filter(move |(j, _)| i < 2 || i % 5 == *j);
        chosen.map(move |(_, types)| case(dims, types).from(size)).collect::<Vec<_>>()
    };
    rows().enumerate().flat_map(of).collect()
}

fn accumulate_case(dims: [usize; 2], [x, y]: [Type; 2]) -> Case {
    Case::new(
        format!("{dims:?}, {} += {}", name(y), name(x)),
        move |d| {
            let n = dims[0] * dims[1];
            vec![input("x", x, dims, d.normal(n)), add_to("y", y, dims, d.normal(n), near())]
        },
        |dev, v| dev.accumulate(S, &Accumulate { x: v.input("x"), y: v.acc("y") }),
    )
}

pub fn accumulate() -> Vec<Case> {
    pairs(accumulate_case)
}

pub fn accumulate_sample() -> Case {
    accumulate_case([3, 4], PAIRS[0])
}

fn cast_case(dims: [usize; 2], [x, y]: [Type; 2]) -> Case {
    Case::new(
        format!("{dims:?}, {} = {}", name(y), name(x)),
        move |d| vec![input("x", x, dims, d.normal(dims[0] * dims[1])), out("y", y, dims, Judge::Exact)],
        |dev, v| dev.cast(S, &Cast { x: v.input("x"), y: v.out("y") }),
    )
}

/// Values that are hard to round to bf16: ties in both directions, the largest numbers, and subnormal numbers.
fn hard_to_round() -> Case {
    let ties = [0x3F80_8000u32, 0x3F81_8000, 0x3F80_7FFF, 0x3F80_8001, 0xBF80_8000, 0xBF81_8000];
    let ends = [0x7F7F_FFFFu32, 0xFF7F_FFFF, 0x7F7F_7FFF, 0x0000_8000, 0x0001_8000, 0x0000_0001, 0x8000_0000];
    let special = [0x7F80_0000u32, 0xFF80_0000, 0x7FC0_0000, 0x7F80_0001];
    let values: Vec<f64> =
        ties.iter().chain(&ends).chain(&special).map(|&b| f64::from(f32::from_bits(b))).collect();
    let n = values.len();
    let types = PAIRS[2];
    let args = move |_: &Draw| {
        vec![input("x", types[0], [1, n], values.clone()), out("y", types[1], [1, n], Judge::Exact)]
    };
    Case { args: Box::new(args), ..cast_case([1, n], types) }.named("hard to round")
}

pub fn cast() -> Vec<Case> {
    pairs(cast_case).into_iter().chain([hard_to_round()]).collect()
}

pub fn cast_sample() -> Case {
    cast_case([3, 4], PAIRS[0])
}

fn scale_bytes_case(dims: Dims, byte: fn(usize) -> u8) -> Case {
    Case::new(
        format!("{dims}"),
        move |_| {
            let bytes = (0..dims.numel()).map(|i| f64::from(byte(i))).collect();
            let x = input("x", Type::Is(DType::U8), dims, bytes);
            vec![x, out("y", Type::Act, dims, near().size(0.5))]
        },
        |dev, v| dev.scale_bytes(S, &ScaleBytes { x: v.input("x"), y: v.out("y") }),
    )
}

pub fn scale_bytes() -> Vec<Case> {
    // 101 has no common factor with 256, so that every byte occurs.
    let all =
        shapes().into_iter().map(|(size, dims)| scale_bytes_case(dims, |i| (101 * i) as u8).copied(size));
    all.chain([scale_bytes_case([16, 16].into(), |i| i as u8).named("every byte")]).collect()
}

pub fn scale_bytes_sample() -> Case {
    scale_bytes_case([3, 4].into(), |i| i as u8)
}

fn fill_case(dims: Dims, ty: Type, value: f64) -> Case {
    Case::new(
        format!("{dims} of {} with {value}", name(ty)),
        move |_| vec![out("y", ty, dims, Judge::Exact)],
        move |dev, v| dev.fill(S, &Fill { y: v.out("y"), value }),
    )
}

pub fn fill() -> Vec<Case> {
    let types = [DType::F64, DType::F32, DType::Bf16, DType::I32, DType::U8].map(Type::Is);
    let all = shapes().into_iter().enumerate().flat_map(|(i, (size, dims))| {
        let value = [0.1f64, -3e8, 0.0][i % 3];
        types.map(|ty| fill_case(dims, ty, value).from(size))
    });
    let ends = [(types[3], 2_147_483_647.0), (types[3], -1e10), (types[4], 254.7), (types[4], 300.0)];
    all.chain(ends.map(|(ty, value)| fill_case([7].into(), ty, value))).collect()
}

pub fn fill_sample() -> Case {
    fill_case([3, 4].into(), Type::Act, 0.5)
}

// ---- channels ------------------------------------------------------------------------------------------

/// Divisors that are not close to 0.
fn divisors(d: &Draw, n: usize) -> Vec<f64> {
    d.unit(n).into_iter().map(|v| v + 0.5f64.copysign(v)).collect()
}

fn affine_fwd_case([n, c]: [usize; 2]) -> Case {
    Case::new(
        format!("[{n}, {c}]"),
        move |d| {
            vec![
                act("x", [n, c], d.normal(n * c)),
                act("shift", [c], d.normal(c)),
                act("scale", [c], divisors(d, c)),
                out("y", Type::Act, [n, c], near()),
            ]
        },
        |dev, v| {
            let (x, shift, scale) = (v.input("x"), v.input("shift"), v.input("scale"));
            dev.channel_affine_fwd(S, &ChannelAffineFwd { x, shift, scale, y: v.out("y") })
        },
    )
}

pub fn affine_fwd() -> Vec<Case> {
    rows().map(|(size, dims)| affine_fwd_case(dims).from(size)).collect()
}

pub fn affine_fwd_sample() -> Case {
    affine_fwd_case([3, 4])
}

fn affine_bwd_case([n, c]: [usize; 2]) -> Case {
    Case::new(
        format!("[{n}, {c}]"),
        move |d| {
            vec![
                act("dy", [n, c], d.normal(n * c)),
                act("scale", [c], divisors(d, c)),
                out("dx", Type::Act, [n, c], near()),
            ]
        },
        |dev, v| {
            let (dy, scale) = (v.input("dy"), v.input("scale"));
            dev.channel_affine_bwd(S, &ChannelAffineBwd { dy, scale, dx: v.out("dx") })
        },
    )
}

pub fn affine_bwd() -> Vec<Case> {
    rows().map(|(size, dims)| affine_bwd_case(dims).from(size)).collect()
}

pub fn affine_bwd_sample() -> Case {
    affine_bwd_case([3, 4])
}

// ---- gates ---------------------------------------------------------------------------------------------

fn swiglu_fwd_case([n, f]: [usize; 2]) -> Case {
    Case::new(
        format!("[{n}, {f}]"),
        move |d| {
            let near = near().size(0.5 * d.scale * d.scale).conditioning(FUNCTION);
            vec![act("gate_up", [n, 2 * f], with_zeros(d, n * 2 * f)), out("y", Type::Act, [n, f], near)]
        },
        |dev, v| dev.swiglu_fwd(S, &SwigluFwd { gate_up: v.input("gate_up"), y: v.out("y") }),
    )
}

pub fn swiglu_fwd() -> Vec<Case> {
    rows().map(|(size, dims)| swiglu_fwd_case(dims).from(size)).collect()
}

pub fn swiglu_fwd_sample() -> Case {
    swiglu_fwd_case([3, 4])
}

/// If `in_place`, the gradient overwrites gate and up.
fn swiglu_bwd_case([n, f]: [usize; 2], in_place: bool) -> Case {
    Case::new(
        format!("[{n}, {f}]{}", if in_place { ", in place" } else { "" }),
        move |d| {
            let near = near().size(0.5 * d.scale * d.scale).conditioning(FUNCTION);
            let dy = act("dy", [n, f], d.normal(n * f));
            let gate_up = with_zeros(d, n * 2 * f);
            if in_place {
                return vec![dy, add_to("gate_up", Type::Act, [n, 2 * f], gate_up, near)];
            }
            vec![dy, act("gate_up", [n, 2 * f], gate_up), out("dgate_up", Type::Act, [n, 2 * f], near)]
        },
        move |dev, v| {
            let (dy, gate_up) = (v.input("dy"), v.input("gate_up"));
            let dgate_up = v.out(if in_place { "gate_up" } else { "dgate_up" });
            dev.swiglu_bwd(S, &SwigluBwd { dy, gate_up, dgate_up })
        },
    )
}

pub fn swiglu_bwd() -> Vec<Case> {
    let both = |(size, dims)| [false, true].map(|in_place| swiglu_bwd_case(dims, in_place).from(size));
    rows().flat_map(both).collect()
}

pub fn swiglu_bwd_sample() -> Case {
    swiglu_bwd_case([3, 4], false)
}
