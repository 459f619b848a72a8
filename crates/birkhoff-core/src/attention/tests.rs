//! The operator against its definition in f64, and every instruction set against every other.

use half::{bf16, f16};
use proptest::prelude::*;

use super::*;
use crate::linear::Floats;

/// Random numbers for test data (splitmix64), roughly normal.
fn normal(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) as f64 / u64::MAX as f64
    };
    (0..len).map(|_| ((0..12).map(|_| next()).sum::<f64>() - 6.0) as f32).collect()
}

/// Attention within an image, with queries, keys and values in one tensor
/// `(batch, height, width, 3, heads, head_dim)`.
#[derive(Clone, Copy, Debug)]
struct Case {
    shape: Shape,
    /// Rows of a window, 0 for none.
    window: usize,
    relative: bool,
    scale: f32,
    seed: u64,
}

impl Case {
    fn grid(batch: usize, height: usize, width: usize, heads: usize, head_dim: usize) -> Case {
        let shape = Shape { batch, height, width, heads, head_dim };
        Case { shape, window: 0, relative: true, scale: (head_dim as f32).powf(-0.5), seed: 1 }
    }

    fn tensor(&self) -> Vec<f32> {
        normal(self.seed, 3 * self.shape.sizes().iter().product::<usize>())
    }

    /// Calls `work` with operands in a tensor of [`Case::tensor`]'s shape.
    fn with<R>(&self, tensor: Floats<'_>, work: impl FnOnce(&Operands<'_>) -> R) -> R {
        let Shape { height, width, heads, head_dim, .. } = self.shape;
        let token = heads * head_dim;
        let strides = [height * width * 3 * token, width * 3 * token, 3 * token, head_dim];
        let part = |index: usize| {
            let tensor = match tensor {
                Floats::F32(all) => Floats::F32(&all[index * token..]),
                Floats::F16(all) => Floats::F16(&all[index * token..]),
                Floats::BF16(all) => Floats::BF16(&all[index * token..]),
            };
            Heads::new(tensor, self.shape, strides).unwrap()
        };
        let [rows, cols] = if self.window > 0 { [self.window; 2] } else { [height, width] };
        let table = |seed, size: usize| -> Vec<f32> {
            let rows = (2 * size - 1) * head_dim;
            normal(self.seed ^ seed, rows).iter().map(|value| 0.2 * value).collect()
        };
        let (table_height, table_width) = (table(2, rows), table(3, cols));
        let (key, value) = (normal(self.seed ^ 4, token), normal(self.seed ^ 5, token));
        work(&Operands {
            queries: part(0),
            keys: part(1),
            values: part(2),
            relative_position: self
                .relative
                .then_some(RelativePosition { height: &table_height, width: &table_width }),
            window: (self.window > 0).then_some(Window {
                size: self.window,
                padding_key: &key,
                padding_value: &value,
            }),
        })
    }
}

/// Attention into a buffer full of NaN.
fn computed(operands: &Operands<'_>, options: AttentionOptions) -> Vec<f32> {
    let mut out = vec![f32::NAN; operands.queries.shape().sizes().iter().product()];
    attention(operands, FloatsMut::F32(&mut out), &options).unwrap();
    out
}

fn relative_error(out: &[f32], expected: &[f64]) -> f64 {
    let error: f64 = out.iter().zip(expected).map(|(y, e)| (f64::from(*y) - e).powi(2)).sum();
    (error / expected.iter().map(|e| e * e).sum::<f64>().max(1e-300)).sqrt()
}

/// Checks a case on every instruction set.
fn check(case: &Case) {
    let tensor = case.tensor();
    case.with(Floats::F32(&tensor), |operands| {
        let expected = plain_attention(operands, case.scale);
        let mut first = None;
        for isa in Isa::available() {
            for threads in [1, 3] {
                let options = AttentionOptions { scale: case.scale, isa, threads };
                let out = computed(operands, options);
                let error = relative_error(&out, &expected);
                assert!(
                    error < 2e-6 * f64::from(case.scale.max(1.0)),
                    "{isa}: {error:e} for {case:?}"
                );
                let bits: Vec<u32> = out.iter().map(|y| y.to_bits()).collect();
                assert!(*first.get_or_insert_with(|| bits.clone()) == bits, "{isa}: {case:?}");
            }
        }
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_instruction_set_computes_the_definition(
        (batch, height, width) in (1usize..3, 1usize..12, 1usize..24),
        (heads, head_dim) in (1usize..4, 1usize..40),
        window in 0usize..7,
        relative in any::<bool>(),
        scale in 0.05f32..2.0,
        seed in any::<u64>(),
    ) {
        let shape = Shape { batch, height, width, heads, head_dim };
        check(&Case { shape, window, relative, scale, seed });
    }
}

#[test]
fn windows_and_global_attention_of_image_encoders() {
    check(&Case { window: 14, ..Case::grid(1, 20, 30, 2, 64) });
    check(&Case::grid(1, 64, 64, 1, 1));
    check(&Case::grid(1, 6, 64, 1, 64));
    check(&Case::grid(1, 14, 14, 1, 80));
    check(&Case::grid(1, 9, 33, 1, 80));
}

#[test]
fn queries_and_keys_of_different_lengths() {
    let sequence = |width| Shape { batch: 2, height: 1, width, heads: 3, head_dim: 20 };
    let strides = |width| [3 * 20 * width, 3 * 20 * width, 20, 20 * width];
    for (queries, keys) in [(7, 300), (300, 7), (1, 1)] {
        let tensors = [(1, queries), (2, keys), (3, keys)]
            .map(|(seed, len)| (normal(seed, 2 * 3 * 20 * len), len));
        // Of shape (batch, heads, tokens, head_dim).
        let [queries, keys, values] = tensors
            .each_ref()
            .map(|(all, len)| Heads::new(Floats::F32(all), sequence(*len), strides(*len)).unwrap());
        let operands = Operands { queries, keys, values, relative_position: None, window: None };
        let expected = plain_attention(&operands, 0.3);
        for isa in Isa::available() {
            let out = computed(&operands, AttentionOptions { scale: 0.3, isa, threads: 2 });
            let error = relative_error(&out, &expected);
            assert!(error < 1e-6, "{isa}: {error:e}");
        }
    }
}

#[test]
fn half_precision_operands_are_converted_exactly() {
    let case = Case { window: 4, ..Case::grid(1, 7, 9, 2, 24) };
    let tensor = case.tensor();
    let isa = Isa::best();
    let options = AttentionOptions { scale: case.scale, isa, threads: 1 };
    macro_rules! check {
        ($float:ident, $floats:path, $floats_mut:path) => {
            let rounded: Vec<$float> = tensor.iter().map(|x| $float::from_f32(*x)).collect();
            let widened: Vec<f32> = rounded.iter().map(|x| x.to_f32()).collect();
            let expected = case.with(Floats::F32(&widened), |operands| computed(operands, options));
            let mut out = vec![$float::NAN; expected.len()];
            case.with($floats(&rounded), |operands| {
                attention(operands, $floats_mut(&mut out), &options).unwrap();
            });
            for (out, expected) in out.iter().zip(expected) {
                assert_eq!(out.to_bits(), $float::from_f32(expected).to_bits());
            }
        };
    }
    check!(f16, Floats::F16, FloatsMut::F16);
    check!(bf16, Floats::BF16, FloatsMut::BF16);
}

#[test]
fn large_scores_do_not_overflow() {
    // Scores up to some thousands: nearly all of the weight falls on one key.
    check(&Case { scale: 40.0, relative: false, ..Case::grid(1, 8, 16, 1, 64) });
}

#[test]
fn queries_that_are_not_finite_touch_no_other() {
    let case = Case { relative: false, ..Case::grid(1, 5, 20, 2, 16) };
    let clean = case.tensor();
    let (query, head) = (33, 1);
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut tensor = clean.clone();
        tensor[query * 3 * 32 + head * 16 + 5] = value;
        for isa in Isa::available() {
            let options = AttentionOptions { scale: case.scale, isa, threads: 1 };
            let expected = case.with(Floats::F32(&clean), |operands| computed(operands, options));
            let out = case.with(Floats::F32(&tensor), |operands| computed(operands, options));
            for (index, (out, expected)) in out.iter().zip(expected).enumerate() {
                if index / 16 == query * 2 + head {
                    assert!(out.is_nan(), "{isa}: {value} at {index}");
                } else {
                    assert_eq!(*out, expected, "{isa}: {value} at {index}");
                }
            }
        }
    }
}

#[test]
fn keys_and_values_that_are_not_finite_reach_every_query_of_their_head() {
    let case = Case { relative: false, ..Case::grid(1, 5, 20, 2, 16) };
    for part in [1, 2] {
        for key in [0, 70, 99] {
            let mut tensor = case.tensor();
            tensor[(key * 3 + part) * 32 + 16 + 5] = f32::NAN;
            for isa in Isa::available() {
                let options = AttentionOptions { scale: case.scale, isa, threads: 1 };
                let out = case.with(Floats::F32(&tensor), |operands| computed(operands, options));
                for (index, out) in out.iter().enumerate() {
                    let (head, channel) = (index / 16 % 2, index % 16);
                    let touched = head == 1 && (part == 1 || channel == 5);
                    assert_eq!(out.is_nan(), touched, "{isa}: part {part}, {key}, at {index}");
                }
            }
        }
    }
}

#[test]
fn a_score_of_minus_infinity_has_no_weight() {
    let shape = Shape { batch: 1, height: 1, width: 70, heads: 1, head_dim: 1 };
    let queries = vec![1.0; 70];
    let mut keys = vec![f32::NEG_INFINITY; 70];
    let mut values = vec![5.0; 70];
    (keys[67], values[67]) = (-3.0, 2.0);
    let heads = |all| Heads::new(Floats::F32(all), shape, [70, 70, 1, 1]).unwrap();
    let operands = Operands {
        queries: heads(&queries),
        keys: heads(&keys),
        values: heads(&values),
        relative_position: None,
        window: None,
    };
    for isa in Isa::available() {
        let out = computed(&operands, AttentionOptions { scale: 1.0, isa, threads: 1 });
        assert_eq!(out, vec![2.0; 70], "{isa}");
    }
}

#[test]
fn operands_that_do_not_fit_are_refused() {
    let case = Case { window: 4, ..Case::grid(1, 7, 9, 2, 24) };
    let tensor = case.tensor();
    let options = AttentionOptions { scale: 1.0, isa: Isa::Portable, threads: 1 };
    let len = 7 * 9 * 48;
    let narrow = Shape { width: 8, ..case.shape };
    let other = Heads::new(Floats::F32(&tensor), narrow, [7 * 8 * 48, 8 * 48, 48, 24]).unwrap();
    case.with(Floats::F32(&tensor), |&operands| {
        let refused = |operands: Operands<'_>, len: usize, words: &str| {
            let mut out = vec![0.0; len];
            let refusal = attention(&operands, FloatsMut::F32(&mut out), &options).unwrap_err();
            assert!(refusal.to_string().contains(words), "{refusal}");
        };
        let window = operands.window.unwrap();
        let with_window = |window| Operands { window: Some(window), ..operands };
        refused(operands, len - 1, "an output of 3023 elements");
        refused(Operands { keys: other, ..operands }, len, "the same shape");
        refused(Operands { keys: other, values: other, ..operands }, len, "on one grid");
        refused(Operands { window: None, ..operands }, len, "for the height has 168 elements");
        refused(with_window(Window { size: 0, ..window }), len, "a window cannot have 0 rows");
        refused(
            with_window(Window { padding_key: &[0.0], ..window }),
            len,
            "a padding key of 1 elements must have 48",
        );
    });
    let shape = case.shape;
    assert!(Heads::new(Floats::F32(&tensor), shape, [0, 9 * 500, 500, 24]).is_err());
    assert!(Heads::new(Floats::F32(&tensor), shape, [0, usize::MAX, 1, 1]).is_err());
    let huge = Shape { batch: usize::MAX, ..shape };
    assert!(Heads::new(Floats::F32(&tensor), huge, [0, 1, 1, 1]).is_err());
}

#[test]
fn no_queries_are_no_work() {
    let shape = Shape { batch: 0, height: 4, width: 4, heads: 2, head_dim: 8 };
    let heads = Heads::new(Floats::F32(&[]), shape, [0; 4]).unwrap();
    let operands = Operands {
        queries: heads,
        keys: heads,
        values: heads,
        relative_position: None,
        window: None,
    };
    let options = AttentionOptions { scale: 1.0, isa: Isa::Portable, threads: 1 };
    attention(&operands, FloatsMut::F32(&mut []), &options).unwrap();
}
