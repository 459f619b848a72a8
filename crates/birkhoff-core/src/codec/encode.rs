//! A matrix to codes: scales, search, packing and refit, strip by strip.

use rayon::prelude::*;

use super::Codec;
use super::feedback::Feedback;
use super::products::{Products, max_error};
use super::scale::{GROUP_SCALE, ScaleRefit};
use super::strip::StripEncoder;
use crate::dtype::FloatSlice;
use crate::error::{Error, Result};
use crate::isa::Isa;
use crate::layout::{self, DECODED_BLOCK, Layout, ROW_SCALES, STRIP};
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
        HyperMatrix::encode_with(data, rows, cols, options, None)
    }

    /// As [`HyperMatrix::encode`], with error feedback if there is any.
    ///
    /// # Errors
    /// As [`HyperMatrix::encode`]; [`Error::Shape`] also if the feedback is for another number of
    /// columns.
    pub fn encode_with(
        data: FloatSlice<'_>,
        rows: usize,
        cols: usize,
        options: &EncodeOptions,
        feedback: Option<&Feedback>,
    ) -> Result<(HyperMatrix, Distortion)> {
        let layout = Layout::new(rows, cols, options.codec.trajectory(options.bits)?)?;
        let [mut codes, mut row_scales, mut group_exponents] =
            [layout.codes_len(), layout.row_scales_len(), layout.group_exponents_len()]
                .map(layout::zeroed);
        let distortion = encode_into(
            data,
            layout,
            options,
            feedback,
            &mut codes,
            &mut row_scales,
            &mut group_exponents,
        )?;
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
    feedback: Option<&Feedback>,
    codes: &mut [u8],
    row_scales: &mut [u8],
    group_exponents: &mut [u8],
) -> Result<Distortion> {
    check_weights(data, layout)?;
    MatrixView::new(layout, codes, row_scales, group_exponents)?;
    if layout.trajectory() != options.codec.trajectory(options.bits)? {
        return Err(Error::Shape("the layout is of another trajectory than the options".into()));
    }
    if let Some(feedback) = feedback
        && feedback.cols() != layout.cols()
    {
        return Err(Error::Shape(format!(
            "the feedback is for {} columns, the matrix has {}",
            feedback.cols(),
            layout.cols()
        )));
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
                encoder.encode(data, strip, feedback, codes, row_scales, exponents)
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
