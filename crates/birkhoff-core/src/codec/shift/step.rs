//! A step of the search in vectors: the cost of each place near a weight, and the best way to each class.

use super::lanes::Lanes;
use super::search::{Decisions, LARGEST_COST, Metrics, SLOPE, SQUARED_UP_TO, WIDEST, candidates};
use super::trellis::{CLASSES, Trellis};

/// The costs of the places of a window, each with its candidate's number in the low bits.
struct Costs<V, const BITS: u32>([V; WIDEST / 16]);

impl<V: Lanes, const BITS: u32> Costs<V, BITS> {
    const PLACES: usize = Trellis::<BITS>::PLACES;
    /// Vectors in a window.
    const COUNT: usize = candidates(BITS) * Self::PLACES / V::N;
    /// Halvings that bring the candidates of a vector together, where it holds several.
    const FOLDS: u32 = if Self::PLACES < V::N { (V::N / Self::PLACES).ilog2() } else { 0 };
    /// Number of its candidate, for each place of the window.
    const NUMBERS: [u16; WIDEST] = {
        let mut numbers = [0; WIDEST];
        let mut place = 0;
        while place < candidates(BITS) * Self::PLACES {
            numbers[place] = (place / Self::PLACES) as u16;
            place += 1;
        }
        numbers
    };

    /// # Safety
    /// The CPU has the instruction set of `V`.
    #[inline(always)]
    unsafe fn new(target: i16, window: &[i16; WIDEST]) -> Self {
        const { assert!(Self::COUNT >= 1 && Self::COUNT * V::N <= WIDEST && Self::FOLDS <= 2) };
        // SAFETY: the caller vouches for the instruction set; loads lie within the two arrays.
        unsafe {
            let target = V::splat(target as u16);
            let mut costs = [target; WIDEST / 16];
            for (i, cost) in costs[..Self::COUNT].iter_mut().enumerate() {
                let error = target.signed_distance(V::load(window.as_ptr().add(i * V::N).cast()));
                let near = error.min(V::splat(SQUARED_UP_TO));
                let beyond = error.saturating_sub(V::splat(SQUARED_UP_TO)).shl::<SLOPE>();
                let most_beyond = V::splat(LARGEST_COST - SQUARED_UP_TO * SQUARED_UP_TO);
                let sum = near.mul(near).add(beyond.min(most_beyond));
                let sum = if candidates(BITS) == 2 { sum.shl::<1>() } else { sum.shl::<2>() };
                *cost = sum.or(V::load(Self::NUMBERS.as_ptr().add(i * V::N)));
            }
            Costs(costs)
        }
    }

    /// The best candidates of a residue, for places `part * N` to `part * N + N` of a candidate; or,
    /// where a vector holds several candidates, the best of those in the same lane.
    ///
    /// # Safety
    /// The CPU has the instruction set of `V`; `residue < 2^BITS` and `part * N < max(PLACES, N)`.
    #[inline(always)]
    unsafe fn winner(&self, metrics: &Metrics, rotation: u8, residue: usize, part: usize) -> V {
        let parts = (Self::PLACES / V::N).max(1);
        let from = usize::from(rotation.wrapping_sub(Trellis::<BITS>::OFFSET[residue]));
        // SAFETY: the caller vouches for the instruction set; `from < 256`, and the loads reach at
        // most a window, `COUNT * N <= WIDEST`, further.
        unsafe {
            let path = |i: usize| {
                V::load(metrics.0.as_ptr().add(from + i * V::N)).saturating_add(self.0[i])
            };
            let mut best = path(part);
            for candidate in 1..Self::COUNT / parts {
                best = best.min(path(candidate * parts + part));
            }
            best
        }
    }

    /// The best of all candidates of the residues `i + j * (2^BITS >> FOLDS)`, by place and then `j`.
    ///
    /// # Safety
    /// As [`Self::winner`], and `i < 2^BITS >> FOLDS`.
    #[inline(always)]
    unsafe fn folded(&self, metrics: &Metrics, rotation: u8, i: usize) -> V {
        let residues = Trellis::<BITS>::RESIDUES;
        // SAFETY: the caller vouches for what `winner` and the lanes ask.
        unsafe {
            // A pair's first half of lanes holds the one half of the candidates, the second the other.
            let fold = |a: V, b: V| {
                let (first, second) = a.interleave(b);
                first.min(second)
            };
            let winner = |residue| self.winner(metrics, rotation, residue, 0);
            match Self::FOLDS {
                1 => fold(winner(i), winner(i + residues / 2)),
                _ => fold(
                    fold(winner(i), winner(i + residues / 2)),
                    fold(winner(i + residues / 4), winner(i + residues * 3 / 4)),
                ),
            }
        }
    }
}

/// One step of one stream.
///
/// `rotation` is the first place of the window less the class of the first metric.
///
/// # Safety
/// The CPU has the instruction set of `V`; `VECTORS * V::N` is 256.
#[inline(always)]
pub(super) unsafe fn step<V: Lanes, const BITS: u32, const VECTORS: usize>(
    metrics: &mut Metrics,
    rotation: u8,
    target: i16,
    window: &[i16; WIDEST],
    decisions: &mut Decisions,
    renormalise: bool,
) {
    let width = candidates(BITS) * Trellis::<BITS>::PLACES;
    let decision_bits = candidates(BITS).ilog2();
    // SAFETY: the caller vouches for the instruction set and for VECTORS, so residues and parts are
    // in range. Stores fill the 256 metrics and repeat at most WIDEST of them; decisions are
    // VECTORS * decision_bits / 16 vectors, rounded up: at most DECISION_WORDS words.
    unsafe {
        let costs = Costs::<V, BITS>::new(target, window);
        // The winners, by residue and then place.
        let mut winners = [V::splat(0); VECTORS];
        for (i, winner) in winners.iter_mut().enumerate() {
            *winner = if Costs::<V, BITS>::FOLDS == 0 {
                let parts = Trellis::<BITS>::PLACES / V::N;
                costs.winner(metrics, rotation, i / parts, i % parts)
            } else {
                costs.folded(metrics, rotation, i)
            };
        }
        // By place and then residue: the order of the next classes.
        for _ in Costs::<V, BITS>::FOLDS..BITS {
            let before = winners;
            for i in 0..VECTORS / 2 {
                let (a, b) = before[i].interleave(before[i + VECTORS / 2]);
                (winners[2 * i], winners[2 * i + 1]) = (a, b);
            }
        }
        let decision = V::splat((1 << decision_bits) - 1);
        let per_word = 16 / decision_bits as usize;
        for (i, group) in winners.chunks(per_word).enumerate() {
            let mut word = V::splat(0);
            for &winner in group.iter().rev() {
                let number = winner.and(decision);
                word =
                    if decision_bits == 1 { word.shl::<1>() } else { word.shl::<2>() }.or(number);
            }
            word.store(decisions.0.as_mut_ptr().add(i * V::N));
        }
        let metric = V::splat(!((1 << decision_bits) - 1));
        for winner in &mut winners {
            *winner = winner.and(metric);
        }
        if renormalise {
            let mut least = winners[0];
            for &winner in &winners[1..] {
                least = least.min(winner);
            }
            let least = V::splat(least.reduce_min());
            for winner in &mut winners {
                *winner = winner.sub(least);
            }
        }
        let to = metrics.0.as_mut_ptr();
        for (i, winner) in winners.iter().enumerate() {
            winner.store(to.add(i * V::N));
            if i * V::N < width {
                winner.store(to.add(CLASSES + i * V::N));
            }
        }
    }
}
