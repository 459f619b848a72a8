//! Panels: some strips are decoded, a part of the columns at a time, and multiplied with every token
//! of a task while they are in cache.
//!
//! The innermost loop works on a tile of a few tokens and strips whose sums stay in registers. The
//! order of the float operations of an output does not depend on the tile, the panel or the task:
//!
//! ```text
//! y = 0
//! for each group of 128 columns, in order:
//!     y = fma(product of the group, GROUP_SCALE[exponent], y)
//! y = fma(y * scale of the token, row scale, bias)
//! ```

use std::ops::Range;

use super::kernel::Kernel;
use super::schedule::{Product, Workspace};
use crate::floats::Floats;
use crate::layout::{BLOCK, DECODED_BLOCK, GROUP, STRIP};

/// Columns that are decoded at a time: a panel of three strips then fits in the cache of second
/// level with room for the activations.
pub(super) const PANEL_COLS: usize = 1024;
/// Most strips of a panel.
pub(super) const PANEL_STRIPS: usize = 3;

/// Quads of a block.
const QUADS: usize = BLOCK / 4;

const GROUP_BLOCKS: usize = GROUP / BLOCK;
const PANEL_BLOCKS: usize = PANEL_COLS / BLOCK;
const PANEL_GROUPS: usize = PANEL_COLS / GROUP;

/// Elements from a strip of a decoded panel to the next. Not a power of two, so that the strips do
/// not fall on the same sets of the cache.
const STRIP_STRIDE: usize = PANEL_BLOCKS * DECODED_BLOCK + 64;

/// Elements of a decoded panel.
pub(super) const PANEL_LEN: usize = PANEL_STRIPS * STRIP_STRIDE;
/// Floats of the group scales of a panel.
pub(super) const PANEL_SCALES: usize = PANEL_STRIPS * PANEL_GROUPS * STRIP;

/// Multiplies `strips` (at most [`Kernel::STRIPS`]) with `tokens` and writes the outputs.
///
/// # Safety
/// The CPU must have the instruction set of `K`, tokens and strips must be in range and the
/// activations of the tokens quantised, and no one else may write the same outputs.
#[inline(always)]
pub(super) unsafe fn multiply<K: Kernel>(
    product: &Product<'_, K>,
    strips: Range<usize>,
    tokens: Range<usize>,
    workspace: &mut Workspace<K>,
) {
    // SAFETY: the caller upholds all that is needed.
    unsafe {
        match product.planes {
            1 => multiply_planes::<K, 1>(product, strips, tokens, workspace),
            2 => multiply_planes::<K, 2>(product, strips, tokens, workspace),
            _ => multiply_planes::<K, 3>(product, strips, tokens, workspace),
        }
    }
}

/// See [`multiply`].
#[inline(always)]
unsafe fn multiply_planes<K: Kernel, const PLANES: usize>(
    product: &Product<'_, K>,
    strips: Range<usize>,
    tokens: Range<usize>,
    workspace: &mut Workspace<K>,
) {
    // SAFETY: the caller upholds all that is needed.
    unsafe {
        match strips.len() {
            1 => multiply_strips::<K, PLANES, 1>(product, strips.start, tokens, workspace),
            2 => multiply_strips::<K, PLANES, 2>(product, strips.start, tokens, workspace),
            _ => multiply_strips::<K, PLANES, 3>(product, strips.start, tokens, workspace),
        }
    }
}

/// See [`multiply`].
#[inline(always)]
unsafe fn multiply_strips<K: Kernel, const PLANES: usize, const STRIPS: usize>(
    product: &Product<'_, K>,
    strip: usize,
    tokens: Range<usize>,
    workspace: &mut Workspace<K>,
) {
    let layout = product.matrix.layout();
    let ends = Ends::new(product, strip..strip + STRIPS);
    for first in (0..layout.blocks()).step_by(PANEL_BLOCKS) {
        let part = Part { first, blocks: (layout.blocks() - first).min(PANEL_BLOCKS) };
        for index in 0..STRIPS {
            // SAFETY: the workspace has room for a panel.
            unsafe {
                decode(
                    product,
                    strip + index,
                    part,
                    workspace.packed.add(index * STRIP_STRIDE),
                    workspace.scales.add(index * PANEL_GROUPS * STRIP),
                );
            }
        }
        let mut token = tokens.start;
        while token < tokens.end {
            let size = (tokens.end - token).min(K::tile_tokens(PLANES));
            let sums = workspace.sums.wrapping_add((token - tokens.start) * PANEL_STRIPS * STRIP);
            // SAFETY: the caller upholds what is needed of tokens and strips; the workspace has
            // room for the sums of all tokens of a task.
            unsafe {
                macro_rules! tile {
                    ($tokens:literal) => {
                        tile::<K, PLANES, STRIPS, $tokens>(
                            product, workspace, part, &ends, token, sums,
                        )
                    };
                }
                match size {
                    1 => tile!(1),
                    2 => tile!(2),
                    3 => tile!(3),
                    4 => tile!(4),
                    5 => tile!(5),
                    _ => tile!(6),
                }
            }
            token += size;
        }
    }
}

/// The columns that are decoded, in blocks.
#[derive(Clone, Copy)]
struct Part {
    first: usize,
    blocks: usize,
}

/// Decodes a part of a strip and looks up its group scales.
///
/// # Safety
/// As for [`multiply`]; `packed` and `scales` must have room.
#[inline(always)]
unsafe fn decode<K: Kernel>(
    product: &Product<'_, K>,
    strip: usize,
    part: Part,
    packed: *mut K::Packed,
    scales: *mut f32,
) {
    let Part { first, blocks } = part;
    let trajectory = product.matrix.layout().trajectory();
    let exponents = &product.matrix.strip_exponents(strip)[first / GROUP_BLOCKS..];
    // SAFETY: the caller says that there is room.
    unsafe {
        K::decode(trajectory, product.matrix.strip(strip), first, blocks, packed);
        for (group, exponents) in exponents.iter().take(blocks.div_ceil(GROUP_BLOCKS)).enumerate() {
            K::Float::store(K::group_scales(exponents), scales.add(group * STRIP));
        }
    }
}

/// What the outputs of a panel take after all groups: row scales and bias, padded with zeros.
pub(super) struct Ends {
    row_scales: [[f32; STRIP]; PANEL_STRIPS],
    bias: [[f32; STRIP]; PANEL_STRIPS],
    rows: [usize; PANEL_STRIPS],
    pub(super) strips: Range<usize>,
}

impl Ends {
    pub(super) fn new<K: Kernel>(product: &Product<'_, K>, strips: Range<usize>) -> Self {
        let mut ends = Ends {
            row_scales: [[0.0; STRIP]; PANEL_STRIPS],
            bias: [[0.0; STRIP]; PANEL_STRIPS],
            rows: [0; PANEL_STRIPS],
            strips: strips.clone(),
        };
        for (index, strip) in strips.enumerate() {
            let row = strip * STRIP;
            let rows = (product.matrix.layout().rows() - row).min(STRIP);
            ends.rows[index] = rows;
            ends.row_scales[index] = product.matrix.strip_row_scales(strip);
            if let Some(bias) = product.bias {
                ends.bias[index][..rows].copy_from_slice(&bias[row..row + rows]);
            }
        }
        ends
    }

    /// Writes the outputs of a token for strip `index` of the panel.
    ///
    /// # Safety
    /// As for [`multiply`].
    #[inline(always)]
    pub(super) unsafe fn write<K: Kernel>(
        &self,
        product: &Product<'_, K>,
        token: usize,
        index: usize,
        y: K::Float,
    ) {
        let target = product.target;
        // SAFETY: the caller upholds that the outputs exist and are written by no one else.
        unsafe {
            let y = K::Float::mul(y, K::Float::splat(*product.token_scales.add(token)));
            let row_scales = K::Float::load(self.row_scales[index].as_ptr());
            let y = K::Float::mul_add(y, row_scales, K::Float::load(self.bias[index].as_ptr()));
            let to = target.at(product.first_token + token, (self.strips.start + index) * STRIP);
            K::emit(y, self.rows[index], target.dtype(), to);
        }
    }
}

/// Multiplies a part of the columns of a panel with a few tokens. Sums over the groups come from and
/// go to `sums`, but for the first and the last part.
///
/// # Safety
/// As for [`multiply`]; the panel must be decoded.
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "one index runs through several arrays")]
unsafe fn tile<K: Kernel, const PLANES: usize, const STRIPS: usize, const TOKENS: usize>(
    product: &Product<'_, K>,
    workspace: &Workspace<K>,
    part: Part,
    ends: &Ends,
    token: usize,
    sums: *mut f32,
) {
    let token_len = product.token_len;
    let sum_at = |t: usize, s: usize| sums.wrapping_add((t * PANEL_STRIPS + s) * STRIP);
    // SAFETY: the caller says that tokens, panel and sums are there; all offsets are within them.
    unsafe {
        let mut y = [[K::Float::splat(0.0); STRIPS]; TOKENS];
        if part.first > 0 {
            for t in 0..TOKENS {
                for s in 0..STRIPS {
                    y[t][s] = K::Float::load(sum_at(t, s));
                }
            }
        }
        let mut x = product.elements.add(token * token_len + part.first * PLANES * BLOCK);
        let mut packed = workspace.packed.cast_const();
        let mut scales = workspace.scales.cast_const();
        let mut group_sums =
            product.group_sums.add(token * product.sums_len + part.first / GROUP_BLOCKS * 2);
        let mut left = part.blocks;
        while left > 0 {
            let mut int = [[K::start::<PLANES>(group_sums); STRIPS]; TOKENS];
            for t in 1..TOKENS {
                int[t] = [K::start::<PLANES>(group_sums.add(t * product.sums_len)); STRIPS];
            }
            let blocks = left.min(GROUP_BLOCKS);
            left -= blocks;
            for _ in 0..blocks {
                for quad in 0..QUADS {
                    let mut weights = [K::weights(packed.add(quad * 4 * STRIP)); STRIPS];
                    for s in 1..STRIPS {
                        weights[s] = K::weights(packed.add(s * STRIP_STRIDE + quad * 4 * STRIP));
                    }
                    for t in 0..TOKENS {
                        for plane in 0..PLANES {
                            let x = x.add(t * token_len + plane * BLOCK + 4 * quad);
                            let x = K::activations(x);
                            for s in 0..STRIPS {
                                int[t][s][plane] = K::dot(int[t][s][plane], weights[s], x);
                            }
                        }
                    }
                }
                packed = packed.add(DECODED_BLOCK);
                x = x.add(PLANES * BLOCK);
            }
            for s in 0..STRIPS {
                let scale = K::Float::load(scales.add(s * PANEL_GROUPS * STRIP));
                for t in 0..TOKENS {
                    y[t][s] = K::Float::mul_add(K::combine(int[t][s]), scale, y[t][s]);
                }
            }
            scales = scales.add(STRIP);
            group_sums = group_sums.add(2);
        }
        let last = part.first + part.blocks == product.matrix.layout().blocks();
        for t in 0..TOKENS {
            for s in 0..STRIPS {
                if last {
                    ends.write(product, token + t, s, y[t][s]);
                } else {
                    K::Float::store(y[t][s], sum_at(t, s));
                }
            }
        }
    }
}
