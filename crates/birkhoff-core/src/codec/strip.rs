//! Sixteen rows to codes: scales, search, packing and refit.

use half::bf16;

use super::encode::{Distortion, EncodeOptions};
use super::feedback::{Feedback, InStep};
use super::products::{Products, max_error};
use super::scale::{self, GROUP_SCALE};
use super::shift::search::{self, Search};
use super::{Trajectory, int8, winding};
use crate::decode;
use crate::dtype::FloatSlice;
use crate::isa::Isa;
use crate::layout::{self, BLOCK, DECODED_BLOCK, EXPONENTS, GROUP, Layout, STREAM, STRIP};

/// Encodes strips; keeps its memory from one to the next.
pub(super) struct StripEncoder {
    pub(super) layout: Layout,
    pub(super) options: EncodeOptions,
    pub(super) search: Search,
    /// Weights of the strip, rows padded with zeros to whole blocks.
    pub(super) weights: Vec<f32>,
    /// Wanted scale of each group of a row.
    wanted: Vec<f64>,
    /// Group exponents of the strip, row by row.
    exponents: Vec<u8>,
    /// Weights of a row in units of the curve, stream by stream.
    pub(super) targets: [Vec<f32>; 2],
    /// The same as the search takes them.
    pub(super) fixed_point: [Vec<i16>; 2],
    /// Fresh bits of each weight of a row, stream by stream.
    fresh: [Vec<u8>; 2],
    decoded: Vec<i8>,
    values: Vec<i8>,
    pub(super) in_step: InStep,
}

impl StripEncoder {
    pub(super) fn new(layout: Layout, options: EncodeOptions) -> Self {
        let padded = layout.padded_cols();
        StripEncoder {
            layout,
            options,
            search: Search::default(),
            weights: vec![0.0; STRIP * padded],
            wanted: Vec::with_capacity(layout.groups()),
            exponents: vec![0; STRIP * layout.groups()],
            targets: [0, 1].map(|_| vec![0.0; padded / 2]),
            fixed_point: [0, 1].map(|_| vec![0; padded / 2]),
            fresh: [0, 1].map(|_| vec![0; padded / 2]),
            decoded: vec![0; layout.blocks() * DECODED_BLOCK],
            values: vec![0; padded],
            in_step: InStep::default(),
        }
    }

    /// Encodes one strip; the error is the number of weights that are not finite.
    ///
    /// The arithmetic is the same for every instruction set, only wider.
    pub(super) fn encode(
        &mut self,
        data: FloatSlice<'_>,
        strip: usize,
        feedback: Option<&Feedback>,
        codes: &mut [u8],
        row_scales: &mut [u8],
        exponents: &mut [u8],
    ) -> Result<Distortion, usize> {
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,f16c")]
        fn avx2(
            encoder: &mut StripEncoder,
            data: FloatSlice<'_>,
            strip: usize,
            feedback: Option<&Feedback>,
            parts: [&mut [u8]; 3],
        ) -> Result<Distortion, usize> {
            encoder.encode_with(data, strip, feedback, parts)
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
        fn avx512(
            encoder: &mut StripEncoder,
            data: FloatSlice<'_>,
            strip: usize,
            feedback: Option<&Feedback>,
            parts: [&mut [u8]; 3],
        ) -> Result<Distortion, usize> {
            encoder.encode_with(data, strip, feedback, parts)
        }
        let parts = [codes, row_scales, exponents];
        assert!(self.options.isa.is_available(), "this CPU has no {}", self.options.isa);
        match self.options.isa {
            // SAFETY: the instruction set is available, as asserted.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 | Isa::AvxVnni => unsafe { avx2(self, data, strip, feedback, parts) },
            // SAFETY: the instruction set is available, as asserted.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { avx512(self, data, strip, feedback, parts) },
            _ => self.encode_with(data, strip, feedback, parts),
        }
    }

    #[inline(always)]
    fn encode_with(
        &mut self,
        data: FloatSlice<'_>,
        strip: usize,
        feedback: Option<&Feedback>,
        [codes, row_scales, exponents]: [&mut [u8]; 3],
    ) -> Result<Distortion, usize> {
        let (cols, padded) = (self.layout.cols(), self.layout.padded_cols());
        let first = strip * STRIP;
        let rows = STRIP.min(self.layout.rows() - first);
        for (row, weights) in self.weights.chunks_exact_mut(padded).take(rows).enumerate() {
            data.read((first + row) * cols, &mut weights[..cols]);
        }
        let not_finite =
            self.weights[..rows * padded].iter().filter(|weight| !weight.is_finite()).count();
        if not_finite > 0 {
            return Err(not_finite);
        }

        codes.fill(0);
        row_scales.fill(0);
        self.exponents.fill(0);
        let mut scales = [bf16::ZERO; STRIP];
        for (row, scale) in scales.iter_mut().enumerate().take(rows) {
            *scale = self.choose_scales(row);
        }
        match feedback {
            Some(feedback) => self.encode_in_step(feedback, &scales[..rows], codes),
            None => {
                for (row, scale) in scales.iter().enumerate().take(rows) {
                    if *scale != bf16::ZERO {
                        self.encode_row(row, *scale, codes);
                    }
                }
            }
        }
        for (group, bytes) in exponents.as_chunks_mut::<EXPONENTS>().0.iter_mut().enumerate() {
            let exponent = |row: usize| self.exponents[row * self.layout.groups() + group];
            *bytes = std::array::from_fn(|i| exponent(i) | exponent(i + EXPONENTS) << 4);
        }

        // The rows as every decoder will see them.
        decode::blocks(self.options.isa, self.layout.trajectory(), codes, 0, &mut self.decoded);
        let mut distortion = Distortion::default();
        for (row, scale) in scales.iter().enumerate().take(rows) {
            layout::decoded_row(&self.decoded, row, &mut self.values);
            let weights = &self.weights[row * padded..][..cols];
            let exponents = &self.exponents[row * self.layout.groups()..];
            let group_scale = |group: usize| GROUP_SCALE[usize::from(exponents[group])];
            let products = Products::new(weights, &self.values, group_scale);
            // A row that is stored as zero stays so.
            let scale = match *scale {
                zero if zero == bf16::ZERO => zero,
                // The errors that were fed forward are those under this scale.
                scale if feedback.is_some() => scale,
                scale => products.refit(self.options.refit, scale),
            };
            row_scales[2 * row..][..2].copy_from_slice(&scale.to_le_bytes());
            let scale = scale.to_f32();
            distortion.add(&products.distortion(scale));
            let max_error = max_error(weights, &self.values, scale, group_scale);
            distortion.max_error = distortion.max_error.max(max_error);
        }
        Ok(distortion)
    }

    /// Chooses the scales of a row; returns the row scale before the refit, zero if the row is to be
    /// stored as zero.
    #[inline(always)]
    fn choose_scales(&mut self, row: usize) -> bf16 {
        let (cols, padded) = (self.layout.cols(), self.layout.padded_cols());
        let groups = self.layout.groups();
        let weights = &self.weights[row * padded..][..cols];
        let exponents = &mut self.exponents[row * groups..][..groups];
        let scale = scale::choose(self.layout.trajectory(), weights, exponents, &mut self.wanted);
        if scale.to_f32() < scale::SMALLEST {
            exponents.fill(0);
            return bf16::ZERO;
        }
        scale
    }

    /// The scale of a row in a block, before the refit.
    #[inline(always)]
    pub(super) fn unit(&self, row: usize, block: usize, scale: bf16) -> f32 {
        let exponent = self.exponents[row * self.layout.groups() + block * BLOCK / GROUP];
        scale.to_f32() * GROUP_SCALE[usize::from(exponent)]
    }

    /// Fills `targets` with a row in units of the curve.
    #[inline(always)]
    pub(super) fn row_targets(&mut self, row: usize, scale: bf16) {
        let padded = self.layout.padded_cols();
        for block in 0..self.layout.blocks() {
            let unit = self.unit(row, block, scale);
            let weights = &self.weights[row * padded + block * BLOCK..][..BLOCK];
            for (targets, weights) in self.targets.iter_mut().zip(weights.as_chunks::<STREAM>().0) {
                let targets = &mut targets[block * STREAM..][..STREAM];
                for (target, weight) in targets.iter_mut().zip(weights) {
                    *target = weight / unit;
                }
            }
        }
    }

    /// Writes the codes of a row, given its scale.
    #[inline(always)]
    fn encode_row(&mut self, row: usize, scale: bf16, codes: &mut [u8]) {
        self.row_targets(row, scale);
        let trajectory = self.layout.trajectory();
        let targets = [&self.targets[0][..], &self.targets[1][..]];
        let [fresh_0, fresh_1] = &mut self.fresh;
        match trajectory {
            Trajectory::Int8 => {
                int8::encode_row(targets, row, codes);
                return;
            }
            Trajectory::Winding(bits) => {
                winding::nearest(bits, targets[0], fresh_0);
                winding::nearest(bits, targets[1], fresh_1);
            }
            Trajectory::Shift(bits) => {
                let fixed = self.fixed_point.each_mut();
                for (fixed, targets) in fixed.into_iter().zip(targets) {
                    search::fixed_points(bits, targets, fixed);
                }
                let fixed = self.fixed_point.each_ref().map(|fixed| &fixed[..]);
                self.search.closed_orbits(self.options.isa, bits, fixed, [fresh_0, fresh_1]);
            }
        }
        pack(trajectory.bits(), &self.fresh, row, codes);
    }
}

/// Writes the bits of a row's two streams, most significant first, to its words.
#[inline(always)]
pub(super) fn pack(bits: u32, fresh: &[Vec<u8>; 2], row: usize, codes: &mut [u8]) {
    let block_len = bits as usize * (DECODED_BLOCK / 8);
    for (stream, fresh) in fresh.iter().enumerate() {
        let blocks = fresh.as_chunks::<STREAM>().0.iter().zip(codes.chunks_exact_mut(block_len));
        for (fresh, codes) in blocks {
            let number = fresh
                .iter()
                .fold(0u128, |number, &bits_of_weight| number << bits | u128::from(bits_of_weight));
            for word in 0..bits as usize {
                let value = (number >> (16 * (bits as usize - 1 - word))) as u16;
                let at = layout::word_offset(word, row, stream);
                codes[at..at + 2].copy_from_slice(&value.to_le_bytes());
            }
        }
    }
}
