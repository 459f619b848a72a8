//! The codec from outside: every path gives the same codes, and the codes are good.

use birkhoff_core::codec::Feedback;
use birkhoff_core::codec::scale::GROUP_SCALE;
use birkhoff_core::codec::shift::viterbi;
use birkhoff_core::layout::GROUP;
use birkhoff_core::{
    Codec, Distortion, Dtype, EncodeOptions, Error, FloatSlice, HyperMatrix, Isa, ScaleRefit,
    threads,
};
use proptest::prelude::*;

fn options(codec: Codec, bits: u32, isa: Isa) -> EncodeOptions {
    EncodeOptions { codec, bits, refit: ScaleRefit::LeastSquares, isa }
}

/// Gaussian weights from a small generator: the same on every machine but for the last bit.
fn gaussian(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        ((state >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    };
    (0..count)
        .map(|_| {
            let (radius, angle) = ((-2.0 * uniform().ln()).sqrt(), uniform());
            (0.02 * radius * (std::f64::consts::TAU * angle).cos()) as f32
        })
        .collect()
}

fn encode(
    weights: &[f32],
    rows: usize,
    cols: usize,
    options: &EncodeOptions,
) -> (HyperMatrix, Distortion) {
    HyperMatrix::encode(weights.into(), rows, cols, options).unwrap()
}

fn parts(matrix: &HyperMatrix) -> [Vec<u8>; 3] {
    let view = matrix.view();
    [view.codes().to_vec(), view.row_scales().to_vec(), view.group_exponents().to_vec()]
}

fn rates() -> impl Iterator<Item = (Codec, u32)> {
    Codec::ALL.into_iter().flat_map(|codec| codec.rates().iter().map(move |&bits| (codec, bits)))
}

#[test]
fn gaussian_weights_reach_the_rate_distortion_targets() {
    let (rows, cols) = (64, 5120);
    let weights = gaussian(rows * cols, 1);
    let shift = [(2, 11.3), (3, 17.4), (4, 23.4), (5, 29.2), (6, 34.7), (8, 43.0)];
    let winding = [(4, 20.8), (5, 26.8), (6, 32.3)];
    for (codec, floors) in [(Codec::Shift, &shift[..]), (Codec::Winding, &winding[..])] {
        for &(bits, floor) in floors {
            let (matrix, distortion) =
                encode(&weights, rows, cols, &options(codec, bits, Isa::best()));
            let sqnr = distortion.sqnr_db();
            assert!(sqnr > floor, "{codec:?}, {bits} bits: {sqnr} dB");
            let rate = 8.0 * matrix.layout().len() as f64 / (rows * cols) as f64;
            assert!(rate < f64::from(bits) + 0.04, "{codec:?}, {bits} bits: {rate} bits a weight");
        }
    }
}

#[test]
fn the_fast_search_comes_within_a_tenth_of_a_decibel_of_the_textbook() {
    // Wide enough that closing the orbits hardly counts.
    let cols = 2 * 1024;
    let weights = gaussian(cols, 2);
    for bits in 2..=6 {
        let (matrix, distortion) =
            encode(&weights, 1, cols, &options(Codec::Shift, bits, Isa::best()));
        let view = matrix.view();
        let row_scale = view.strip_row_scales(0)[0];
        let unit = |col: usize| {
            let exponent = view.strip_exponents(0)[col / GROUP][0] & 15;
            row_scale * GROUP_SCALE[usize::from(exponent)]
        };
        let (mut signal, mut noise) = (0.0, 0.0);
        for stream in 0..2 {
            let cols = (0..cols).filter(|col| col / 16 % 2 == stream);
            let targets: Vec<f32> = cols.map(|col| weights[col] / unit(col)).collect();
            signal += targets.iter().map(|&target| f64::from(target).powi(2)).sum::<f64>();
            noise += viterbi::best_path(bits, &targets).1;
        }
        let textbook = 10.0 * (signal / noise).log10();
        let lost = textbook - distortion.sqnr_db();
        assert!(lost < 0.1, "{bits} bits: {lost} dB below {textbook} dB");
    }
}

#[test]
fn unbiased_scales_keep_the_projection_on_the_weights() {
    let weights = gaussian(32 * 768, 3);
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    for (codec, bits) in rates() {
        let options =
            EncodeOptions { refit: ScaleRefit::Unbiased, ..options(codec, bits, Isa::best()) };
        let (matrix, _) = encode(&weights, 32, 768, &options);
        let decoded = matrix.view().decode(Isa::best());
        for (row, decoded) in weights.chunks(768).zip(decoded.chunks(768)) {
            let ratio = dot(row, decoded) / dot(row, row);
            // The row scale is a bfloat16.
            assert!((ratio - 1.0).abs() < 1.0 / 256.0, "{codec:?} {bits} bits: {ratio}");
        }
    }
}

/// Second moments of inputs that mostly lie in six directions, row-major.
fn moments(cols: usize) -> Vec<f64> {
    let along = |direction: usize, col: usize| ((direction * (2 * col + 1)) as f64 * 1.3).cos();
    let moment = |row, col| (1..=6).map(|d| along(d, row) * along(d, col)).sum::<f64>();
    let own = |row, col| if row == col { 0.1 } else { 0.0 };
    (0..cols * cols).map(|i| (i / cols, i % cols)).map(|(i, j)| moment(i, j) + own(i, j)).collect()
}

/// The upper triangular `C` with `C C^T = h`.
fn factor(h: &[f64], n: usize) -> Vec<f32> {
    let mut c = vec![0.0f64; n * n];
    for col in (0..n).rev() {
        for row in (0..=col).rev() {
            let known: f64 = (col + 1..n).map(|k| c[row * n + k] * c[col * n + k]).sum();
            let rest = h[row * n + col] - known;
            c[row * n + col] = if row == col { rest.sqrt() } else { rest / c[col * n + col] };
        }
    }
    c.into_iter().map(|value| value as f32).collect()
}

/// `tr(E H E^T)` for the error of a matrix.
fn output_error(weights: &[f32], decoded: &[f32], h: &[f64], cols: usize) -> f64 {
    let errors: Vec<f64> =
        weights.iter().zip(decoded).map(|(w, d)| f64::from(*w) - f64::from(*d)).collect();
    let of_row = |row: &[f64]| -> f64 {
        let h_row = |i: usize| (0..cols).map(|j| h[i * cols + j] * row[j]).sum::<f64>();
        (0..cols).map(|i| row[i] * h_row(i)).sum()
    };
    errors.chunks(cols).map(of_row).sum()
}

#[test]
fn feedback_lowers_the_error_of_the_outputs() {
    // Rows that do not fill a strip, columns that do not fill a group or a block.
    let (rows, cols) = (21, 300);
    let weights = gaussian(rows * cols, 7);
    let h = moments(cols);
    let feedback = Feedback::new(&factor(&h, cols), cols).unwrap();
    for (codec, bits) in rates() {
        let options = options(codec, bits, Isa::best());
        let error = |feedback| {
            let (matrix, distortion) =
                HyperMatrix::encode_with(weights[..].into(), rows, cols, &options, feedback)
                    .unwrap();
            let measured = matrix.view().distortion(Isa::best(), weights[..].into()).unwrap();
            assert_eq!(measured, distortion);
            output_error(&weights, &matrix.view().decode(Isa::best()), &h, cols)
        };
        let (plain, fed) = (error(None), error(Some(&feedback)));
        assert!(fed < 0.2 * plain, "{codec:?}, {bits} bits: {} of the error", fed / plain);
    }
}

#[test]
fn feedback_of_independent_inputs_changes_little() {
    let (rows, cols) = (16, 256);
    let weights = gaussian(rows * cols, 8);
    let identity: Vec<f32> = (0..cols * cols).map(|i| f32::from(i / cols == i % cols)).collect();
    let feedback = Feedback::new(&identity, cols).unwrap();
    for (codec, bits) in rates() {
        let options = options(codec, bits, Isa::best());
        let sqnr = |feedback| {
            let encoded =
                HyperMatrix::encode_with(weights[..].into(), rows, cols, &options, feedback);
            encoded.unwrap().1.sqnr_db()
        };
        let (plain, fed) = (sqnr(None), sqnr(Some(&feedback)));
        assert!((plain - fed).abs() < 0.5, "{codec:?}, {bits} bits: {fed} dB, not {plain} dB");
    }
}

#[test]
fn factors_that_are_none_are_refused() {
    let good = factor(&moments(40), 40);
    let mut cases = vec![("40 x 40 elements", good[1..].to_vec())];
    for (at, value) in [(41, 0.0), (41, -1.0), (41, f32::NAN), (5, f32::INFINITY)] {
        let mut factor = good.clone();
        factor[at] = value;
        cases.push(("positive definite", factor));
    }
    for (expected, factor) in cases {
        let message = Feedback::new(&factor, 40).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    }
    let feedback = Feedback::new(&good, 40).unwrap();
    let options = options(Codec::Shift, 4, Isa::best());
    let weights = gaussian(82, 9);
    let result =
        HyperMatrix::encode_with(weights[..].into(), 2, 41, &options, Some(&feedback)).map(|_| ());
    let message = result.unwrap_err().to_string();
    assert!(message.contains("40 columns, the matrix has 41"), "{message}");
}

#[test]
fn weights_that_are_not_finite_are_counted() {
    let mut weights = gaussian(40 * 64, 4);
    weights[3] = f32::NAN;
    weights[2000] = f32::INFINITY;
    weights[2559] = f32::NEG_INFINITY;
    for (codec, bits) in rates() {
        let options = options(codec, bits, Isa::best());
        match HyperMatrix::encode(weights[..].into(), 40, 64, &options) {
            Err(Error::NotFinite { count: 3, total: 2560 }) => {}
            other => panic!("{:?}", other.map(|_| ())),
        }
    }
}

#[test]
fn a_wrong_number_of_weights_is_refused() {
    let options = options(Codec::Shift, 4, Isa::best());
    let result = HyperMatrix::encode([0.0f32; 10][..].into(), 3, 4, &options);
    let message = result.map(|_| ()).unwrap_err().to_string();
    assert!(message.contains("3 x 4") && message.contains("10"), "{message}");
}

/// Weights of very different kinds in one matrix, or plain Gaussian ones.
fn any_weights(count: usize) -> impl Strategy<Value = Vec<f32>> {
    let weight = prop_oneof![
        8 => -1.0f32..1.0,
        1 => Just(0.0f32),
        1 => prop::num::f32::SUBNORMAL,
        1 => -1e30f32..1e30,
        1 => prop::sample::select(vec![f32::MAX, f32::MIN, f32::MIN_POSITIVE]),
    ];
    prop_oneof![
        prop::collection::vec(weight, count),
        any::<u64>().prop_map(move |seed| gaussian(count, seed)),
    ]
}

fn any_matrix() -> impl Strategy<Value = (usize, usize, Vec<f32>)> {
    let rows = prop_oneof![Just(0usize), Just(1), Just(16), 2usize..40];
    let cols = prop_oneof![Just(0usize), Just(1), Just(32), Just(128), 2usize..300];
    (rows, cols).prop_flat_map(|(rows, cols)| {
        any_weights(rows * cols).prop_map(move |weights| (rows, cols, weights))
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// The same weights give the same bytes on every instruction set and thread count, and the
    /// distortion reported is that of the decoded matrix.
    #[test]
    fn codes_depend_on_the_weights_alone(
        (rows, cols, weights) in any_matrix(),
        (codec, bits) in prop::sample::select(rates().collect::<Vec<_>>()),
    ) {
        let (expected, distortion) =
            encode(&weights, rows, cols, &options(codec, bits, Isa::Portable));
        let decoded = expected.view().decode(Isa::Portable);
        prop_assert!(decoded.iter().all(|value| value.is_finite()));
        for isa in Isa::available() {
            for count in [1, 3] {
                let (matrix, again) = threads::install(count, || {
                    encode(&weights, rows, cols, &options(codec, bits, isa))
                });
                prop_assert!(parts(&matrix) == parts(&expected), "{isa}, {count} threads");
                prop_assert_eq!(again, distortion);
            }
            prop_assert_eq!(&expected.view().decode(isa), &decoded);
        }
        let measured = expected.view().distortion(Isa::best(), (&weights[..]).into()).unwrap();
        prop_assert_eq!(measured, distortion);
        let errors = weights.iter().zip(&decoded).map(|(w, d)| (f64::from(*w) - f64::from(*d)).abs());
        let largest = errors.fold(0.0, f64::max);
        prop_assert!((largest - distortion.max_error).abs() <= 1e-6 * largest, "{largest}");
    }

    /// With feedback too, codes depend on the weights and the factor alone.
    #[test]
    fn codes_with_feedback_are_the_same_everywhere(
        (rows, cols, weights) in any_matrix(),
        (codec, bits) in prop::sample::select(rates().collect::<Vec<_>>()),
    ) {
        let feedback = Feedback::new(&factor(&moments(cols), cols), cols).unwrap();
        let encode = |isa| {
            let options = options(codec, bits, isa);
            HyperMatrix::encode_with(weights[..].into(), rows, cols, &options, Some(&feedback))
                .unwrap()
        };
        let (expected, distortion) = encode(Isa::Portable);
        let decoded = expected.view().decode(Isa::Portable);
        prop_assert!(decoded.iter().all(|value| value.is_finite()));
        for isa in Isa::available() {
            for count in [1, 3] {
                let (matrix, again) = threads::install(count, || encode(isa));
                prop_assert!(parts(&matrix) == parts(&expected), "{isa}, {count} threads");
                prop_assert_eq!(again, distortion);
            }
        }
    }

    /// float64 and bfloat16 weights give the codes of the f32 weights they stand for.
    #[test]
    fn dtypes_agree(cols in 1usize..200, seed in any::<u64>()) {
        let weights: Vec<half::bf16> =
            gaussian(3 * cols, seed).into_iter().map(half::bf16::from_f32).collect();
        let as_f32: Vec<f32> = weights.iter().map(|weight| weight.to_f32()).collect();
        let options = options(Codec::Shift, 4, Isa::best());
        let (expected, _) = encode(&as_f32, 3, cols, &options);
        let as_bf16: Vec<u8> = weights.iter().flat_map(|weight| weight.to_le_bytes()).collect();
        let as_f64: Vec<u8> = as_f32.iter().flat_map(|&w| f64::from(w).to_le_bytes()).collect();
        for (bytes, dtype) in [(&as_bf16, Dtype::BF16), (&as_f64, Dtype::F64)] {
            let data = FloatSlice::new(bytes, dtype).unwrap();
            let (matrix, _) = HyperMatrix::encode(data, 3, cols, &options).unwrap();
            prop_assert!(parts(&matrix) == parts(&expected), "{dtype:?}");
        }
    }
}
