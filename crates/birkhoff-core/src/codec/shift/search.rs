//! The fast search: integer path metrics, and only the places on the curve near each weight.
//!
//! [`super::trellis`] says why states are ordered by `phi = 2^k m + c`. A step of the search takes the
//! 256 class metrics to the next 256. For each residue `c` it considers a window of consecutive places
//! `m` round the weight: `CANDIDATES` for each class that they lead to, of which the cheaper wins. Two
//! candidates come within 0.02 dB of all `2^k` up to 4 bits, four of them within 0.01 dB above.
//!
//! Metrics are u16 with saturating sums. Their low bits hold which candidate won, so that one `min`
//! carries both; it also settles ties the same way in every vector width. The two streams of a row
//! are searched in step, since one alone leaves the CPU waiting for its own stores.
//!
//! The path is closed (tail-biting): a short open search round the seam fixes the class there, then
//! the search proper starts and ends in it.

use super::generator;
use super::lanes::{Lanes, portable::Portable};
use super::step::step;
use super::trellis::{CLASSES, Trellis};
use crate::codec::curve::CURVE;
use crate::isa::Isa;

/// Weights on either side of the seam that decide the class there.
const SEAM: usize = 32;
/// Steps between subtractions of the least metric.
const RENORMALISE: usize = 4;
/// Metric of the classes that a path may not start in, before the shift by `DECISION_BITS`.
const FORBIDDEN: u16 = 12_000;
/// Largest error that counts squared; beyond, cost grows by `SLOPE` a step up to `LARGEST_COST`.
pub(super) const SQUARED_UP_TO: u16 = 100;
pub(super) const SLOPE: u32 = 3;
pub(super) const LARGEST_COST: u16 = (1 << 14) - 1;
/// Largest weight, in units of the curve, that is told from larger ones.
const LARGEST_TARGET: i16 = 160;
/// Places in the widest window (2 bits).
pub(super) const WIDEST: usize = 128;
/// Bytes of decisions of a step: 256 of at most 2 bits.
const DECISION_WORDS: usize = 32;

/// Candidates for each class: of `2^BITS` places that lead to it, the nearest ones.
pub(super) const fn candidates(bits: u32) -> usize {
    if bits <= 4 { 2 } else { 4 }
}

/// Fixed-point steps a unit of the curve: errors of the rate's usual size become some 6 to 10.
const fn steps_per_unit(bits: u32) -> i16 {
    [1, 1, 2, 4, 8][bits as usize - 2]
}

/// Steps from a given theta in which every path is tried.
const fn begun(bits: u32) -> usize {
    [3, 2, 2, 1, 1][bits as usize - 2]
}

/// What an error in fixed-point steps costs.
fn error_cost(error: u16) -> u32 {
    let near = u32::from(error.min(SQUARED_UP_TO));
    let beyond = u32::from(error.saturating_sub(SQUARED_UP_TO)) << SLOPE;
    (near * near + beyond).min(u32::from(LARGEST_COST))
}

/// What depends on the rate alone.
struct Tables {
    /// The curve in fixed point, padded so that a window can be loaded from any place.
    curve: [i16; CLASSES + WIDEST],
    /// First place of the window, for each target from the smallest to the largest.
    first: [u8; 2 * LARGEST_TARGET as usize * 8 + 1],
}

static TABLES: [Tables; 5] =
    [Tables::new(2), Tables::new(3), Tables::new(4), Tables::new(5), Tables::new(6)];

impl Tables {
    const fn new(bits: u32) -> Tables {
        let steps = steps_per_unit(bits);
        let window = candidates(bits) * (CLASSES >> bits);
        let mut tables = Tables {
            curve: [i16::MAX; CLASSES + WIDEST],
            first: [0; 2 * LARGEST_TARGET as usize * 8 + 1],
        };
        let mut place = 0;
        while place < CLASSES {
            tables.curve[place] = CURVE.0[place] as i16 * steps;
            place += 1;
        }
        let (mut above, mut i) = (0, 0);
        while i <= 2 * LARGEST_TARGET as usize * steps as usize {
            let target = i as i16 - LARGEST_TARGET * steps;
            while above < CLASSES && tables.curve[above] < target {
                above += 1;
            }
            let first = above.saturating_sub(window / 2);
            let last = CLASSES - window;
            tables.first[i] = if first < last { first } else { last } as u8;
            i += 1;
        }
        tables
    }
}

/// Metrics of the classes, in the order of the window of the step that made them; the first `WIDEST`
/// repeat at the end, so that a rotation is a load.
#[repr(C, align(64))]
pub(super) struct Metrics(pub(super) [u16; CLASSES + WIDEST]);

#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Decisions(pub(super) [u16; DECISION_WORDS]);

/// The search of one stream: its steps so far.
struct Stream {
    metrics: Metrics,
    /// Class of the first metric.
    rotation: u8,
    /// First place of the window, each step.
    first: Vec<u8>,
    decisions: Vec<Decisions>,
}

impl Stream {
    fn new() -> Stream {
        Stream {
            metrics: Metrics([0; CLASSES + WIDEST]),
            rotation: 0,
            first: Vec::new(),
            decisions: Vec::new(),
        }
    }

    /// Prepares for a search of so many steps, from a class or from any.
    fn start(&mut self, start: Option<u8>, bits: u32, steps: usize) {
        let others = if start.is_some() { FORBIDDEN << candidates(bits).ilog2() } else { 0 };
        self.metrics.0.fill(others);
        if let Some(class) = start {
            self.metrics.0[usize::from(class)] = 0;
            if let Some(repeated) = self.metrics.0.get_mut(CLASSES + usize::from(class)) {
                *repeated = 0;
            }
        }
        self.rotation = 0;
        self.first.resize(steps, 0);
        self.decisions.resize(steps, Decisions([0; DECISION_WORDS]));
    }

    /// Takes the first steps from theta by trying every path, where few classes are reached and the
    /// windows would leave next to nothing; then prepares for so many `steps`.
    ///
    /// Returns the fresh bits of the best path to each class, as one number.
    fn begin(&mut self, theta: u8, bits: u32, targets: &[i16], steps: usize) -> [u16; CLASSES] {
        self.start(None, bits, steps);
        let places = 1u32 << (bits + 8);
        let curve = &TABLES[bits as usize - 2].curve;
        let g = u32::from(generator(bits));
        let mut paths = [0; CLASSES];
        let mut costs = [u32::MAX; CLASSES];
        for path in 0..1u32 << (bits * targets.len() as u32) {
            let mut state = u32::from(theta);
            let mut cost = 0;
            for (i, &target) in targets.iter().enumerate() {
                let fresh = path >> (bits * (targets.len() - 1 - i) as u32) & ((1 << bits) - 1);
                state = (state << bits | fresh) & (places - 1);
                let place = ((state * g) & (places - 1)) >> bits;
                cost += error_cost(target.abs_diff(curve[place as usize]));
            }
            let class = ((state * g) & 255) as usize;
            if cost < costs[class] {
                (costs[class], paths[class]) = (cost, path as u16);
            }
        }
        let least = costs.iter().copied().min().expect("there are classes");
        for (class, cost) in costs.into_iter().enumerate() {
            let metric = (cost.saturating_sub(least)).min(u32::from(FORBIDDEN)) as u16;
            let metric = metric << candidates(bits).ilog2();
            self.metrics.0[class] = metric;
            if let Some(repeated) = self.metrics.0.get_mut(CLASSES + class) {
                *repeated = metric;
            }
        }
        paths
    }

    /// The class of least metric.
    fn best_class(&self) -> u8 {
        let metrics = &self.metrics.0[..CLASSES];
        let best = (0..CLASSES).min_by_key(|&i| metrics[i]).expect("there are classes");
        (best as u8).wrapping_add(self.rotation)
    }
}

/// Finds closed orbits near weights; keeps its memory from call to call.
pub struct Search {
    streams: [Stream; 2],
}

impl Default for Search {
    fn default() -> Self {
        Search { streams: [Stream::new(), Stream::new()] }
    }
}

impl Search {
    /// The fresh bits of each weight along closed orbits near the two streams of a row.
    ///
    /// `targets` are weights as [`fixed_point`] gives them, both of the same length.
    ///
    /// # Panics
    /// If the lengths differ, or `isa` is not available.
    pub fn closed_orbits(
        &mut self,
        isa: Isa,
        bits: u32,
        targets: [&[i16]; 2],
        fresh: [&mut [u8]; 2],
    ) {
        assert!(isa.is_available(), "this CPU has no {isa}");
        let steps = targets[0].len();
        assert!([targets[1].len(), fresh[0].len(), fresh[1].len()] == [steps; 3]);
        let classes = self.seam_classes(isa, bits, targets);
        let kernel = Kernel::select(isa, bits);
        for (stream, class) in self.streams.iter_mut().zip(classes) {
            stream.start(Some(class), bits, steps);
        }
        // SAFETY: `isa` is available, so the CPU has what `kernel` needs.
        unsafe { (kernel.forward)(&mut self.streams, targets) };
        (kernel.trace)(&self.streams, classes, fresh);
    }

    /// The low 8 bits of theta before the first weight of good closed orbits near two streams.
    ///
    /// # Panics
    /// As [`Self::closed_orbits`].
    pub fn seam(&mut self, isa: Isa, bits: u32, targets: [&[i16]; 2]) -> [u8; 2] {
        assert!(isa.is_available(), "this CPU has no {isa}");
        assert!(targets[0].len() == targets[1].len());
        let inverse = inverse_generator(bits);
        self.seam_classes(isa, bits, targets).map(|class| class.wrapping_mul(inverse))
    }

    /// The fresh bits of the next weights of two streams, each going on from theta: as many as there
    /// are targets.
    ///
    /// `thetas` and `ends` are the low 8 bits of theta before the first target and after the last one;
    /// without `ends`, any will do. With fewer than 16 targets, a good path to the end may not be
    /// found.
    ///
    /// # Panics
    /// If the lengths differ or are not from 4 to 32, or `isa` is not available.
    pub fn continue_orbits(
        &mut self,
        isa: Isa,
        bits: u32,
        targets: [&[i16]; 2],
        thetas: [u8; 2],
        ends: Option<[u8; 2]>,
    ) -> [[u8; SEAM]; 2] {
        assert!(isa.is_available(), "this CPU has no {isa}");
        let steps = targets[0].len();
        assert!(targets[1].len() == steps && (4..=SEAM).contains(&steps));
        let kernel = Kernel::select(isa, bits);
        let class = |theta: u8| theta.wrapping_mul(generator(bits) as u8);
        let begun = begun(bits);
        let mut paths = [[0; CLASSES]; 2];
        for i in 0..2 {
            paths[i] = self.streams[i].begin(thetas[i], bits, &targets[i][..begun], steps - begun);
        }
        let rest = targets.map(|targets| &targets[begun..]);
        // SAFETY: `isa` is available, so the CPU has what `kernel` needs.
        unsafe { (kernel.forward)(&mut self.streams, rest) };
        let ends = match ends {
            Some(thetas) => thetas.map(class),
            None => [self.streams[0].best_class(), self.streams[1].best_class()],
        };
        let mut fresh = [[0; SEAM]; 2];
        let after = fresh.each_mut().map(|fresh| &mut fresh[begun..steps]);
        let classes = (kernel.trace)(&self.streams, ends, after);
        for ((fresh, class), paths) in fresh.iter_mut().zip(classes).zip(&paths) {
            let path = paths[usize::from(class)];
            for (i, fresh) in fresh[..begun].iter_mut().enumerate() {
                *fresh = (path >> (bits as usize * (begun - 1 - i))) as u8 & ((1u8 << bits) - 1);
            }
        }
        fresh
    }

    /// The classes before the first weight of good closed orbits near two streams.
    fn seam_classes(&mut self, isa: Isa, bits: u32, targets: [&[i16]; 2]) -> [u8; 2] {
        let kernel = Kernel::select(isa, bits);
        let steps = targets[0].len();
        // Round the seam: the last weights, then the first ones, with open ends.
        let side = SEAM.min(steps);
        let mut seam = [[0; 2 * SEAM]; 2];
        for ((stream, seam), targets) in self.streams.iter_mut().zip(&mut seam).zip(targets) {
            seam[..side].copy_from_slice(&targets[steps - side..]);
            seam[side..2 * side].copy_from_slice(&targets[..side]);
            stream.start(None, bits, 2 * side);
        }
        // SAFETY: the callers assert that `isa` is available, so the CPU has what `kernel` needs.
        unsafe {
            (kernel.forward)(&mut self.streams, [&seam[0][..2 * side], &seam[1][..2 * side]])
        };
        let ends = [self.streams[0].best_class(), self.streams[1].best_class()];
        let [after_0, after_1] = &mut [[0; SEAM]; 2];
        (kernel.trace)(&self.streams, ends, [&mut after_0[..side], &mut after_1[..side]])
    }
}

/// `1 / g mod 256`.
fn inverse_generator(bits: u32) -> u8 {
    let g = generator(bits) as u8;
    // Newton's iteration doubles the bits that are right, of which an odd number has three.
    (0..2).fold(g, |inverse, _| inverse.wrapping_mul(2u8.wrapping_sub(g.wrapping_mul(inverse))))
}

/// Weights, in units of the curve, as the fixed-point numbers that the search works on.
#[inline(always)]
pub fn fixed_points(bits: u32, weights: &[f32], fixed: &mut [i16]) {
    for (fixed, &weight) in fixed.iter_mut().zip(weights) {
        *fixed = fixed_point(bits, weight);
    }
}

#[inline(always)]
fn fixed_point(bits: u32, weight: f32) -> i16 {
    let largest = f32::from(LARGEST_TARGET);
    let scaled = weight.clamp(-largest, largest) * f32::from(steps_per_unit(bits));
    // Adding 1.5 * 2^23 rounds to a whole number, which then stands in the low bits.
    (scaled + 12_582_912.0).to_bits() as i16
}

/// The search for an instruction set and a rate.
#[derive(Clone, Copy)]
struct Kernel {
    forward: unsafe fn(&mut [Stream; 2], [&[i16]; 2]),
    trace: Trace,
}

type Trace = fn(&[Stream; 2], [u8; 2], [&mut [u8]; 2]) -> [u8; 2];

impl Kernel {
    fn select(isa: Isa, bits: u32) -> Kernel {
        macro_rules! kernel {
            ($forward:ident, $lanes:literal, $($rate:literal)*) => {
                match bits {
                    $($rate => Kernel { forward: $forward::<$rate>, trace: trace::<$rate, $lanes> },)*
                    _ => panic!("the shift map has no {bits}-bit rate"),
                }
            };
        }
        match isa {
            // At 6 bits a window has only 16 places: narrower vectors fit it.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 if bits == 6 => kernel!(avx512vl, 16, 6),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => kernel!(avx512, 32, 2 3 4 5),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 | Isa::AvxVnni => kernel!(avx2, 16, 2 3 4 5 6),
            _ => kernel!(portable, 16, 2 3 4 5 6),
        }
    }
}

/// Follows the decisions back from a class of each stream after its last step; writes the fresh bits
/// of the last steps, as many as `fresh` holds, and returns the classes before them.
///
/// `LANES` is the width of the vectors that wrote the decisions.
fn trace<const BITS: u32, const LANES: usize>(
    streams: &[Stream; 2],
    mut classes: [u8; 2],
    fresh: [&mut [u8]; 2],
) -> [u8; 2] {
    let decision_bits = const { candidates(BITS).ilog2() as usize };
    let per_word = 16 / decision_bits;
    let count = fresh[0].len();
    let steps = streams[0].first.len();
    // Each step waits for the one before, so the streams take turns.
    for step in (0..count).rev() {
        for i in 0..2 {
            let first = streams[i].first[steps - count + step];
            // Where the class stands in the order of this step's window.
            let index = usize::from(classes[i].wrapping_sub(first << BITS));
            let (vector, lane) = (index / LANES, index % LANES);
            let word =
                streams[i].decisions[steps - count + step].0[vector / per_word * LANES + lane];
            let candidate =
                usize::from(word) >> (vector % per_word * decision_bits) & (candidates(BITS) - 1);
            let residue = index & (Trellis::<BITS>::RESIDUES - 1);
            fresh[i][step] = Trellis::<BITS>::FRESH[residue];
            let place = candidate * Trellis::<BITS>::PLACES + (index >> BITS);
            classes[i] =
                first.wrapping_add(place as u8).wrapping_sub(Trellis::<BITS>::OFFSET[residue]);
        }
    }
    classes
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn avx512<const BITS: u32>(streams: &mut [Stream; 2], targets: [&[i16]; 2]) {
    // SAFETY: this function enables what these lanes need; 8 vectors of 32 lanes are the classes.
    unsafe { forward::<super::lanes::avx512::Avx512, BITS, 8>(streams, targets) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl")]
unsafe fn avx512vl<const BITS: u32>(streams: &mut [Stream; 2], targets: [&[i16]; 2]) {
    // SAFETY: this function enables what these lanes need; 16 vectors of 16 lanes are the classes.
    unsafe { forward::<super::lanes::avx2::Avx2<true>, BITS, 16>(streams, targets) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn avx2<const BITS: u32>(streams: &mut [Stream; 2], targets: [&[i16]; 2]) {
    // SAFETY: this function enables what these lanes need; 16 vectors of 16 lanes are the classes.
    unsafe { forward::<super::lanes::avx2::Avx2<false>, BITS, 16>(streams, targets) }
}

unsafe fn portable<const BITS: u32>(streams: &mut [Stream; 2], targets: [&[i16]; 2]) {
    // SAFETY: these lanes need nothing; 16 vectors of 16 lanes are the classes.
    unsafe { forward::<Portable, BITS, 16>(streams, targets) }
}

/// All steps of both streams, in turn.
///
/// # Safety
/// The CPU has the instruction set of `V`.
#[inline(always)]
unsafe fn forward<V: Lanes, const BITS: u32, const VECTORS: usize>(
    streams: &mut [Stream; 2],
    targets: [&[i16]; 2],
) {
    let tables = &TABLES[BITS as usize - 2];
    let zero = i32::from(LARGEST_TARGET) * i32::from(steps_per_unit(BITS));
    for i in 0..targets[0].len() {
        let renormalise = i % RENORMALISE == RENORMALISE - 1;
        for (stream, targets) in streams.iter_mut().zip(targets) {
            let target = targets[i];
            let first = tables.first[(i32::from(target) + zero) as usize];
            stream.first[i] = first;
            let window = tables.curve[usize::from(first)..].first_chunk().expect("is padded");
            let rotation = first.wrapping_sub(stream.rotation);
            stream.rotation = first << BITS;
            let decisions = &mut stream.decisions[i];
            // SAFETY: the caller vouches for the instruction set.
            unsafe {
                step::<V, BITS, VECTORS>(
                    &mut stream.metrics,
                    rotation,
                    target,
                    window,
                    decisions,
                    renormalise,
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Squared error of fresh bits from theta, and theta at the end.
    fn walk(bits: u32, theta: u8, fresh: &[u8], targets: &[i16]) -> (u64, u8) {
        let mut theta = u32::from(theta);
        let mut error = 0;
        for (&fresh, &target) in fresh.iter().zip(targets) {
            theta = (theta << bits | u32::from(fresh)) & ((1 << (bits + 8)) - 1);
            let place = ((theta * u32::from(generator(bits))) & ((1 << (bits + 8)) - 1)) >> bits;
            let value = i16::from(CURVE[place as usize]) * steps_per_unit(bits);
            error += u64::from(error_cost(target.abs_diff(value)));
        }
        (error, theta as u8)
    }

    #[test]
    fn paths_go_on_from_theta_and_end_where_they_are_asked_to() {
        let mut search = Search::default();
        for (isa, bits) in Isa::available().flat_map(|isa| (2..=6).map(move |b| (isa, b))) {
            for seed in 0..20u32 {
                let mut state = seed;
                let mut random = || {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (state >> 16) as i32 % 61 - 30
                };
                let targets: [i16; 32] = std::array::from_fn(|_| {
                    let sum: i32 = (0..6).map(|_| random()).sum();
                    (sum * i32::from(steps_per_unit(bits)) / 2) as i16
                });
                let mut find = |targets: &[i16], theta, end: Option<u8>| {
                    let both = [targets, targets];
                    let ends = end.map(|end| [end; 2]);
                    let found = search.continue_orbits(isa, bits, both, [theta; 2], ends);
                    assert_eq!(found[0], found[1]);
                    found[0]
                };
                let (near, far) = targets.split_at(16);
                // The end of any path can be asked for.
                let (_, end) = walk(bits, 77, &find(far, 77, None), far);
                let (_, there) = walk(bits, 5, &find(near, 5, Some(end)), near);
                assert_eq!(there, end, "{isa}, {bits} bits");

                // What follows a path is found again when it goes on from there.
                let whole = find(&targets, 5, None);
                let (error, _) = walk(bits, 5, &whole, &targets);
                let (before, theta) = walk(bits, 5, &whole[..16], near);
                let again = find(far, theta, None);
                assert_eq!(before + walk(bits, theta, &again, far).0, error, "{isa}, {bits} bits");
            }
        }
    }

    #[test]
    fn generators_have_inverses() {
        for bits in 2..=6 {
            assert_eq!(inverse_generator(bits).wrapping_mul(generator(bits) as u8), 1);
        }
    }
}
