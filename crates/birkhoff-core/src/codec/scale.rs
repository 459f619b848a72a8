//! How the scales of a row are chosen before the search and corrected after it.
//!
//! All arithmetic has a fixed order and uses only correctly rounded operations, so that the same
//! weights get the same scales on every machine.

use half::bf16;

use super::Trajectory;
use super::curve::CURVE_RMS;
use crate::layout::GROUP;

/// Number of group exponents.
pub const EXPONENTS: usize = 16;

/// What the group exponents stand for: `2^(-e/8)` with `e` of [`EIGHTHS`].
///
/// Fine steps where most groups are, coarse ones for the rare quiet group: as good as 32 even steps
/// at one bit less.
#[rustfmt::skip]
pub static GROUP_SCALE: [f32; EXPONENTS] = [
    1.0, 0.91700405, 0.8408964, 0.7711054, 0.70710677, 0.6484198, 0.59460354, 0.5452539,
    0.5, 0.4204482, 0.35355338, 0.29730177, 0.25, 0.17677669, 0.125, 0.0625,
];

/// Eighths of an octave below the row scale, for each group exponent.
pub const EIGHTHS: [u8; EXPONENTS] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 32];

/// Where one exponent becomes nearer (in the logarithm) than the one before it.
#[rustfmt::skip]
static BETWEEN: [f64; EXPONENTS - 1] = [
    0.9576032806985737, 0.8781260801866497, 0.8052451659746271, 0.7384130729697497,
    0.6771277734684463, 0.620928906036742, 0.5693943173783458, 0.5221368912137069,
    0.4585020216023356, 0.3855527063519852, 0.3242098886627524, 0.2726269331663144,
    0.21022410381342863, 0.14865088937534013, 0.08838834764831845,
];

/// How the row scale is corrected after the search.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum ScaleRefit {
    /// `s <w, w> / <w, q>`: the decoded row has the projection on the row that the row itself has.
    /// A little more error in each weight, but no coherent shrinking that adds up over layers.
    #[default]
    Unbiased,
    /// `s <w, q> / <q, q>`: the least squared error.
    LeastSquares,
}

impl ScaleRefit {
    /// Its name in flags and Python.
    pub fn name(self) -> &'static str {
        match self {
            ScaleRefit::Unbiased => "unbiased",
            ScaleRefit::LeastSquares => "least-squares",
        }
    }

    /// The refit of that name.
    pub fn from_name(name: &str) -> Option<ScaleRefit> {
        [ScaleRefit::Unbiased, ScaleRefit::LeastSquares]
            .into_iter()
            .find(|refit| refit.name() == name)
    }
}

/// Rows whose scale is below this are stored as zero: a group's scale would not be a normal float.
pub const SMALLEST: f32 = 1e-35;
/// The largest row scale: under it, the largest weight is a finite f32.
pub const LARGEST: f32 = f32::MAX / 128.0;

/// Root mean square of the weights in units of the curve's, at which the error is least.
fn load(trajectory: Trajectory) -> f64 {
    match trajectory {
        Trajectory::Shift(6) => 0.78,
        Trajectory::Shift(_) => 0.94,
        Trajectory::Winding(_) => 0.73,
        // int8 takes its scale from the largest weight alone.
        Trajectory::Int8 => f64::INFINITY,
    }
}

/// Scales of a row before the search: fills `exponents`, one a group, and returns the row scale.
///
/// Each group wants `max(rms / (rms of the curve * load), largest / 127)`. `wanted` is scratch.
#[inline(always)]
pub fn choose(
    trajectory: Trajectory,
    row: &[f32],
    exponents: &mut [u8],
    wanted: &mut Vec<f64>,
) -> bf16 {
    let load = load(trajectory) * CURVE_RMS;
    wanted.clear();
    wanted.extend(row.chunks(GROUP).map(|group| {
        let (rms, largest) = rms_and_largest(group);
        (rms / load).max(largest / 127.0)
    }));
    let row_scale =
        bf16::from_f64(wanted.iter().copied().fold(0.0, f64::max).min(f64::from(LARGEST)));
    for (&wanted, exponent) in wanted.iter().zip(exponents) {
        let ratio = wanted / row_scale.to_f64();
        *exponent = match trajectory {
            // Nothing is clipped by more than the rounding of the row scale.
            Trajectory::Int8 => GROUP_SCALE[1..]
                .iter()
                .take_while(|&&scale| ratio * INT8_CLIP <= f64::from(scale))
                .count(),
            _ => BETWEEN.iter().take_while(|&&between| ratio < between).count(),
        } as u8;
    }
    row_scale
}

/// Share of the largest weight of a group that int8 keeps unclipped.
const INT8_CLIP: f64 = 0.99;

/// Root mean square and largest magnitude, summed in a fixed order.
#[inline(always)]
fn rms_and_largest(group: &[f32]) -> (f64, f64) {
    const LANES: usize = 8;
    let (mut sums, mut largest) = ([0.0f64; LANES], [0.0f32; LANES]);
    let (chunks, rest) = group.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            sums[lane] += f64::from(chunk[lane]) * f64::from(chunk[lane]);
            largest[lane] = largest[lane].max(chunk[lane].abs());
        }
    }
    for (lane, value) in rest.iter().enumerate() {
        sums[lane] += f64::from(*value) * f64::from(*value);
        largest[lane] = largest[lane].max(value.abs());
    }
    let rms = (sums.iter().sum::<f64>() / group.len().max(1) as f64).sqrt();
    (rms, f64::from(largest.into_iter().fold(0.0, f32::max)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_agree() {
        for (i, &eighths) in EIGHTHS.iter().enumerate() {
            assert_eq!(GROUP_SCALE[i], 2f64.powf(-f64::from(eighths) / 8.0) as f32);
        }
        for (i, between) in BETWEEN.iter().enumerate() {
            let eighths = f64::from(EIGHTHS[i] + EIGHTHS[i + 1]) / 2.0;
            assert!((between - 2f64.powf(-eighths / 8.0)).abs() < 1e-15);
        }
    }

    #[test]
    fn the_loudest_group_gets_exponent_0_and_quieter_ones_more() {
        let mut row = vec![1.0f32; 4 * GROUP];
        row[GROUP..2 * GROUP].fill(0.5);
        row[2 * GROUP..3 * GROUP].fill(0.01);
        row[3 * GROUP..].fill(0.0);
        let mut exponents = [9; 4];
        let scale = choose(Trajectory::Shift(4), &row, &mut exponents, &mut Vec::new());
        assert_eq!(exponents, [0, 8, 15, 15]);
        assert!((scale.to_f64() * CURVE_RMS * 0.94 - 1.0).abs() < 0.01);
    }

    #[test]
    fn extreme_magnitudes_neither_overflow_nor_vanish() {
        for magnitude in [f32::MAX, 1e30, 1e-10, 1e-30] {
            let mut exponents = [0; 1];
            let scale =
                choose(Trajectory::Shift(4), &[magnitude; 64], &mut exponents, &mut Vec::new());
            assert!(scale.is_finite() && scale.to_f32() > 0.0, "{magnitude}: {scale}");
        }
    }
}
