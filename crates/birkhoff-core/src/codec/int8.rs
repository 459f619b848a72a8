//! Eight bits a weight: the code is the int8 value itself, under the same scales.

use crate::layout::{self, BLOCK, DECODED_BLOCK, STREAM};

/// A weight in units of the curve, rounded.
#[inline(always)]
pub(super) fn nearest(target: f32) -> i8 {
    target.round_ties_even().clamp(-127.0, 127.0) as i8
}

/// Rounds the two streams of a row, in units of the curve, and writes them to its code bytes.
#[inline(always)]
pub(super) fn encode_row(targets: [&[f32]; 2], row: usize, codes: &mut [u8]) {
    for (block, codes) in codes.chunks_exact_mut(DECODED_BLOCK).enumerate() {
        for col in 0..BLOCK {
            let target = targets[col / STREAM][block * STREAM + col % STREAM];
            codes[layout::decoded_index(row, col)] = nearest(target) as u8;
        }
    }
}
