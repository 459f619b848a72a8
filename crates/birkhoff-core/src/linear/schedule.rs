//! Cuts a product into tasks, hands them to threads, and lends each its memory.
//!
//! Tokens are taken some at a time (a *chunk*): they are quantised, and then every panel of strips
//! is decoded and multiplied with all of them. A task is a panel and a range of tokens of the chunk.
//! A chunk is so large that decoding again for each chunk costs about a hundredth of the time, and
//! that its activations stay below [`CHUNK_BYTES`].

use std::cell::Cell;
use std::ops::Range;

use super::LinearOptions;
use super::kernel::Kernel;
use super::operand::{Input, Output, Target};
use super::panel::{PANEL_LEN, PANEL_SCALES, PANEL_STRIPS};
use crate::layout::{BLOCK, STRIP};
use crate::matrix::MatrixView;
use crate::scratch::{KEPT_BYTES, Scratch};
use crate::threads::team;

/// Most tokens of a chunk.
const CHUNK_TOKENS: usize = 1024;
/// Fewest tokens of a chunk, unless the product has fewer.
const MIN_CHUNK_TOKENS: usize = 48;
/// Most bytes of the activations of a chunk for each thread, unless [`MIN_CHUNK_TOKENS`] take more:
/// they stay in the cache of third level while panel after panel reads them.
const CHUNK_BYTES: usize = 3 << 20;
/// Fewest tokens that a task takes of a chunk, if it takes not all.
const TASK_TOKENS: usize = 96;
/// Tasks for each thread, so that a thread that is held up leaves its share to others.
const TASKS_PER_THREAD: usize = 4;
/// Fewest multiplications that are worth waking other threads for: some 10 microseconds.
const MIN_PARALLEL_WORK: usize = 2_000_000;
/// What decoding a weight costs, in multiplications.
const DECODE_WORK: usize = 4;
/// Tokens that are quantised at a time.
const QUANTIZE_TOKENS: usize = 16;

/// A product of a chunk of tokens, as the kernels see it.
pub(super) struct Product<'a, K: Kernel> {
    /// The weights.
    pub(super) matrix: MatrixView<'a>,
    /// Added to every token's outputs.
    pub(super) bias: Option<&'a [f32]>,
    /// Tokens before quantisation.
    input: &'a Input<'a>,
    options: LinearOptions,
    /// Where outputs go.
    pub(super) target: Target<'a>,
    /// Row of input and output of token 0 of the chunk.
    pub(super) first_token: usize,
    /// Planes of the activations.
    pub(super) planes: usize,
    /// `[token][block][plane][32]`
    pub(super) elements: *mut K::Element,
    /// Elements of a token.
    pub(super) token_len: usize,
    /// `[token][group][2]`, see [`Kernel::quantize`].
    pub(super) group_sums: *mut i32,
    /// Sums of a token.
    pub(super) sums_len: usize,
    /// `[token]`
    pub(super) token_scales: *mut f32,
}

// SAFETY: threads quantise disjoint ranges of tokens, and only read them after that; `Target` says
// how outputs are written.
unsafe impl<K: Kernel> Sync for Product<'_, K> {}

/// Memory of a thread that multiplies.
pub(super) struct Workspace<K: Kernel> {
    /// The decoded panel, [`PANEL_LEN`] elements.
    pub(super) packed: *mut K::Packed,
    /// The group scales of the panel, [`PANEL_SCALES`] floats.
    pub(super) scales: *mut f32,
    /// Sums of the parts of the columns so far, `[token of the task][strip of the panel][16]`.
    pub(super) sums: *mut f32,
}

/// Multiplies all tokens; shapes are checked and none is empty.
pub(super) fn run<K: Kernel>(
    matrix: MatrixView<'_>,
    input: &Input<'_>,
    bias: Option<&[f32]>,
    output: &mut Output<'_>,
    options: &LinearOptions,
) {
    let layout = matrix.layout();
    let planes = K::planes(options.precision);
    let token_len = layout.blocks() * planes * BLOCK;
    let token_bytes = token_len * size_of::<K::Element>();
    let sums_len = 2 * layout.groups();
    let chunk = (options.threads.clamp(1, 64) * CHUNK_BYTES / token_bytes)
        .clamp(MIN_CHUNK_TOKENS, CHUNK_TOKENS);
    let chunk = chunk.min(input.rows());
    let target = output.target();

    let mut scratch = Scratch::take(&ACTIVATIONS);
    let [elements, group_sums, token_scales] =
        scratch.split([chunk * token_bytes, chunk * sums_len * 4, chunk * 4]);
    for first_token in (0..input.rows()).step_by(chunk) {
        let tokens = (input.rows() - first_token).min(chunk);
        let product = Product::<K> {
            matrix,
            bias,
            input,
            options: *options,
            target,
            first_token,
            planes,
            elements: elements.cast(),
            token_len,
            group_sums: group_sums.cast(),
            sums_len,
            token_scales: token_scales.cast(),
        };
        run_chunk(&product, tokens);
    }
    scratch.give_back(&ACTIVATIONS);
}

/// Quantises and multiplies a chunk.
fn run_chunk<K: Kernel>(product: &Product<'_, K>, tokens: usize) {
    let layout = product.matrix.layout();
    let weights = layout.rows().saturating_mul(layout.cols());
    let work = weights.saturating_mul(tokens.saturating_add(DECODE_WORK));
    let threads = if work < MIN_PARALLEL_WORK { 1 } else { product.options.threads.max(1) };

    let quantize_tasks = tokens.div_ceil(QUANTIZE_TOKENS);
    team::for_each(threads, quantize_tasks, &|task| {
        let start = task * QUANTIZE_TOKENS;
        // SAFETY: the instruction set is available (`linear` has checked), and tasks are disjoint.
        unsafe { K::run_quantize(product, start..(start + QUANTIZE_TOKENS).min(tokens)) }
    });

    let strips = layout.strips();
    let panels = strips.div_ceil(K::STRIPS);
    let wanted = (TASKS_PER_THREAD * threads).div_ceil(panels);
    let splits = if threads == 1 { 1 } else { wanted.min(tokens / TASK_TOKENS).max(1) };
    team::for_each(threads, panels * splits, &|task| {
        let (panel, split) = (task % panels, task / panels);
        // Panels of nearly equal size: small ones are less efficient.
        let strips = panel * strips / panels..(panel + 1) * strips / panels;
        let tokens = split * tokens / splits..(split + 1) * tokens / splits;
        let mut scratch = Scratch::take(&WORKSPACE);
        let [packed, scales, sums] = scratch.split([
            PANEL_LEN * size_of::<K::Packed>(),
            PANEL_SCALES * 4,
            tokens.len() * PANEL_STRIPS * STRIP * 4,
        ]);
        let mut workspace =
            Workspace { packed: packed.cast(), scales: scales.cast(), sums: sums.cast() };
        // SAFETY: the instruction set is available (`linear` has checked), strips and tokens are in
        // range, the tokens are quantised, and no other task has these outputs.
        unsafe { K::run_multiply(product, strips, tokens, &mut workspace) }
        scratch.give_back(&WORKSPACE);
    });
}

/// Quantises tokens of the chunk.
///
/// # Safety
/// The CPU must have the instruction set of `K`, the tokens must be in range, and no one else may
/// use them meanwhile.
#[inline(always)]
pub(super) unsafe fn quantize<K: Kernel>(product: &Product<'_, K>, tokens: Range<usize>) {
    let mut converted = CONVERTED.take();
    for token in tokens {
        let x = product.input.row(product.first_token + token, &mut converted);
        // SAFETY: the buffers have room for all tokens of the chunk.
        unsafe {
            *product.token_scales.add(token) = K::quantize(
                x,
                product.options.precision,
                product.elements.add(token * product.token_len),
                product.group_sums.add(token * product.sums_len),
            );
        }
    }
    if converted.len() * 4 <= KEPT_BYTES {
        CONVERTED.set(converted);
    }
}

thread_local! {
    static ACTIVATIONS: Cell<Scratch> = const { Cell::new(Scratch::new()) };
    static WORKSPACE: Cell<Scratch> = const { Cell::new(Scratch::new()) };
    static CONVERTED: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}
