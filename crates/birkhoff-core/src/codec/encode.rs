//! A matrix to codes: scales, search, packing and refit, strip by strip.

use half::bf16;
use rayon::prelude::*;

use super::scale::{self, GROUP_SCALE, ScaleRefit};
use super::shift::search::{self, Search};
use super::{Codec, Trajectory, int8, winding};
use crate::decode;
use crate::dtype::FloatSlice;
use crate::error::{Error, Result};
use crate::isa::Isa;
use crate::layout::{
    self, BLOCK, DECODED_BLOCK, EXPONENTS, GROUP, Layout, ROW_SCALES, STREAM, STRIP,
};
use crate::matrix::{Bytes, HyperMatrix, MatrixView};

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

impl EncodeOptions {
    /// `bits` a weight, everything else as it is by default.
    ///
    /// # Errors
    /// As [`Isa::current`].
    pub fn new(bits: u32) -> Result<EncodeOptions> {
        Ok(EncodeOptions {
            codec: Codec::default(),
            bits,
            refit: ScaleRefit::default(),
            isa: Isa::current()?,
        })
    }
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

impl HyperMatrix {
    /// Encodes a `rows x cols` matrix on the current rayon pool.
    ///
    /// The codes depend on the weights, codec, bits and refit alone: not on the instruction set or
    /// the number of threads.
    ///
    /// # Errors
    /// [`Error::Bits`] if the codec has no such rate, [`Error::Shape`] if `data` is not that many
    /// weights, [`Error::NotFinite`] if some are NaN or infinite.
    pub fn encode(
        data: FloatSlice<'_>,
        rows: usize,
        cols: usize,
        options: &EncodeOptions,
    ) -> Result<(HyperMatrix, Distortion)> {
        let layout = Layout::new(rows, cols, options.codec.trajectory(options.bits)?)?;
        let [mut codes, mut row_scales, mut group_exponents] =
            [layout.codes_len(), layout.row_scales_len(), layout.group_exponents_len()]
                .map(layout::zeroed);
        let distortion =
            encode_into(data, layout, options, &mut codes, &mut row_scales, &mut group_exponents)?;
        let [codes, row_scales, group_exponents] =
            [codes, row_scales, group_exponents].map(Bytes::Owned);
        Ok((HyperMatrix::new(layout, codes, row_scales, group_exponents)?, distortion))
    }
}

/// Encodes a matrix into the three parts of a [`HyperMatrix`], on the current rayon pool.
///
/// # Errors
/// As [`HyperMatrix::encode`]; [`Error::Shape`] also if a part has the wrong length or the layout
/// another trajectory than the options.
pub fn encode_into(
    data: FloatSlice<'_>,
    layout: Layout,
    options: &EncodeOptions,
    codes: &mut [u8],
    row_scales: &mut [u8],
    group_exponents: &mut [u8],
) -> Result<Distortion> {
    check_weights(data, layout)?;
    MatrixView::new(layout, codes, row_scales, group_exponents)?;
    if layout.trajectory() != options.codec.trajectory(options.bits)? {
        return Err(Error::Shape("the layout is of another trajectory than the options".into()));
    }
    if layout.is_empty() {
        return Ok(Distortion::default());
    }
    let strips: Vec<Result<Distortion, usize>> = (codes.par_chunks_mut(layout.strip_len()))
        .zip(row_scales.par_chunks_mut(ROW_SCALES))
        .zip(group_exponents.par_chunks_mut(layout.strip_exponents_len()))
        .enumerate()
        .map_init(
            || StripEncoder::new(layout, *options),
            |encoder, (strip, ((codes, row_scales), exponents))| {
                encoder.encode(data, strip, codes, row_scales, exponents)
            },
        )
        .collect();

    let mut distortion = Distortion::default();
    let mut not_finite = 0;
    for strip in strips {
        match strip {
            Ok(of_strip) => distortion.add(&of_strip),
            Err(count) => not_finite += count,
        }
    }
    match not_finite {
        0 => Ok(distortion),
        count => Err(Error::NotFinite { count, total: data.len() }),
    }
}

fn check_weights(data: FloatSlice<'_>, layout: Layout) -> Result<()> {
    let (rows, cols) = (layout.rows(), layout.cols());
    match data.len() {
        len if len == rows * cols => Ok(()),
        len => Err(Error::Shape(format!(
            "a {rows} x {cols} matrix has {} weights, not {len}",
            rows * cols
        ))),
    }
}

impl MatrixView<'_> {
    /// How far the decoded matrix is from `data`, the weights it was encoded from.
    ///
    /// # Errors
    /// [`Error::Shape`] if `data` is not that many weights.
    pub fn distortion(&self, isa: Isa, data: FloatSlice<'_>) -> Result<Distortion> {
        let layout = self.layout();
        check_weights(data, layout)?;
        let strips: Vec<Distortion> = (0..layout.strips())
            .into_par_iter()
            .map_init(
                || (vec![0; layout.blocks() * DECODED_BLOCK], vec![0; layout.padded_cols()]),
                |(decoded, values), strip| {
                    self.decode_strip(isa, strip, decoded);
                    let row_scales = self.strip_row_scales(strip);
                    let exponents = self.strip_exponents(strip);
                    let mut weights = vec![0.0; layout.cols()];
                    let mut distortion = Distortion::default();
                    let first = strip * STRIP;
                    for row in 0..STRIP.min(layout.rows() - first) {
                        data.read((first + row) * layout.cols(), &mut weights);
                        layout::decoded_row(decoded, row, values);
                        let group_scale = |group: usize| {
                            GROUP_SCALE[usize::from(layout::group_exponent(&exponents[group], row))]
                        };
                        let products = Products::new(&weights, values, group_scale);
                        let scale = row_scales[row];
                        distortion.add(&products.distortion(scale));
                        let of_row = max_error(&weights, values, scale, group_scale);
                        distortion.max_error = distortion.max_error.max(of_row);
                    }
                    distortion
                },
            )
            .collect();
        let mut distortion = Distortion::default();
        strips.iter().for_each(|strip| distortion.add(strip));
        Ok(distortion)
    }
}

/// Encodes strips; keeps its memory from one to the next.
struct StripEncoder {
    layout: Layout,
    options: EncodeOptions,
    search: Search,
    /// Weights of the strip, rows padded with zeros to whole blocks.
    weights: Vec<f32>,
    /// Wanted scale of each group of a row.
    wanted: Vec<f64>,
    /// Group exponents of the strip, row by row.
    exponents: Vec<u8>,
    /// Weights of a row in units of the curve, stream by stream.
    targets: [Vec<f32>; 2],
    /// The same as the search takes them.
    fixed_point: [Vec<i16>; 2],
    /// Fresh bits of each weight of a row, stream by stream.
    fresh: [Vec<u8>; 2],
    decoded: Vec<i8>,
    values: Vec<i8>,
}

impl StripEncoder {
    fn new(layout: Layout, options: EncodeOptions) -> Self {
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
        }
    }

    /// Encodes one strip; the error is the number of weights that are not finite.
    ///
    /// The arithmetic is the same for every instruction set, only wider.
    fn encode(
        &mut self,
        data: FloatSlice<'_>,
        strip: usize,
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
            parts: [&mut [u8]; 3],
        ) -> Result<Distortion, usize> {
            encoder.encode_with(data, strip, parts)
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
        fn avx512(
            encoder: &mut StripEncoder,
            data: FloatSlice<'_>,
            strip: usize,
            parts: [&mut [u8]; 3],
        ) -> Result<Distortion, usize> {
            encoder.encode_with(data, strip, parts)
        }
        let parts = [codes, row_scales, exponents];
        assert!(self.options.isa.is_available(), "this CPU has no {}", self.options.isa);
        match self.options.isa {
            // SAFETY: the instruction set is available, as asserted.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 | Isa::AvxVnni => unsafe { avx2(self, data, strip, parts) },
            // SAFETY: the instruction set is available, as asserted.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { avx512(self, data, strip, parts) },
            _ => self.encode_with(data, strip, parts),
        }
    }

    #[inline(always)]
    fn encode_with(
        &mut self,
        data: FloatSlice<'_>,
        strip: usize,
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
            *scale = self.encode_row(row, codes);
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

    /// Chooses the scales of a row and writes its codes; returns the row scale before the refit.
    #[inline(always)]
    fn encode_row(&mut self, row: usize, codes: &mut [u8]) -> bf16 {
        let (cols, padded) = (self.layout.cols(), self.layout.padded_cols());
        let groups = self.layout.groups();
        let trajectory = self.layout.trajectory();
        let weights = &self.weights[row * padded..][..padded];
        let exponents = &mut self.exponents[row * groups..][..groups];
        let scale = scale::choose(trajectory, &weights[..cols], exponents, &mut self.wanted);
        if scale.to_f32() < scale::SMALLEST {
            exponents.fill(0);
            return bf16::ZERO;
        }

        for (block, weights) in weights.as_chunks::<BLOCK>().0.iter().enumerate() {
            let exponent = exponents[block * BLOCK / GROUP];
            let unit = scale.to_f32() * GROUP_SCALE[usize::from(exponent)];
            for (targets, weights) in self.targets.iter_mut().zip(weights.as_chunks::<STREAM>().0) {
                let targets = &mut targets[block * STREAM..][..STREAM];
                for (target, weight) in targets.iter_mut().zip(weights) {
                    *target = weight / unit;
                }
            }
        }
        let targets = [&self.targets[0][..], &self.targets[1][..]];
        let [fresh_0, fresh_1] = &mut self.fresh;
        match trajectory {
            Trajectory::Int8 => {
                int8::encode_row(targets, row, codes);
                return scale;
            }
            Trajectory::Winding(bits) => {
                winding::nearest(bits, targets[0], fresh_0);
                winding::nearest(bits, targets[1], fresh_1);
            }
            Trajectory::Shift(bits) => {
                for (fixed, targets) in self.fixed_point.iter_mut().zip(targets) {
                    for (fixed, &target) in fixed.iter_mut().zip(targets) {
                        *fixed = search::fixed_point(bits, target);
                    }
                }
                let fixed = [&self.fixed_point[0][..], &self.fixed_point[1][..]];
                self.search.closed_orbits(self.options.isa, bits, fixed, [fresh_0, fresh_1]);
            }
        }
        pack(trajectory.bits(), &self.fresh, row, codes);
        scale
    }
}

/// Writes the bits of a row's two streams, most significant first, to its words.
#[inline(always)]
fn pack(bits: u32, fresh: &[Vec<u8>; 2], row: usize, codes: &mut [u8]) {
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

/// Partial sums are kept in this many lanes: the same on every machine, and quick on most.
const LANES: usize = 16;

/// Inner products of a row's weights `w` and values under their group scales `q`.
struct Products {
    ww: f64,
    wq: f64,
    qq: f64,
}

impl Products {
    #[inline(always)]
    fn new(weights: &[f32], values: &[i8], group_scale: impl Fn(usize) -> f32) -> Products {
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
    fn refit(&self, refit: ScaleRefit, scale: bf16) -> bf16 {
        let best = match refit {
            ScaleRefit::Unbiased => self.ww / self.wq,
            ScaleRefit::LeastSquares => self.wq / self.qq,
        };
        let scale = scale.to_f64();
        let within = if self.wq > 0.0 { best.clamp(scale / 2.0, scale * 2.0) } else { scale };
        bf16::from_f64(within.min(f64::from(scale::LARGEST)))
    }

    /// Signal and noise under a row scale; the largest error is not known here.
    fn distortion(&self, scale: f32) -> Distortion {
        let scale = f64::from(scale);
        let noise = self.ww - 2.0 * scale * self.wq + scale * scale * self.qq;
        // What is below the rounding of the sums is nothing.
        let noise = if noise > self.ww * 1e-14 { noise } else { 0.0 };
        Distortion { signal: self.ww, noise, max_error: 0.0 }
    }
}

/// The largest error of a weight of a row.
#[inline(always)]
fn max_error(
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
