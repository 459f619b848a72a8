//! The shift map, `theta' = 2^k theta + u (mod 2^L)` with `L = k + 8`.
//!
//! Each weight brings `k` fresh bits `u`, and its place on the curve is the top 8 bits of
//! `theta * g mod 2^L`. A stream of `n` weights is thus one number of `k n` bits, the starting point
//! of an orbit; and since the stream is closed (what precedes the first weight is the last one), the
//! orbit is periodic and needs no other state.
//!
//! (Source coding knows this as trellis-coded quantisation with a bit-shift trellis and a tail-biting
//! path: Marcellin and Fischer, 1990; QTIP, NeurIPS 2024.)
//!
//! To encode is to find the orbit that passes nearest the weights: a shortest path through 256
//! classes of states. [`viterbi`] is that search as the textbook has it; [`search`] is the fast one,
//! whose [`step`] is written once over the vectors of [`lanes`].

mod lanes;
pub mod search;
mod step;
mod trellis;
pub mod viterbi;

use super::Tap;

/// The generators g for k = 2, 3, 4, 5, 6: the best of some hundred by the error on Gaussian weights.
pub const GENERATORS: [u16; 5] = [263, 247, 249, 1789, 4863];

/// The generator at `bits` a weight.
pub const fn generator(bits: u32) -> u16 {
    GENERATORS[bits as usize - 2]
}

/// How weight `index` of a block of a stream is read.
pub(super) const fn tap(bits: u32, index: u32) -> Tap {
    Tap { end: (index + 1) * bits, multiplier: generator(bits) << (8 - bits) }
}
