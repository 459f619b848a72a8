//! Theta to int8: a strip of 16 rows, block by block.
//!
//! `plain` is the definition; `generic` is the same over vectors, for `avx2` and `avx512`.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "x86_64")]
pub(crate) mod generic;
mod plain;

use crate::codec::Trajectory;
use crate::isa::Isa;
use crate::layout::DECODED_BLOCK;

/// Decodes consecutive blocks of a strip, from block `first` on, as many as `out` holds.
///
/// `strip` is all code bytes of the strip (the windows of block 0 reach back to the last block);
/// `out` takes 512 int8 values a block, in the order of [`crate::layout`].
///
/// # Panics
/// If `out` is no whole number of blocks, the strip does not hold those blocks, or the CPU lacks
/// `isa`.
pub fn blocks(isa: Isa, trajectory: Trajectory, strip: &[u8], first: usize, out: &mut [i8]) {
    check_lengths(trajectory, strip, first, out.len());
    assert!(isa.is_available(), "this CPU has no {isa}");
    match isa {
        Isa::Portable => plain::blocks(trajectory, strip, first, out),
        // SAFETY: the CPU has the instruction set and the lengths fit, as checked above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 | Isa::AvxVnni => unsafe { avx2::blocks(trajectory, strip, first, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { avx512::blocks(trajectory, 0, strip, first, out) },
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Avx2 | Isa::AvxVnni | Isa::Avx512 => unreachable!("not available"),
    }
}

/// Panics unless the strip is whole blocks and holds `len / 512` of them from `first` on.
fn check_lengths(trajectory: Trajectory, strip: &[u8], first: usize, len: usize) {
    let block_len = trajectory.bits() as usize * (DECODED_BLOCK / 8);
    assert_eq!(len % DECODED_BLOCK, 0, "out holds no whole number of blocks");
    assert_eq!(strip.len() % block_len, 0, "the strip is no whole number of blocks");
    let blocks = strip.len() / block_len;
    assert!(first <= blocks && len / DECODED_BLOCK <= blocks - first, "the strip is too short");
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::codec::Codec;

    fn trajectories() -> impl Iterator<Item = Trajectory> {
        Codec::ALL.into_iter().flat_map(|codec| {
            codec.rates().iter().map(move |&bits| codec.trajectory(bits).unwrap())
        })
    }

    proptest! {
        #[test]
        fn every_isa_decodes_as_plain(
            codes in proptest::collection::vec(any::<u8>(), 6 * 512),
            blocks in 1usize..=6,
            first in 0usize..6,
            len in 0usize..=6,
        ) {
            let first = first.min(blocks);
            let len = len.min(blocks - first);
            for trajectory in trajectories() {
                let strip = &codes[..blocks * trajectory.bits() as usize * 64];
                let mut expected = vec![0; len * DECODED_BLOCK];
                plain::blocks(trajectory, strip, first, &mut expected);
                for isa in Isa::available() {
                    let mut decoded = vec![55; expected.len()];
                    super::blocks(isa, trajectory, strip, first, &mut decoded);
                    prop_assert!(decoded == expected, "{isa} {trajectory:?}");
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "too short")]
    fn blocks_past_the_end_are_refused() {
        blocks(Isa::best(), Trajectory::Shift(4), &[0; 512], 1, &mut [0; 2 * DECODED_BLOCK]);
    }
}
