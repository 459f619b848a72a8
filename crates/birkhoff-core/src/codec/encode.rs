//! A matrix to codes: scales, search, packing and refit, strip by strip.

use super::{Codec, ScaleRefit};
use crate::isa::Isa;

/// How a matrix is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EncodeOptions {
    /// The trajectory family.
    pub codec: Codec,
    /// Bits a weight.
    pub bits: u32,
    /// How the row scale is corrected after the search.
    pub refit: ScaleRefit,
    /// The instruction set of the search; the codes do not depend on it.
    pub isa: Isa,
}

/// What encoding cost, summed over a matrix.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Distortion {
    /// Sum of squared weights.
    pub signal: f64,
    /// Sum of squared errors.
    pub noise: f64,
    /// Largest error of one weight.
    pub max_error: f64,
}

impl Distortion {
    /// Signal to quantisation noise ratio in dB; infinite where nothing was lost.
    pub fn sqnr_db(&self) -> f64 {
        if self.noise == 0.0 { f64::INFINITY } else { 10.0 * (self.signal / self.noise).log10() }
    }

    /// Adds the sums of another part of the matrix.
    pub fn add(&mut self, other: &Distortion) {
        self.signal += other.signal;
        self.noise += other.noise;
        self.max_error = self.max_error.max(other.max_error);
    }
}
