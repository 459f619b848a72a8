//! The states of the shift map, ordered so that the search needs no gathers.
//!
//! Order the states by `phi = theta * g mod 2^L` instead of theta, and write `phi = 2^k m + c`:
//!
//! - `m` (8 bits) is the place on the curve: values ascend with `m`.
//! - The successors of a state depend only on `phi mod 256`, its **class**: there are 256.
//! - The fresh bits of a state follow from `c` alone: `u = c / g mod 2^k`.
//! - The class that a state `(m, c)` comes from is `m - offset(c) mod 256`: for each `c`, a rotation.

use super::generator;

/// Classes of states; two states of a class have the same successors.
pub(super) const CLASSES: usize = 256;

/// The trellis at `BITS` bits a weight.
pub(super) struct Trellis<const BITS: u32>;

impl<const BITS: u32> Trellis<BITS> {
    /// Residues `c`, and branches that enter a class.
    pub(super) const RESIDUES: usize = 1 << BITS;
    /// Places that share a residue and lead to different classes; those `PLACES` apart lead to the
    /// same one and compete.
    pub(super) const PLACES: usize = CLASSES >> BITS;
    /// Bits of theta.
    const WINDOW: u32 = BITS + 8;
    /// `1 / g mod 2^L`.
    const INVERSE: u32 = {
        let g = generator(BITS) as u32;
        let mut inverse = g;
        let mut i = 0;
        while i < 5 {
            inverse = inverse.wrapping_mul(2u32.wrapping_sub(g.wrapping_mul(inverse)));
            i += 1;
        }
        inverse & ((1 << Self::WINDOW) - 1)
    };
    /// Fresh bits of the states of each residue.
    pub(super) const FRESH: [u8; 64] = {
        let mut fresh = [0; 64];
        let mut c = 0;
        while c < Self::RESIDUES {
            fresh[c] = ((c as u32).wrapping_mul(Self::INVERSE) & ((1 << BITS) - 1)) as u8;
            c += 1;
        }
        fresh
    };
    /// `m - offset(c)` is the class that a state `(m, c)` comes from.
    pub(super) const OFFSET: [u8; 64] = {
        let mut offset = [0; 64];
        let mut c = 0;
        while c < Self::RESIDUES {
            let step = (generator(BITS) as u32 * Self::FRESH[c] as u32) & ((1 << Self::WINDOW) - 1);
            // g u = c (mod 2^k), so the difference is a multiple of 2^k.
            offset[c] = (step.wrapping_sub(c as u32) >> BITS) as u8;
            c += 1;
        }
        offset
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every branch of the shift map itself, against the closed forms above.
    fn check<const BITS: u32>() {
        let mask = (1u32 << Trellis::<BITS>::WINDOW) - 1;
        let g = u32::from(generator(BITS));
        for theta in 0..=mask {
            for fresh in 0..1u32 << BITS {
                let next = (theta << BITS | fresh) & mask;
                let (from, phi) = (theta.wrapping_mul(g) & 255, next.wrapping_mul(g) & mask);
                let (place, residue) = (phi >> BITS, (phi & ((1 << BITS) - 1)) as usize);
                assert_eq!(u32::from(Trellis::<BITS>::FRESH[residue]), fresh);
                let offset = u32::from(Trellis::<BITS>::OFFSET[residue]);
                assert_eq!(from, place.wrapping_sub(offset) & 255);
            }
        }
    }

    #[test]
    fn closed_forms_describe_the_shift_map() {
        check::<2>();
        check::<3>();
        check::<4>();
        check::<5>();
        check::<6>();
    }
}
