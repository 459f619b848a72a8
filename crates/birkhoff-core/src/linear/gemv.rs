//! Few tokens: weights are multiplied as they come out of the decoder, in registers, and never
//! stored. The float operations are those of [`super::panel`].

use std::ops::Range;

use super::kernel::Kernel;
use super::panel::Ends;
use super::schedule::Product;
use crate::decode::generic::{self, Code, Vector, Words, for_each_quad, with_code};
use crate::floats::Floats;
use crate::layout::{BLOCK, GROUP, STRIP};

/// Whether a product of so many tokens is faster here than in [`super::panel`]: beyond this, the
/// sums do not fit in registers.
pub(super) fn suits<K: Kernel>(product: &Product<'_, K>, tokens: usize) -> bool {
    tokens * product.planes <= MAX_ROWS
}

/// Most planes of all tokens.
const MAX_ROWS: usize = 4;

/// Multiplies `strips` with `tokens`, for which it must be [suitable](suits), and writes the outputs.
/// `table` is the curve as [`Kernel::weights`] would give it.
///
/// # Safety
/// As for [`super::panel::multiply`].
#[inline(always)]
pub(super) unsafe fn multiply<K: Kernel>(
    product: &Product<'_, K>,
    strips: Range<usize>,
    tokens: Range<usize>,
    table: &<K::Weights as Vector>::Table,
) where
    K::Weights: Vector,
{
    let ends = Ends::new(product, strips.clone());
    macro_rules! strips {
        ($planes:literal, $tokens:literal) => {
            with_code!(
                product.matrix.layout().trajectory(),
                C => for index in 0..strips.len() {
                    multiply_strip::<K, C, $planes, $tokens>(
                        product, &ends, index, tokens.start, table,
                    );
                },
            )
        };
    }
    // SAFETY: the caller upholds all that is needed.
    unsafe {
        match (product.planes, tokens.len()) {
            (1, 1) => strips!(1, 1),
            (1, 2) => strips!(1, 2),
            (1, 3) => strips!(1, 3),
            (1, 4) => strips!(1, 4),
            (2, 1) => strips!(2, 1),
            (2, 2) => strips!(2, 2),
            (3, 1) => strips!(3, 1),
            (planes, tokens) => unreachable!("{tokens} tokens of {planes} planes do not suit"),
        }
    }
}

/// See [`multiply`].
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "one index runs through several arrays")]
unsafe fn multiply_strip<K: Kernel, C: Code, const PLANES: usize, const TOKENS: usize>(
    product: &Product<'_, K>,
    ends: &Ends,
    index: usize,
    token: usize,
    table: &<K::Weights as Vector>::Table,
) where
    K::Weights: Vector,
{
    let layout = product.matrix.layout();
    let token_len = product.token_len;
    let strip = ends.strips.start + index;
    let codes = product.matrix.strip(strip);
    // SAFETY: the caller says that tokens and strip are there; all offsets are within them.
    unsafe {
        let before = generic::word_before(layout.blocks(), layout.block_len(), 0);
        let mut before = K::Weights::load(codes.as_ptr().add(before));
        let mut codes = codes.as_ptr();
        let mut x = product.elements.add(token * token_len);
        let mut group_sums = product.group_sums.add(token * product.sums_len);
        let mut left = layout.blocks();
        let mut y = [K::Float::splat(0.0); TOKENS];
        for exponents in product.matrix.strip_exponents(strip) {
            let mut int = [K::start::<PLANES>(group_sums); TOKENS];
            for t in 1..TOKENS {
                int[t] = K::start::<PLANES>(group_sums.add(t * product.sums_len));
            }
            let blocks = left.min(GROUP / BLOCK);
            left -= blocks;
            for _ in 0..blocks {
                let words = Words::load::<C>(&mut before, codes);
                for_each_quad!(C, words, table, |quad, weights| {
                    for t in 0..TOKENS {
                        for plane in 0..PLANES {
                            let x = K::activations(x.add(t * token_len + plane * BLOCK + 4 * quad));
                            int[t][plane] = K::dot(int[t][plane], weights, x);
                        }
                    }
                });
                codes = codes.add(C::TRAJECTORY.bits() as usize * 4 * STRIP);
                x = x.add(PLANES * BLOCK);
            }
            let scale = K::group_scales(exponents);
            for t in 0..TOKENS {
                y[t] = K::Float::mul_add(K::combine(int[t]), scale, y[t]);
            }
            group_sums = group_sums.add(2);
        }
        for t in 0..TOKENS {
            ends.write(product, token + t, index, y[t]);
        }
    }
}
