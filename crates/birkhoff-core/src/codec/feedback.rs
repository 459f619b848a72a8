//! Error feedback: the error of a column is made up for by the columns after it.
//!
//! The error of a layer with inputs `x` is `tr(E H E^T)`, with `E` the error of the weights and
//! `H = E[x x^T]`. Write `H = C C^T` with `C` upper triangular, in blocks of [`STEP`] columns, and
//! divide each block column by its diagonal block: `P = C diag(C)^-1`. The error then is a sum over
//! blocks `b` of the energy, in the metric of that diagonal block, of
//!
//! ```text
//! E_b + sum over a < b of E_a P_ab
//! ```
//!
//! so when block `b` is encoded, the known second term is added to its weights. Within a block the
//! metric is taken for the identity. (GPTQ, Frantar et al., ICLR 2023; LDLQ in blocks: QuIP#, Tseng
//! et al., ICML 2024.)

use half::bf16;

use super::curve::CURVE;
use super::shift::search;
use super::strip::{self, StripEncoder};
use super::{Trajectory, int8, winding};
use crate::error::{Error, Result};
use crate::layout::{self, BLOCK, DECODED_BLOCK, STREAM, STRIP};

/// Columns that are encoded before their errors are fed to the next ones.
///
/// What the search of the shift map decides for a weight also sets where it can go from there. With
/// shorter steps, more of that is spoilt by the change of what comes next than feedback makes good.
const STEP: usize = STREAM;
/// Weights of its stream that the search of the shift map looks at for a step, if there are as many.
const IN_SIGHT: usize = 2 * STEP;

/// What later columns add for an error, from the second moments of a layer's inputs.
#[derive(Clone, Debug)]
pub struct Feedback {
    cols: usize,
    /// `P` without its diagonal blocks, `cols x cols` in row-major order.
    predictor: Vec<f32>,
}

impl Feedback {
    /// Prepares for matrices of so many columns.
    ///
    /// `factor` is the upper triangular `C` with `C C^T = E[x x^T]`, `cols x cols` in row-major order;
    /// what is below its diagonal is not read.
    ///
    /// # Errors
    /// [`Error::Shape`] if `factor` has another size, or is not a factor: a number is not finite or
    /// one of the diagonal is not positive.
    pub fn new(factor: &[f32], cols: usize) -> Result<Feedback> {
        if cols.checked_mul(cols) != Some(factor.len()) {
            return Err(Error::Shape(format!(
                "the factor for {cols} columns has {cols} x {cols} elements, not {}",
                factor.len()
            )));
        }
        let wrong = factor.chunks_exact(cols.max(1)).enumerate().any(|(row, values)| {
            values[row] <= 0.0 || values[row..].iter().any(|value| !value.is_finite())
        });
        if wrong {
            return Err(Error::Shape(
                "the factor is not that of a positive definite matrix: add to its diagonal before \
                 it is factored"
                    .into(),
            ));
        }
        let mut predictor = vec![0.0; factor.len()];
        for first in (0..cols).step_by(STEP) {
            let width = STEP.min(cols - first);
            for row in 0..first {
                // x C_bb = y, with C_bb upper triangular.
                let mut x = [0.0f64; STEP];
                for col in 0..width {
                    let known: f64 = (0..col)
                        .map(|i| x[i] * f64::from(factor[(first + i) * cols + first + col]))
                        .sum();
                    let diagonal = f64::from(factor[(first + col) * cols + first + col]);
                    x[col] = (f64::from(factor[row * cols + first + col]) - known) / diagonal;
                }
                for (to, x) in predictor[row * cols + first..][..width].iter_mut().zip(x) {
                    *to = x as f32;
                }
            }
        }
        Ok(Feedback { cols, predictor })
    }

    /// Columns of the matrices that it is for.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Adds to the weights after a block of columns what its errors ask for.
    ///
    /// `weights` has rows of `padded` elements. Every sum has the same order on every machine.
    #[inline(always)]
    fn spread(
        &self,
        first: usize,
        errors: &[[f32; STEP]; STRIP],
        weights: &mut [f32],
        padded: usize,
    ) {
        const WIDTH: usize = 32;
        const ROWS: usize = 4;
        let width = STEP.min(self.cols - first);
        let mut tile = [[0.0f32; WIDTH]; STEP];
        for start in (first + STEP..self.cols).step_by(WIDTH) {
            let count = WIDTH.min(self.cols - start);
            for (i, tile) in tile.iter_mut().enumerate().take(width) {
                tile[..count]
                    .copy_from_slice(&self.predictor[(first + i) * self.cols + start..][..count]);
            }
            for (rows, errors) in
                weights.chunks_exact_mut(ROWS * padded).zip(errors.as_chunks::<ROWS>().0)
            {
                let mut sums = [[0.0f32; WIDTH]; ROWS];
                for i in 0..STEP {
                    for (sums, errors) in sums.iter_mut().zip(errors) {
                        for (sum, predictor) in sums.iter_mut().zip(&tile[i]) {
                            *sum += errors[i] * predictor;
                        }
                    }
                }
                for (row, sums) in rows.chunks_exact_mut(padded).zip(&sums) {
                    for (weight, sum) in row[start..start + count].iter_mut().zip(sums) {
                        *weight += sum;
                    }
                }
            }
        }
    }
}

/// What rows that are encoded in step need beside.
#[derive(Default)]
pub(super) struct InStep {
    /// The weights with what earlier errors add, rows padded to whole blocks.
    weights: Vec<f32>,
    /// Scale of each block of each row; 0 for rows that are stored as zero.
    units: Vec<f32>,
    /// Fresh bits of each weight, row by row and stream by stream.
    fresh: Vec<[Vec<u8>; 2]>,
}

impl StripEncoder {
    /// Writes the codes of the rows of a strip, given their scales.
    #[inline(always)]
    pub(super) fn encode_in_step(
        &mut self,
        feedback: &Feedback,
        scales: &[bf16],
        codes: &mut [u8],
    ) {
        let trajectory = self.layout.trajectory();
        let (cols, padded) = (self.layout.cols(), self.layout.padded_cols());
        let (blocks, steps) = (self.layout.blocks(), padded / 2);
        let kept: [bool; STRIP] =
            std::array::from_fn(|row| scales.get(row).is_some_and(|&scale| scale != bf16::ZERO));
        let kept_rows = || (0..STRIP).filter(|&row| kept[row]);
        let mut work = std::mem::take(&mut self.in_step);
        work.weights.clone_from(&self.weights);
        work.units.clear();
        for (row, &scale) in scales.iter().enumerate() {
            work.units.extend((0..blocks).map(|block| self.unit(row, block, scale)));
        }
        work.fresh.resize_with(STRIP, Default::default);
        work.fresh.as_flattened_mut().iter_mut().for_each(|fresh| fresh.resize(steps, 0));

        // The 16 bits before the first weight of each stream, of which theta has the low 8.
        let mut seams = [[0u16; 2]; STRIP];
        if let Trajectory::Shift(bits) = trajectory {
            for row in kept_rows() {
                self.row_targets(row, scales[row]);
                for (fixed, targets) in self.fixed_point.iter_mut().zip(&self.targets) {
                    search::fixed_points(bits, targets, fixed);
                }
                let fixed = self.fixed_point.each_ref().map(|fixed| &fixed[..]);
                seams[row] = self.search.seam(self.options.isa, bits, fixed).map(u16::from);
            }
        }
        let mut thetas = seams;

        for first in (0..padded).step_by(STEP) {
            let (block, stream) = (first / BLOCK, first % BLOCK / STREAM);
            // Where the step begins in its stream.
            let at = block * STEP;
            let in_sight = IN_SIGHT.min(steps - at);
            // A weight from here on in the same stream, in units of the curve.
            let target = |row: usize, i: usize| {
                let block = block + i / STEP;
                let col = block * BLOCK + stream * STREAM + i % STEP;
                work.weights[row * padded + col] / work.units[row * blocks + block]
            };
            let mut values = [[0i8; STEP]; STRIP];
            match trajectory {
                Trajectory::Int8 => {
                    for row in kept_rows() {
                        for (i, value) in values[row].iter_mut().enumerate() {
                            *value = int8::nearest(target(row, i));
                            let index = layout::decoded_index(row, (first + i) % BLOCK);
                            codes[block * DECODED_BLOCK + index] = *value as u8;
                        }
                    }
                }
                Trajectory::Winding(bits) => {
                    for row in kept_rows() {
                        let targets: [f32; STEP] = std::array::from_fn(|i| target(row, i));
                        winding::nearest(
                            bits,
                            &targets,
                            &mut work.fresh[row][stream][at..][..STEP],
                        );
                    }
                }
                Trajectory::Shift(bits) => {
                    let is_last = at + in_sight == steps;
                    for pair in (0..STRIP).step_by(2) {
                        let rows = [pair, pair + 1];
                        let mut fixed = [[0; IN_SIGHT]; 2];
                        for (fixed, row) in fixed.iter_mut().zip(rows) {
                            if kept[row] {
                                let mut targets = [0.0; IN_SIGHT];
                                for (i, to) in targets[..in_sight].iter_mut().enumerate() {
                                    *to = target(row, i);
                                }
                                search::fixed_points(bits, &targets, fixed);
                            }
                        }
                        let theta = |thetas: &[[u16; 2]]| rows.map(|row| thetas[row][stream] as u8);
                        let ends = is_last.then(|| theta(&seams));
                        let starts = theta(&thetas);
                        let found = self.search.continue_orbits(
                            self.options.isa,
                            bits,
                            fixed.each_ref().map(|fixed| &fixed[..in_sight]),
                            starts,
                            ends,
                        );
                        for (row, found) in rows.into_iter().zip(found) {
                            work.fresh[row][stream][at..][..STEP].copy_from_slice(&found[..STEP]);
                        }
                    }
                }
            }
            let mut errors = [[0.0f32; STEP]; STRIP];
            for row in kept_rows() {
                if trajectory != Trajectory::Int8 {
                    let fresh = &work.fresh[row][stream][at..][..STEP];
                    values[row] = decoded(trajectory, &mut thetas[row][stream], fresh);
                }
                let unit = work.units[row * blocks + block];
                let weights = &self.weights[row * padded + first..][..STEP];
                for ((error, weight), &value) in
                    errors[row].iter_mut().zip(weights).zip(&values[row])
                {
                    *error = weight - unit * f32::from(value);
                }
            }
            if first < cols {
                feedback.spread(first, &errors, &mut work.weights, padded);
            }
        }

        if trajectory != Trajectory::Int8 {
            for row in kept_rows() {
                strip::pack(trajectory.bits(), &work.fresh[row], row, codes);
            }
        }
        self.in_step = work;
    }
}

/// The values of the weights of a step, from the 16 bits before it in its stream, which become those
/// after it.
#[inline(always)]
fn decoded(trajectory: Trajectory, before: &mut u16, fresh: &[u8]) -> [i8; STEP] {
    let bits = trajectory.bits();
    let number =
        fresh.iter().fold(u128::from(*before), |number, &fresh| number << bits | u128::from(fresh));
    *before = number as u16;
    std::array::from_fn(|weight| {
        let tap = trajectory.tap(weight as u32).expect("int8 has its values");
        let window = (number >> (STEP as u32 * bits - tap.end)) as u16;
        CURVE[usize::from(window.wrapping_mul(tap.multiplier) >> 8)]
    })
}
