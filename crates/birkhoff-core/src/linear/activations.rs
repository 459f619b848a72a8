//! Activations as fixed point: a float scale for each token, and integers in one or more planes.
//!
//! A token's values become integers `v = round(x / scale)`, ties to even, with
//! `scale = largest |x| / range`. What the range is depends on the precision:
//!
//! | precision | range | bits |
//! |---|---|---|
//! | medium | 127 | 8 |
//! | high | 127 * 256 + 127 | 16 |
//! | highest | 8355700 | 24 |
//!
//! The integers are cut into signed digits of 8 bits (`v = 256 h + l`, `-128 <= l <= 127`), and each
//! digit of all columns is a plane, or two digits are a plane of 16 bits, as the kernel wants it.
//! The ranges leave room for the carry of the lower digits; the largest of them is a little less
//! than `127 * 65536 + 127 * 256 + 127`, since `x / scale` may round up.
//!
//! Elements lie as `[token][block][plane][32]`, in the order of columns of a decoded block.
//!
//! A token that holds NaN or infinity gets the scale NaN, so that its outputs are all NaN. Tokens
//! whose largest value is below 1e-30 get the scale of that value: smaller steps would not be
//! normal floats.

use super::Precision;
use crate::layout::{BLOCK, GROUP};

/// Largest fixed-point value.
pub(super) fn range(precision: Precision) -> f32 {
    match precision {
        Precision::Medium => 127.0,
        Precision::High => (127 * 256 + 127) as f32,
        Precision::Highest => 8_355_700.0,
    }
}

/// Steps of a token: what its values are multiplied by, and what the integers stand for.
#[derive(Clone, Copy)]
pub(super) struct Steps {
    /// Integers in one.
    pub(super) inverse: f32,
    /// Value of an integer step.
    pub(super) scale: f32,
}

impl Steps {
    /// The steps for the largest magnitude of a token, given as its bits: as integers, the bits of
    /// magnitudes order like the magnitudes, with infinity and NaN above all others.
    pub(super) fn new(largest_bits: u32, precision: Precision) -> Steps {
        let largest = f32::from_bits(largest_bits);
        if !largest.is_finite() {
            return Steps { inverse: 0.0, scale: f32::NAN };
        }
        let (largest, range) = (largest.max(1e-30), range(precision));
        Steps { inverse: range / largest, scale: largest / range }
    }
}

/// Largest magnitude, as its bits.
#[inline(always)]
pub(super) fn largest_bits(x: &[f32]) -> u32 {
    x.iter().fold(0, |largest, x| largest.max(x.to_bits() & 0x7fff_ffff))
}

/// Which column of a block is at place `index` of the order of a decoded block.
pub(super) const fn column(index: usize) -> usize {
    index / 4 * 2 + index % 2 + index % 4 / 2 * (BLOCK / 2)
}

/// Quantises a token to planes of 16 bits: one for medium and high, two for highest (the value
/// without its low digit, and the low digit). Returns the scale.
///
/// # Safety
/// `planes` must be writable for 32 values a block and plane.
#[inline(always)]
pub(super) unsafe fn quantize_i16(x: &[f32], precision: Precision, planes: *mut i16) -> f32 {
    let steps = Steps::new(largest_bits(x), precision);
    let number = if precision == Precision::Highest { 2 } else { 1 };
    for (block, x) in x.chunks(BLOCK).enumerate() {
        let mut values = [0; BLOCK];
        for (value, x) in values.iter_mut().zip(x) {
            *value = (x * steps.inverse).round_ties_even() as i32;
        }
        // SAFETY: the caller says that so much is writable.
        let planes = unsafe {
            std::slice::from_raw_parts_mut(
                planes.add(block * number * BLOCK).cast::<[i16; BLOCK]>(),
                number,
            )
        };
        match planes {
            [high, low] => {
                for index in 0..BLOCK {
                    let value = values[column(index)];
                    low[index] = i16::from(value as i8);
                    high[index] = ((value - i32::from(low[index])) >> 8) as i16;
                }
            }
            planes => {
                for index in 0..BLOCK {
                    planes[0][index] = values[column(index)] as i16;
                }
            }
        }
    }
    steps.scale
}

/// Quantises a token to planes of 8 bits, a digit each, highest first, and sums the integers of each
/// group, times -128 (what unsigned weights, `w + 128`, add too much). With three planes, the first
/// sum is of the integers without their lowest digit, and the second of that digit. Returns the
/// scale.
///
/// # Safety
/// `planes` must be writable for 32 values a block and plane, `sums` for two a group.
#[inline(always)]
pub(super) unsafe fn quantize_i8<const PLANES: usize>(
    x: &[f32],
    precision: Precision,
    planes: *mut i8,
    sums: *mut i32,
) -> f32 {
    let steps = Steps::new(largest_bits(x), precision);
    for (group, x) in x.chunks(GROUP).enumerate() {
        let (mut sum, mut low_sum) = (0i32, 0i32);
        for (block, x) in x.chunks(BLOCK).enumerate() {
            let mut values = [0i32; BLOCK];
            for (value, x) in values.iter_mut().zip(x) {
                *value = (x * steps.inverse).round_ties_even() as i32;
            }
            let block = group * (GROUP / BLOCK) + block;
            // SAFETY: the caller says that so much is writable.
            let planes = unsafe {
                std::slice::from_raw_parts_mut(
                    planes.add(block * PLANES * BLOCK).cast::<[i8; BLOCK]>(),
                    PLANES,
                )
            };
            for (index, plane) in planes.iter_mut().enumerate().rev() {
                let digits = values.map(|value| value as i8);
                *plane = std::array::from_fn(|index| digits[column(index)]);
                if PLANES == 3 && index == 2 {
                    low_sum += digits.iter().map(|&digit| i32::from(digit)).sum::<i32>();
                }
                if index == if PLANES == 3 { 1 } else { PLANES - 1 } {
                    sum = sum.wrapping_add(values.iter().sum());
                }
                for (value, digit) in values.iter_mut().zip(digits) {
                    *value = (*value - i32::from(digit)) >> 8;
                }
            }
        }
        // SAFETY: the caller says that the sums are writable.
        unsafe {
            *sums.add(2 * group) = sum.wrapping_mul(-128);
            *sums.add(2 * group + 1) = low_sum.wrapping_mul(-128);
        }
    }
    steps.scale
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::decoded_index;

    #[test]
    fn columns_are_in_the_order_of_a_decoded_block() {
        for col in 0..BLOCK {
            // Row 0 of a decoded block holds four columns every 64 bytes.
            let index = decoded_index(0, col);
            assert_eq!(column(index / 64 * 4 + index % 4), col);
        }
    }

    #[test]
    fn the_largest_value_stays_in_range() {
        for precision in Precision::ALL {
            let mut bits = 1.0f32.to_bits();
            while f32::from_bits(bits) < 2.0 {
                let largest = f32::from_bits(bits);
                let steps = Steps::new(bits, precision);
                let value = (largest * steps.inverse).round_ties_even();
                assert!(value <= range(precision) + 1.0 && value >= range(precision) - 1.0);
                if precision != Precision::Highest {
                    assert_eq!(value, range(precision));
                }
                bits += 7919;
            }
        }
        assert!(range(Precision::Highest) + 1.0 < (127 * 65536 + 127 * 256 + 127) as f32);
    }
}
