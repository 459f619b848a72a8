//! Products against f64, and every path against every other.

use half::{bf16, f16};
use proptest::prelude::*;

use super::*;
use crate::codec::Codec;
use crate::layout::Layout;
use crate::matrix::{Bytes, HyperMatrix};

/// Random numbers for test data (splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Standard normal, by the sum of twelve uniform values.
    fn normal(&mut self) -> f32 {
        let sum: f64 = (0..12).map(|_| self.next() as f64 / u64::MAX as f64).sum();
        (sum - 6.0) as f32
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }
}

/// A matrix of random codes and group exponents.
fn matrix(random: &mut Random, rows: usize, cols: usize, codec: Codec, bits: u32) -> HyperMatrix {
    let layout = Layout::new(rows, cols, codec.trajectory(bits).unwrap()).unwrap();
    let row_scales: Vec<u8> = (0..layout.row_scales_len() / 2)
        .flat_map(|_| bf16::from_f32(0.001 + random.normal().abs() * 0.01).to_le_bytes())
        .collect();
    HyperMatrix::new(
        layout,
        Bytes::copied(&random.bytes(layout.codes_len())),
        Bytes::copied(&row_scales),
        Bytes::copied(&random.bytes(layout.group_exponents_len())),
    )
    .unwrap()
}

/// `x W^T + b` in f64, and the sum of the squares of all terms: what the outputs' squares would sum up
/// to, had chance not let terms cancel.
fn reference(matrix: &HyperMatrix, x: &[f32], bias: Option<&[f32]>) -> (Vec<f64>, f64) {
    let (rows, cols) = (matrix.layout().rows(), matrix.layout().cols());
    let weights = matrix.view().decode(Isa::Portable);
    let tokens = x.len() / cols.max(1);
    let (mut y, mut energy) = (Vec::new(), 0.0);
    for token in 0..tokens {
        for row in 0..rows {
            let mut sum = bias.map_or(0.0, |bias| f64::from(bias[row]));
            energy += sum * sum;
            for col in 0..cols {
                let term = f64::from(x[token * cols + col]) * f64::from(weights[row * cols + col]);
                sum += term;
                energy += term * term;
            }
            y.push(sum);
        }
    }
    (y, energy)
}

fn relative_error(y: &[f32], (expected, energy): &(Vec<f64>, f64)) -> f64 {
    let error: f64 = y.iter().zip(expected).map(|(y, e)| (f64::from(*y) - e).powi(2)).sum();
    (error / energy.max(1e-300)).sqrt()
}

/// A product of f32 into a buffer full of NaN.
fn product(
    matrix: &HyperMatrix,
    x: &[f32],
    tokens: usize,
    bias: Option<&[f32]>,
    options: LinearOptions,
) -> Vec<f32> {
    let (rows, cols) = (matrix.layout().rows(), matrix.layout().cols());
    let mut y = vec![f32::NAN; tokens * rows];
    let x = Input::new(Floats::F32(x), tokens, cols, cols).unwrap();
    let out = Output::new(FloatsMut::F32(&mut y), tokens, rows, rows).unwrap();
    linear(matrix.view(), x, bias, out, &options).unwrap();
    y
}

fn bits_of(y: &[f32]) -> Vec<u32> {
    y.iter().map(|y| y.to_bits()).collect()
}

fn options(precision: Precision, isa: Isa, threads: usize) -> LinearOptions {
    LinearOptions { precision, isa, threads }
}

fn largest_error(precision: Precision) -> f64 {
    match precision {
        Precision::Highest => 4e-7,
        Precision::High => 1e-4,
        Precision::Medium => 1.2e-2,
    }
}

const PORTABLE: Isa = Isa::Portable;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn every_path_gives_the_same_and_is_right(
        rows in 1usize..120,
        cols in prop_oneof![1usize..300, 1000usize..1300, 2040usize..2060],
        tokens in prop_oneof![1usize..10, 10usize..40],
        codec in prop_oneof![Just(Codec::Shift), Just(Codec::Winding)],
        rate in 0usize..6,
        with_bias: bool,
        seed: u64,
    ) {
        let mut random = Random(seed);
        let bits = codec.rates()[rate % codec.rates().len()];
        let matrix = matrix(&mut random, rows, cols, codec, bits);
        let x: Vec<f32> = (0..tokens * cols).map(|_| random.normal()).collect();
        let bias: Option<Vec<f32>> =
            with_bias.then(|| (0..rows).map(|_| random.normal()).collect());
        let expected = reference(&matrix, &x, bias.as_deref());
        for precision in Precision::ALL {
            let y = product(&matrix, &x, tokens, bias.as_deref(), options(precision, PORTABLE, 1));
            let error = relative_error(&y, &expected);
            // The bound is for many outputs; of few, chance may err by some deviations more.
            let bound = largest_error(precision) * (1.0 + 4.0 / (y.len() as f64).sqrt());
            prop_assert!(error <= bound, "{precision:?}: {error} > {bound}");
            for isa in Isa::available() {
                for threads in [1, 3] {
                    let other =
                        product(&matrix, &x, tokens, bias.as_deref(), options(precision, isa, threads));
                    prop_assert!(bits_of(&other) == bits_of(&y), "{precision:?} {isa} {threads}");
                }
                // One token at a time.
                let single: Vec<f32> = x
                    .chunks(cols)
                    .take(3)
                    .flat_map(|x| product(&matrix, x, 1, bias.as_deref(), options(precision, isa, 1)))
                    .collect();
                prop_assert!(bits_of(&single) == bits_of(&y[..single.len()]), "{precision:?} {isa}");
            }
        }
    }

    #[test]
    fn dtypes_and_strides(
        rows in 1usize..40,
        cols in 1usize..200,
        tokens in 0usize..20,
        gap in 0usize..5,
        seed: u64,
    ) {
        let mut random = Random(seed);
        let matrix = matrix(&mut random, rows, cols, Codec::Shift, 4);
        let (x_stride, y_stride) = (cols + gap, rows + gap);
        // Values that every dtype holds.
        let x: Vec<bf16> =
            (0..tokens * x_stride).map(|_| bf16::from_f32((random.normal() * 16.0).round())).collect();
        let x16: Vec<f16> = x.iter().map(|x| f16::from_f32(x.to_f32())).collect();
        let x32: Vec<f32> = x.iter().map(|x| x.to_f32()).collect();
        let len = tokens * y_stride;
        for isa in Isa::available() {
            let options = options(Precision::High, isa, 2);
            let mut y32 = vec![f32::NAN; len];
            let mut y16 = vec![f16::NAN; len];
            let mut yb = vec![bf16::NAN; len];
            let input = |x| Input::new(x, tokens, cols, x_stride).unwrap();
            let output = |y| Output::new(y, tokens, rows, y_stride).unwrap();
            let view = matrix.view();
            linear(view, input(Floats::BF16(&x)), None, output(FloatsMut::F32(&mut y32)), &options)
                .unwrap();
            linear(view, input(Floats::F16(&x16)), None, output(FloatsMut::BF16(&mut yb)), &options)
                .unwrap();
            linear(view, input(Floats::F32(&x32)), None, output(FloatsMut::F16(&mut y16)), &options)
                .unwrap();
            for (i, y) in y32.into_iter().enumerate() {
                if i % y_stride < rows {
                    prop_assert!(y.is_finite());
                    prop_assert_eq!(yb[i].to_bits(), bf16::from_f32(y).to_bits());
                    prop_assert_eq!(y16[i].to_bits(), f16::from_f32(y).to_bits());
                } else {
                    prop_assert!(y.is_nan() && yb[i].is_nan() && y16[i].is_nan());
                }
            }
        }
    }
}

#[test]
fn many_tokens_are_cut_into_chunks_without_a_trace() {
    let mut random = Random(5);
    let (rows, cols, tokens) = (100, 130, 2500);
    let matrix = matrix(&mut random, rows, cols, Codec::Shift, 3);
    let x: Vec<f32> = (0..tokens * cols).map(|_| random.normal()).collect();
    for isa in Isa::available() {
        for precision in Precision::ALL {
            let y = product(&matrix, &x, tokens, None, options(precision, isa, 4));
            for token in [0, 1, 1023, 1024, 1500, 2499] {
                let x = &x[token * cols..][..cols];
                let single = product(&matrix, x, 1, None, options(precision, PORTABLE, 1));
                assert_eq!(bits_of(&single), bits_of(&y[token * rows..][..rows]), "{isa} {token}");
            }
        }
    }
}

#[test]
fn not_finite_tokens_become_nan_and_touch_no_other() {
    let mut random = Random(6);
    let (rows, cols, tokens) = (50, 300, 20);
    let matrix = matrix(&mut random, rows, cols, Codec::Shift, 4);
    let clean: Vec<f32> = (0..tokens * cols).map(|_| random.normal()).collect();
    let mut x = clean.clone();
    x[3 * cols + 299] = f32::NAN;
    x[4 * cols] = f32::INFINITY;
    x[19 * cols + 128] = f32::NEG_INFINITY;
    for isa in Isa::available() {
        for precision in Precision::ALL {
            let expected = product(&matrix, &clean, tokens, None, options(precision, isa, 1));
            let y = product(&matrix, &x, tokens, None, options(precision, isa, 1));
            for token in 0..tokens {
                let range = token * rows..(token + 1) * rows;
                if [3, 4, 19].contains(&token) {
                    assert!(y[range].iter().all(|y| y.is_nan()), "{isa} {precision:?} {token}");
                } else {
                    assert_eq!(bits_of(&y[range.clone()]), bits_of(&expected[range]));
                }
            }
        }
    }
}

#[test]
fn zeros_give_the_bias_and_extremes_stay_finite() {
    let mut random = Random(7);
    let (rows, cols) = (20, 100);
    let matrix = matrix(&mut random, rows, cols, Codec::Winding, 5);
    let bias: Vec<f32> = (0..rows).map(|_| random.normal()).collect();
    for isa in Isa::available() {
        for precision in Precision::ALL {
            let options = options(precision, isa, 1);
            assert_eq!(product(&matrix, &vec![0.0; cols], 1, Some(&bias), options), bias);
            assert_eq!(product(&matrix, &vec![-0.0; cols], 1, Some(&bias), options), bias);
            for magnitude in [f32::from_bits(1), 1e-38, 1e-30, 1e30] {
                let x: Vec<f32> = (0..cols).map(|i| magnitude * (i % 3) as f32).collect();
                let y = product(&matrix, &x, 1, None, options);
                assert!(y.iter().all(|y| y.is_finite()), "{magnitude}");
                if magnitude >= 1e-30 {
                    let error = relative_error(&y, &reference(&matrix, &x, None));
                    assert!(error < 3e-2, "{isa} {precision:?} {magnitude}: {error}");
                }
            }
        }
    }
}

#[test]
fn the_largest_int8_values_do_not_overflow() {
    let cols = 1100;
    let layout = Layout::new(16, cols, Codec::Shift.trajectory(8).unwrap()).unwrap();
    for code in [0x80, 0x7f] {
        let matrix = HyperMatrix::new(
            layout,
            Bytes::copied(&vec![code; layout.codes_len()]),
            Bytes::copied(&[0x80, 0x3f].repeat(16)),
            Bytes::copied(&vec![0; layout.group_exponents_len()]),
        )
        .unwrap();
        for sign in [1.0, -1.0] {
            let x = vec![sign; cols];
            let expected = f64::from(sign) * f64::from(code as i8) * cols as f64;
            for isa in Isa::available() {
                for precision in Precision::ALL {
                    for y in product(&matrix, &x, 1, None, options(precision, isa, 1)) {
                        let error = (f64::from(y) / expected - 1.0).abs();
                        assert!(error < 1e-6, "{isa} {precision:?}: {y} {expected}");
                    }
                }
            }
        }
    }
}

#[test]
fn empty_products() {
    let mut random = Random(8);
    for (rows, cols, tokens) in [(0, 10, 3), (10, 0, 3), (10, 10, 0), (0, 0, 0)] {
        let matrix = matrix(&mut random, rows, cols, Codec::Shift, 4);
        let bias: Vec<f32> = (0..rows).map(|_| random.normal()).collect();
        let x = vec![1.0; tokens * cols];
        for isa in Isa::available() {
            let options = options(Precision::High, isa, 2);
            let y = product(&matrix, &x, tokens, Some(&bias), options);
            if cols == 0 {
                assert!(y.chunks_exact(rows.max(1)).all(|y| y == bias));
                assert!(product(&matrix, &x, tokens, None, options).iter().all(|&y| y == 0.0));
            }
        }
    }
}

#[test]
fn wrong_shapes_are_refused() {
    let mut random = Random(9);
    let matrix = matrix(&mut random, 5, 6, Codec::Shift, 4);
    let options = options(Precision::High, PORTABLE, 1);
    let x = [0.0; 100];
    let mut y = [0.0; 100];
    let mut call = |x_cols, y_rows, y_cols, bias: Option<&[f32]>| {
        let x = Input::new(Floats::F32(&x), 2, x_cols, x_cols).unwrap();
        let out = Output::new(FloatsMut::F32(&mut y), y_rows, y_cols, y_cols).unwrap();
        linear(matrix.view(), x, bias, out, &options).map_err(|error| error.to_string())
    };
    assert!(call(6, 2, 5, None).is_ok());
    let error = call(7, 2, 5, None).unwrap_err();
    assert!(error.contains("2 x 7") && error.contains("5 x 6"), "{error}");
    assert!(call(6, 3, 5, None).unwrap_err().contains("3 x 5"));
    assert!(call(6, 2, 6, None).unwrap_err().contains("2 x 6"));
    assert!(call(6, 2, 5, Some(&[0.0; 4])).unwrap_err().contains("bias of 4"));
}
