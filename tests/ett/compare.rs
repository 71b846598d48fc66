//! Tests of the comparator: each kind of damage to perfect data must be detected, in every precision.

use ett::backend::DType;
use ett::compare::{Bounds, choices, compare, indices, no_worse_than};

use crate::common::{Outcome, normal, rounded};

const FLOATS: [DType; 3] = [DType::F64, DType::F32, DType::Bf16];
const ROWS: usize = 301;
const COLS: usize = 257;

/// Damages perfect data and expects an error that contains `word`.
fn rejects(word: &str, damage: impl Fn(&mut Vec<f64>)) {
    for dtype in FLOATS {
        let want = rounded(dtype, &normal(1, ROWS * COLS));
        compare("perfect", &want, &want, COLS, Bounds::of(dtype)).expect("perfect data passes");
        let mut got = want.clone();
        damage(&mut got);
        let e = compare("damaged", &got, &want, COLS, Bounds::of(dtype)).expect_err("damage must be seen");
        assert!(e.starts_with("damaged: ") && e.contains(word), "{dtype}: {e}");
    }
}

#[test]
fn comparator_rejects_a_zeroed_row() {
    rejects("row 170", |v| v[170 * COLS..171 * COLS].fill(0.0));
}

#[test]
fn comparator_rejects_a_flipped_tile() {
    // Transposed in place: the same values and the same norm.
    rejects("off by", |v| {
        for i in 0..16 {
            for j in 0..i {
                v.swap((64 + i) * COLS + 32 + j, (64 + j) * COLS + 32 + i);
            }
        }
    });
    // With the opposite sign.
    rejects("off by", |v| {
        for i in 64..80 {
            v[i * COLS + 32..i * COLS + 48].iter_mut().for_each(|x| *x = -*x);
        }
    });
}

#[test]
fn comparator_rejects_a_dropped_tail() {
    // The last column of every row, the last values of the last row, and the very last value.
    rejects("off by", |v| v.iter_mut().skip(COLS - 1).step_by(COLS).for_each(|x| *x = 0.0));
    rejects("row 300", |v| v[ROWS * COLS - 7..].fill(0.0));
    rejects("row 300", |v| v[ROWS * COLS - 1] = 0.0);
    rejects("values, wanted", |v| v.truncate(ROWS * COLS - 1));
}

#[test]
fn comparator_rejects_one_wrong_index() {
    // One row that was gathered from its neighbour's position.
    rejects("row 12 ", |v| v.copy_within(13 * COLS..14 * COLS, 12 * COLS));
    let want: Vec<i32> = (0..1000).collect();
    let mut got = want.clone();
    got[999] = 998;
    let e = indices("indices", &got, &want).expect_err("a wrong index must be seen");
    assert_eq!(e, "indices: 1 of 1000 indices differ, the first at 999: 998, wanted 999");
    assert!(indices("indices", &want, &want).is_ok() && indices("indices", &want[1..], &want).is_err());
}

#[test]
fn comparator_rejects_nan() {
    rejects("row 4, column 9: NaN", |v| v[4 * COLS + 9] = f64::NAN);
    rejects("not finite", |v| v[0] = f64::INFINITY);
    rejects("not finite", |v| v.fill(f64::NAN));
    // NaN never equals a wanted NaN.
    let nan = [f64::NAN];
    assert!(compare("nan", &nan, &nan, 1, Bounds::of(DType::F32)).is_err());
    // An infinite bound does not accept NaN either.
    assert!(compare("nan", &nan, &[1.0], 1, Bounds::norm(f64::INFINITY)).is_err());
}

#[test]
fn comparator_rejects_a_small_error_everywhere() {
    for (dtype, factor) in [(DType::F64, 1e-11), (DType::F32, 1e-5), (DType::Bf16, 0.02)] {
        let want = normal(2, ROWS * COLS);
        let got: Vec<f64> = want.iter().map(|v| v * (1.0 + factor)).collect();
        let e = compare("scaled", &got, &want, COLS, Bounds::of(dtype)).expect_err("must be seen");
        assert!(e.contains("of the norm"), "{e}");
    }
}

#[test]
fn comparator_accepts_rounding() -> Outcome {
    for (dtype, rows, cols) in [(DType::F32, ROWS, COLS), (DType::Bf16, ROWS, COLS), (DType::Bf16, 5000, 1)] {
        let want = normal(3, rows * cols);
        compare("rounded", &rounded(dtype, &want), &want, cols, Bounds::of(dtype))?;
        // Rows and values of very different sizes.
        let want: Vec<f64> =
            want.iter().enumerate().map(|(i, v)| v * 10f64.powi((i / cols % 7) as i32)).collect();
        compare("rounded", &rounded(dtype, &want), &want, cols, Bounds::of(dtype))?;
    }
    compare("zeros", &[0.0; 4], &[0.0; 4], 2, Bounds::of(DType::F64))?;
    assert!(compare("zeros", &[0.0, 1e-300], &[0.0; 2], 2, Bounds::of(DType::F64)).is_err());
    compare("zeros", &[0.0, 1e-300], &[0.0; 2], 2, Bounds::norm(1e-9).least(1e-6))?;
    Ok(())
}

#[test]
fn comparator_knows_twice_naive() -> Outcome {
    let want = normal(4, ROWS * COLS);
    let noisy = |factor: f64| -> Vec<f64> {
        want.iter().zip(normal(5, ROWS * COLS)).map(|(w, n)| w + factor * n).collect()
    };
    let naive = noisy(1e-4);
    no_worse_than("as good", &noisy(1.5e-4), &naive, &want, COLS, DType::F32)?;
    no_worse_than("perfect", &want, &naive, &want, COLS, DType::F32)?;
    assert!(no_worse_than("worse", &noisy(3e-4), &naive, &want, COLS, DType::F32).is_err());
    // A naive computation without any error does not make the bound zero.
    no_worse_than("rounded", &rounded(DType::Bf16, &want), &want, &want, COLS, DType::Bf16)?;
    // One bad row is enough.
    let mut got = naive.clone();
    got[..COLS].iter_mut().for_each(|v| *v += 1e-3);
    let e = no_worse_than("one row", &got, &naive, &want, COLS, DType::F32).expect_err("must be seen");
    assert!(e.contains("worst row"), "{e}");
    Ok(())
}

#[test]
fn comparator_judges_choices_by_their_scores() {
    let scores = [0.0, 1.0, 1.0 - 1e-9, 0.5, 0.25, 0.0];
    assert!(choices("choices", &[2, 0], &scores, 3, 1e-6).is_ok());
    assert!(choices("choices", &[2, 0], &scores, 3, 1e-12).is_err());
    assert!(choices("choices", &[1, 1], &scores, 3, 1e-6).is_err());
    assert!(choices("choices", &[1, 3], &scores, 3, 1e-6).is_err());
    assert!(choices("choices", &[1, -1], &scores, 3, 1e-6).is_err());
    assert!(choices("choices", &[1, 0], &[f64::NAN; 6], 3, 1e-6).is_err());
}
