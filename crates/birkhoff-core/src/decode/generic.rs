//! Decoding written once, over vectors of 16-bit lanes; [`super::plain`] says what it computes.
//!
//! A lane is one stream of one row. A vector holds the same word of [`Vector::ROWS`] rows, so that a
//! window is a shift of two neighbouring words, the same for every lane and known when compiling.
//! Everything here is inlined into the entry points of the instruction sets, which enable the
//! features that the intrinsics need.

use crate::codec::Trajectory;
use crate::layout::{DECODED_BLOCK, STRIP};

/// Quads (vectors of 4 columns a row) of a decoded block.
pub(crate) const QUADS: usize = 8;

/// Most vectors of codes in a block: at 8 bits, one a quad.
const MAX_WORDS: usize = QUADS;

/// What the decoder asks of an instruction set.
pub(crate) trait Vector: Copy {
    /// Rows of a vector: 2 lanes of 16 bits each.
    const ROWS: usize;

    /// A table of 256 bytes, ready for [`Vector::lookup`].
    type Table: Copy;

    /// Reads the vector at `from`.
    ///
    /// # Safety
    /// As many bytes as a vector has must be readable. Like every function of this trait, it may
    /// only be called where the CPU has the instruction set.
    unsafe fn load(from: *const u8) -> Self;

    /// Writes the vector to `to`.
    ///
    /// # Safety
    /// As many bytes as a vector has must be writable.
    unsafe fn store(self, to: *mut i8);

    /// The 16 bits that end `shift` (1 to 15) bits before the end of `before:word`.
    ///
    /// # Safety
    /// As for [`Vector::load`].
    unsafe fn window(before: Self, word: Self, shift: u32) -> Self;

    /// `self >> shift`, each lane.
    ///
    /// # Safety
    /// As for [`Vector::load`].
    unsafe fn shift_right(self, shift: u32) -> Self;

    /// The low 16 bits of `self * multiplier`, each lane.
    ///
    /// # Safety
    /// As for [`Vector::load`].
    unsafe fn multiply(self, multiplier: u16) -> Self;

    /// The high bytes of `even` and `odd`, in the low and high byte of each lane.
    ///
    /// # Safety
    /// As for [`Vector::load`].
    unsafe fn merge_high_bytes(even: Self, odd: Self) -> Self;

    /// The entry of `table` that each byte of `self` picks.
    ///
    /// # Safety
    /// As for [`Vector::load`].
    unsafe fn lookup(self, table: &Self::Table) -> Self;

    /// Int8 values as `table` holds values.
    ///
    /// # Safety
    /// As for [`Vector::load`].
    unsafe fn int8(self, table: &Self::Table) -> Self;
}

/// A [`Trajectory`] with a table of the curve, as a type: its taps are compile-time constants.
pub(crate) trait Code: Sized {
    /// The trajectory.
    const TRAJECTORY: Trajectory;

    /// Decodes the quad whose first weight is `EVEN`: twice the quad's number; `ODD` is the next.
    ///
    /// # Safety
    /// The CPU must have the instruction set of `V`.
    #[inline(always)]
    unsafe fn quad<V: Vector, const EVEN: u32, const ODD: u32>(
        words: &Words<V>,
        table: &V::Table,
    ) -> V {
        // SAFETY: the caller says that the CPU has the instruction set.
        unsafe { words.quad::<Self, EVEN, ODD>(table) }
    }
}

/// [`Trajectory::Shift`] as a type.
pub(crate) struct Shift<const BITS: u32>;

/// [`Trajectory::Winding`] as a type.
pub(crate) struct Winding<const BITS: u32>;

/// [`Trajectory::Int8`] as a type.
pub(crate) struct Int8;

impl<const BITS: u32> Code for Shift<BITS> {
    const TRAJECTORY: Trajectory = Trajectory::Shift(BITS);
}

impl<const BITS: u32> Code for Winding<BITS> {
    const TRAJECTORY: Trajectory = Trajectory::Winding(BITS);
}

impl Code for Int8 {
    const TRAJECTORY: Trajectory = Trajectory::Int8;

    #[inline(always)]
    unsafe fn quad<V: Vector, const EVEN: u32, const ODD: u32>(
        words: &Words<V>,
        table: &V::Table,
    ) -> V {
        // SAFETY: the caller says that the CPU has the instruction set.
        unsafe { words.0[EVEN as usize / 2 + 1].int8(table) }
    }
}

/// Evaluates `$with` with the type `$Code` of a trajectory.
macro_rules! with_code {
    ($trajectory:expr, $Code:ident => $with:expr $(,)?) => {{
        use $crate::codec::Trajectory;
        use $crate::decode::generic::{Int8, Shift, Winding};
        macro_rules! with {
            ($Type:ty) => {{
                type $Code = $Type;
                $with
            }};
        }
        match $trajectory {
            Trajectory::Shift(2) => with!(Shift<2>),
            Trajectory::Shift(3) => with!(Shift<3>),
            Trajectory::Shift(4) => with!(Shift<4>),
            Trajectory::Shift(5) => with!(Shift<5>),
            Trajectory::Shift(6) => with!(Shift<6>),
            Trajectory::Winding(4) => with!(Winding<4>),
            Trajectory::Winding(5) => with!(Winding<5>),
            Trajectory::Winding(6) => with!(Winding<6>),
            Trajectory::Int8 => with!(Int8),
            Trajectory::Shift(bits) | Trajectory::Winding(bits) => {
                unreachable!("no codec has a {bits}-bit rate")
            }
        }
    }};
}
pub(crate) use with_code;

/// One weight of every stream, before the table: its place is the high byte of each lane.
///
/// `words[0]` is the last word before the block; then come the block's words.
#[inline(always)]
unsafe fn weight<V: Vector, C: Code, const INDEX: u32>(words: &[V; MAX_WORDS + 1]) -> V {
    const { assert!(C::TRAJECTORY.tap(INDEX).is_some()) };
    let tap = const { C::TRAJECTORY.tap(INDEX).unwrap() };
    let word = tap.end.div_ceil(16);
    let shift = 16 * word - tap.end;
    // Trailing zeros of the multiplier push what lies above theta out of the product.
    let theta_bits = 16 - tap.multiplier.trailing_zeros();
    let [before, word] = [words[word as usize - 1], words[word as usize]];
    // SAFETY: the caller upholds that the CPU has the instruction set.
    unsafe {
        let window = if shift == 0 {
            word
        } else if shift + theta_bits <= 16 {
            word.shift_right(shift)
        } else {
            V::window(before, word, shift)
        };
        window.multiply(tap.multiplier)
    }
}

/// The words of a block of [`Vector::ROWS`] rows, and the last ones before it.
#[derive(Clone, Copy)]
pub(crate) struct Words<V>([V; MAX_WORDS + 1]);

impl<V: Vector> Words<V> {
    /// Reads the words of a block from `codes`, where the rows' first word lies. `before` is the
    /// rows' last word before the block, and becomes their last word of it.
    ///
    /// # Safety
    /// The CPU must have the instruction set of `V`, and the words of the block must be readable.
    #[inline(always)]
    pub(crate) unsafe fn load<C: Code>(before: &mut V, codes: *const u8) -> Self {
        let bits = const { C::TRAJECTORY.bits() as usize };
        let mut words = [*before; MAX_WORDS + 1];
        for word in 0..bits {
            // SAFETY: the caller says that the words are readable; they lie 64 bytes apart.
            words[word + 1] = unsafe { V::load(codes.add(word * 4 * STRIP)) };
        }
        *before = words[bits];
        Words(words)
    }

    /// [`Code::quad`] of a trajectory that is read by taps.
    ///
    /// # Safety
    /// The CPU must have the instruction set of `V`.
    #[inline(always)]
    unsafe fn quad<C: Code, const EVEN: u32, const ODD: u32>(&self, table: &V::Table) -> V {
        // SAFETY: the caller says that the CPU has the instruction set.
        unsafe {
            let even = weight::<V, C, EVEN>(&self.0);
            let odd = weight::<V, C, ODD>(&self.0);
            V::merge_high_bytes(even, odd).lookup(table)
        }
    }
}

/// Evaluates `$with` for each quad of a block, with its number `$quad` and values `$values`. Unrolled
/// for certain, so that the taps are constants.
macro_rules! for_each_quad {
    ($Code:ty, $words:expr, $table:expr, |$quad:ident, $values:ident| $with:expr) => {
        $crate::decode::generic::for_each_quad!(
            @ $Code, $words, $table, $quad, $values, $with,
            (0 1) (2 3) (4 5) (6 7) (8 9) (10 11) (12 13) (14 15)
        )
    };
    (@ $Code:ty, $words:expr, $table:expr, $quad:ident, $values:ident, $with:expr,
        ($even:literal $odd:literal) $($rest:tt)*
    ) => {
        {
            let $quad = $even / 2;
            let $values = <$Code>::quad::<_, $even, $odd>(&$words, $table);
            $with
        }
        $crate::decode::generic::for_each_quad!(
            @ $Code, $words, $table, $quad, $values, $with, $($rest)*
        )
    };
    (@ $Code:ty, $words:expr, $table:expr, $quad:ident, $values:ident, $with:expr,) => {};
}
pub(crate) use for_each_quad;

/// Where the last word before block `first` of a strip lies, in bytes from its start.
pub(crate) fn word_before(blocks: usize, block_len: usize, first: usize) -> usize {
    (first + blocks - 1) % blocks * block_len + block_len - 4 * STRIP
}

/// Decodes blocks `first..` of a strip; see [`super::blocks`], which checks the lengths.
///
/// # Safety
/// The CPU must have the instruction set of `V`; `out` must be a whole number of blocks, and the
/// strip must be a whole number of blocks and hold those.
#[inline(always)]
pub(super) unsafe fn blocks<V: Vector, C: Code>(
    table: &V::Table,
    strip: &[u8],
    first: usize,
    out: &mut [i8],
) {
    let block_len = const { C::TRAJECTORY.bits() as usize * DECODED_BLOCK / 8 };
    if out.is_empty() {
        return;
    }
    let before = word_before(strip.len() / block_len, block_len, first);
    for row in (0..STRIP).step_by(V::ROWS) {
        // SAFETY: the caller says that the CPU has the instruction set and that the strip holds the
        // blocks and `out` the quads: all offsets below are within them.
        unsafe {
            let mut before = V::load(strip.as_ptr().add(before + 4 * row));
            let mut codes = strip.as_ptr().add(first * block_len + 4 * row);
            let mut to = out.as_mut_ptr().add(4 * row);
            for _ in 0..out.len() / DECODED_BLOCK {
                let words = Words::load::<C>(&mut before, codes);
                for_each_quad!(C, words, table, |quad, values| {
                    values.store(to.add(quad * 4 * STRIP));
                });
                codes = codes.add(block_len);
                to = to.add(DECODED_BLOCK);
            }
        }
    }
}
