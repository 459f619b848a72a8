//! Theta to int8: a strip of 16 rows, block by block.

use crate::codec::Trajectory;
use crate::codec::curve::CURVE;
use crate::isa::Isa;
use crate::layout::{self, DECODED_BLOCK, STREAM, STRIP};

/// Decodes consecutive blocks of a strip, from block `first` on, as many as `out` holds.
///
/// `strip` is all code bytes of the strip (the windows of block 0 reach back to the last block);
/// `out` takes 512 int8 values a block, in the order of [`crate::layout`].
///
/// # Panics
/// If `out` is no whole number of blocks, or the strip does not hold those blocks.
pub fn blocks(isa: Isa, trajectory: Trajectory, strip: &[u8], first: usize, out: &mut [i8]) {
    let block_len = trajectory.bits() as usize * (DECODED_BLOCK / 8);
    assert_eq!(out.len() % DECODED_BLOCK, 0, "out holds no whole number of blocks");
    assert!(
        strip.len() % block_len == 0
            && (first + out.len() / DECODED_BLOCK) * block_len <= strip.len()
    );
    let _ = isa;
    plain(trajectory, strip, first, out);
}

/// The definition, one weight at a time; every other path must give the same bytes.
fn plain(trajectory: Trajectory, strip: &[u8], first: usize, out: &mut [i8]) {
    let bits = trajectory.bits() as usize;
    let block_len = bits * (DECODED_BLOCK / 8);
    let blocks = strip.len() / block_len;
    for (index, out) in out.chunks_exact_mut(DECODED_BLOCK).enumerate() {
        let block = first + index;
        let codes = &strip[block * block_len..][..block_len];
        if trajectory == Trajectory::Int8 {
            for (out, &code) in out.iter_mut().zip(codes) {
                *out = code as i8;
            }
            continue;
        }
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
                for weight in 0..STREAM {
                    let tap = trajectory.tap(weight as u32).expect("int8 was handled above");
                    let window = (number >> (16 * bits as u32 - tap.end)) as u16;
                    let place = window.wrapping_mul(tap.multiplier) >> 8;
                    out[layout::decoded_index(row, stream * STREAM + weight)] =
                        CURVE[usize::from(place)];
                }
            }
        }
    }
}
