//! How well the values of a row stand for its weights.

use half::bf16;

use super::encode::Distortion;
use super::scale::{self, ScaleRefit};
use crate::layout::GROUP;

/// Partial sums are kept in this many lanes: the same on every machine, and quick on most.
const LANES: usize = 16;

/// Inner products of a row's weights `w` and values under their group scales `q`.
pub(super) struct Products {
    ww: f64,
    wq: f64,
    qq: f64,
}

impl Products {
    #[inline(always)]
    pub(super) fn new(
        weights: &[f32],
        values: &[i8],
        group_scale: impl Fn(usize) -> f32,
    ) -> Products {
        let mut products = Products { ww: 0.0, wq: 0.0, qq: 0.0 };
        for (group, (weights, values)) in
            weights.chunks(GROUP).zip(values.chunks(GROUP)).enumerate()
        {
            let values = &values[..weights.len()];
            let [mut ww, mut wq, mut qq] = [[0.0f64; LANES]; 3];
            let mut add = |weights: &[f32; LANES], values: &[i8; LANES]| {
                let weights = weights.map(f64::from);
                let values = values.map(f64::from);
                for lane in 0..LANES {
                    ww[lane] += weights[lane] * weights[lane];
                }
                for lane in 0..LANES {
                    wq[lane] += weights[lane] * values[lane];
                }
                for lane in 0..LANES {
                    qq[lane] += values[lane] * values[lane];
                }
            };
            let (weights, weights_rest) = weights.as_chunks::<LANES>();
            let (values, values_rest) = values.as_chunks::<LANES>();
            for (weights, values) in weights.iter().zip(values) {
                add(weights, values);
            }
            if !weights_rest.is_empty() {
                let (mut weights, mut values) = ([0.0; LANES], [0; LANES]);
                weights[..weights_rest.len()].copy_from_slice(weights_rest);
                values[..values_rest.len()].copy_from_slice(values_rest);
                add(&weights, &values);
            }
            let scale = f64::from(group_scale(group));
            products.ww += ww.iter().sum::<f64>();
            products.wq += wq.iter().sum::<f64>() * scale;
            products.qq += qq.iter().sum::<f64>() * scale * scale;
        }
        products
    }

    /// The row scale that fits best. It stays within an octave of `scale`: the values of a few tiny
    /// weights may be so poor that their products mean nothing.
    pub(super) fn refit(&self, refit: ScaleRefit, scale: bf16) -> bf16 {
        let best = match refit {
            ScaleRefit::Unbiased => self.ww / self.wq,
            ScaleRefit::LeastSquares => self.wq / self.qq,
        };
        let scale = scale.to_f64();
        let within = if self.wq > 0.0 { best.clamp(scale / 2.0, scale * 2.0) } else { scale };
        bf16::from_f64(within.min(f64::from(scale::LARGEST)))
    }

    /// Signal and noise under a row scale; the largest error is not known here.
    pub(super) fn distortion(&self, scale: f32) -> Distortion {
        let scale = f64::from(scale);
        let noise = self.ww - 2.0 * scale * self.wq + scale * scale * self.qq;
        // What is below the rounding of the sums is nothing.
        let noise = if noise > self.ww * 1e-14 { noise } else { 0.0 };
        Distortion { signal: self.ww, noise, max_error: 0.0 }
    }
}

/// The largest error of a weight of a row.
#[inline(always)]
pub(super) fn max_error(
    weights: &[f32],
    values: &[i8],
    scale: f32,
    group_scale: impl Fn(usize) -> f32,
) -> f64 {
    let mut largest = [0.0f32; LANES];
    for (group, (weights, values)) in weights.chunks(GROUP).zip(values.chunks(GROUP)).enumerate() {
        let scale = scale * group_scale(group);
        for (weights, values) in weights.chunks(LANES).zip(values.chunks(LANES)) {
            for (lane, (weight, &value)) in weights.iter().zip(values).enumerate() {
                largest[lane] = largest[lane].max((weight - scale * f32::from(value)).abs());
            }
        }
    }
    f64::from(largest.into_iter().fold(0.0, f32::max))
}
