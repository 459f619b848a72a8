//! How a vector of weights becomes a point theta on a dense trajectory, and back.
//!
//! A weight is `scale * curve[place]`, where `place` is one of 256 places along one axis that the
//! trajectory has reached at theta ([`curve`]). Two trajectories share everything but how theta is
//! read from the code bits and how the best theta is found:
//!
//! - [`shift`], the default: the shift map `theta' = 2^k theta + u (mod 2^(k+8))`. A row's codes are
//!   two closed orbits, and every weight is read off a window of `k + 8` bits of one of them.
//! - [`winding`]: the winding line of the paper (arXiv 2507.08765, section 3):
//!   `(theta, g theta) mod 2^(2b)` passes near every point of the square, two weights per theta.
//!
//! At 8 bits the code is the int8 value itself ([`int8`]).
//!
//! [`scale`] says how the scales are chosen; it is shared by all.

pub mod curve;
pub mod encode;
pub mod feedback;
pub mod int8;
mod products;
pub mod scale;
pub mod shift;
mod strip;
pub mod winding;

use crate::error::{Error, Result};

pub use feedback::Feedback;
pub use scale::ScaleRefit;

/// A family of trajectories.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Codec {
    /// The shift map; 2, 3, 4, 5, 6 bits a weight (8: int8).
    #[default]
    Shift,
    /// The winding line of the paper; 4, 5, 6 bits a weight (8: int8).
    Winding,
}

impl Codec {
    /// Every codec.
    pub const ALL: [Codec; 2] = [Codec::Shift, Codec::Winding];

    /// Its name in files, flags and Python.
    pub fn name(self) -> &'static str {
        match self {
            Codec::Shift => "shift",
            Codec::Winding => "winding",
        }
    }

    /// The codec of that name.
    ///
    /// # Errors
    /// [`Error::Codec`] if there is none.
    pub fn from_name(name: &str) -> Result<Codec> {
        Codec::ALL
            .into_iter()
            .find(|codec| codec.name() == name)
            .ok_or_else(|| Error::Codec(name.to_owned()))
    }

    /// The rates it has, in bits a weight.
    pub fn rates(self) -> &'static [u32] {
        match self {
            Codec::Shift => &[2, 3, 4, 5, 6, 8],
            Codec::Winding => &[4, 5, 6, 8],
        }
    }

    /// Its trajectory at `bits` a weight.
    ///
    /// # Errors
    /// [`Error::Bits`] if it has no such rate.
    pub fn trajectory(self, bits: u32) -> Result<Trajectory> {
        let choices = match self {
            Codec::Shift => "2, 3, 4, 5, 6 or 8",
            Codec::Winding => "4, 5, 6 or 8",
        };
        match (self, bits) {
            (_, 8) => Ok(Trajectory::Int8),
            (Codec::Shift, 2..=6) => Ok(Trajectory::Shift(bits)),
            (Codec::Winding, 4..=6) => Ok(Trajectory::Winding(bits)),
            _ => Err(Error::Bits { codec: self.name(), bits, choices }),
        }
    }
}

/// A codec at a rate: all that is needed to read codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Trajectory {
    /// The shift map at 2 to 6 bits a weight.
    Shift(u32),
    /// The winding line at 4 to 6 bits a weight.
    Winding(u32),
    /// Plain int8.
    Int8,
}

/// How one weight of a stream is read: take the 16 bits of the stream that end at bit `end`
/// (counted from the block's first bit), multiply by `multiplier` modulo 2^16, and the high byte of
/// the product is the place on the curve.
///
/// Bits above the window of theta fall off the top of the product, so they need no mask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tap {
    /// One past the last bit of the window.
    pub end: u32,
    /// The generator, shifted so that theta's most significant bit meets the top of the word.
    pub multiplier: u16,
}

impl Trajectory {
    /// Code bits a weight.
    pub const fn bits(self) -> u32 {
        match self {
            Trajectory::Shift(bits) | Trajectory::Winding(bits) => bits,
            Trajectory::Int8 => 8,
        }
    }

    /// Refuses a rate that its codec does not have.
    ///
    /// # Errors
    /// [`Error::Bits`].
    pub(crate) fn check(self) -> Result<()> {
        let (codec, bits, choices) = match self {
            Trajectory::Int8 | Trajectory::Shift(2..=6) | Trajectory::Winding(4..=6) => {
                return Ok(());
            }
            Trajectory::Shift(bits) => (Codec::Shift, bits, "2, 3, 4, 5 or 6"),
            Trajectory::Winding(bits) => (Codec::Winding, bits, "4, 5 or 6"),
        };
        Err(Error::Bits { codec: codec.name(), bits, choices })
    }

    /// How weight `index` (0 to 15) of a block of a stream is read; `None` at 8 bits, where the code
    /// bytes are the values.
    pub const fn tap(self, index: u32) -> Option<Tap> {
        match self {
            Trajectory::Shift(bits) => Some(shift::tap(bits, index)),
            Trajectory::Winding(bits) => Some(winding::tap(bits, index)),
            Trajectory::Int8 => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rate_has_a_trajectory_of_that_rate() {
        for codec in Codec::ALL {
            assert_eq!(Codec::from_name(codec.name()).unwrap(), codec);
            for &bits in codec.rates() {
                assert_eq!(codec.trajectory(bits).unwrap().bits(), bits);
            }
            for bits in [0, 1, 7, 9, 16] {
                let message = codec.trajectory(bits).unwrap_err().to_string();
                assert!(message.contains(codec.name()), "{message}");
            }
        }
    }
}
