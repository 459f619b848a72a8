//! The definition of decoding, one weight at a time; every other path must give the same bytes.

use crate::codec::Trajectory;
use crate::codec::curve::CURVE;
use crate::layout::{self, DECODED_BLOCK, STREAM, STRIP};

/// Decodes blocks `first..` of a strip; see [`super::blocks`].
pub(super) fn blocks(trajectory: Trajectory, strip: &[u8], first: usize, out: &mut [i8]) {
    let bits = trajectory.bits() as usize;
    let block_len = bits * (DECODED_BLOCK / 8);
    let blocks = strip.len() / block_len;
    // Where the window of each weight ends, counted from the last bit of the block, and what it is
    // multiplied by.
    let mut taps = [(0, 0); STREAM];
    for (weight, taps) in taps.iter_mut().enumerate() {
        let Some(tap) = trajectory.tap(weight as u32) else {
            let codes = &strip[first * block_len..][..out.len()];
            for (out, &code) in out.iter_mut().zip(codes) {
                *out = code as i8;
            }
            return;
        };
        *taps = (16 * bits as u32 - tap.end, tap.multiplier);
    }
    for (index, out) in out.chunks_exact_mut(DECODED_BLOCK).enumerate() {
        let block = first + index;
        let codes = &strip[block * block_len..][..block_len];
        let before = (block + blocks - 1) % blocks;
        let codes_before = &strip[before * block_len..][..block_len];
        for row in 0..STRIP {
            for stream in 0..2 {
                let word = |codes: &[u8], word| {
                    let at = layout::word_offset(word, row, stream);
                    u128::from(u16::from_le_bytes([codes[at], codes[at + 1]]))
                };
                // The last word before the block, then the block's words: one number.
                let mut number = word(codes_before, bits - 1);
                for i in 0..bits {
                    number = number << 16 | word(codes, i);
                }
                for (weight, (end, multiplier)) in taps.into_iter().enumerate() {
                    let window = (number >> end) as u16;
                    let place = window.wrapping_mul(multiplier) >> 8;
                    out[layout::decoded_index(row, stream * STREAM + weight)] =
                        CURVE[usize::from(place)];
                }
            }
        }
    }
}
