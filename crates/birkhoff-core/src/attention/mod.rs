//! Softmax attention of image encoders: `softmax(scale q k^T + bias) v`, in f32, without ever holding
//! a score matrix.
//!
//! Keys are taken some at a time (a *block*), and the softmax is computed online: each query keeps the
//! largest score so far, the sum of exponentials and the weighted sum of values, and rescales the last
//! two where a block brings a larger score (Milakov & Gimelshein 2018; Dao et al. 2022).
//!
//! The bias is the decomposed relative position of MViTv2 (Li et al. 2022), which the Segment Anything
//! encoders use: `q . table_h[y - y' + H - 1] + q . table_w[x - x' + W - 1]` for a query at `(y, x)` and
//! a key at `(y', x')` of an `H x W` grid. It takes `H + W` products a query, not `H W`.
//!
//! Queries, keys and values are read where they lie, such as in the output of one Linear that makes
//! all three, and outputs are written as the next Linear reads them. Attention within windows reads
//! and writes the tokens of the image too, so that nobody cuts it into windows.
//!
//! Every float operation has a fixed order (`tile`): outputs are bit-identical on every instruction
//! set and number of threads.
//!
//! | file | what it holds |
//! |---|---|
//! | `operand` | the tensors, and which tokens a window has |
//! | `plain` | the definition, in f64: what the rest is tested against |
//! | `schedule` | tasks and scratch memory |
//! | `tile` | the online softmax of a few queries at a time |
//! | `kernel` | what it asks of an instruction set |
//! | `portable`, `avx2`, `avx512` | the instruction sets |

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod kernel;
mod operand;
mod plain;
mod portable;
mod schedule;
#[cfg(test)]
mod tests;
mod tile;

pub use operand::{Heads, RelativePosition, Shape, Window};
pub use plain::attention as plain_attention;

use crate::error::{Error, Result};
use crate::isa::Isa;
use crate::linear::FloatsMut;

/// How attention is computed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionOptions {
    /// What products of queries and keys are multiplied with.
    pub scale: f32,
    /// Which instructions are used.
    pub isa: Isa,
    /// Most threads that work on it, the caller's included.
    pub threads: usize,
}

/// What attention is computed of.
#[derive(Clone, Copy, Debug)]
pub struct Operands<'a> {
    /// What asks: its tokens are those of the output.
    pub queries: Heads<'a>,
    /// What is asked; on the grid of the queries if there are windows or relative positions.
    pub keys: Heads<'a>,
    /// What is averaged: for each key.
    pub values: Heads<'a>,
    /// The bias, if there is one.
    pub relative_position: Option<RelativePosition<'a>>,
    /// Windows that tokens stay within, if there are any.
    pub window: Option<Window<'a>>,
}

/// Writes `softmax(scale q k^T + bias) v` to `out`, contiguous of shape
/// `(batch, height, width, heads, head_dim)` of the queries.
///
/// Scores, exponentials and sums are f32: relative error about 1e-6. A query that meets a score of NaN
/// or +infinity gets outputs that are all NaN; other queries are not touched by it.
///
/// Takes, beside its arguments, about half a MiB a thread (for 64 channels a head and 4096 keys), which
/// threads keep for their next call.
///
/// # Errors
/// [`Error::Shape`] if the shapes do not fit together, [`Error::Isa`] if the CPU lacks the
/// instruction set.
pub fn attention(
    operands: &Operands<'_>,
    out: FloatsMut<'_>,
    options: &AttentionOptions,
) -> Result<()> {
    operands.check(&out)?;
    if !options.isa.is_available() {
        return Err(Error::Isa(format!("this CPU has no {}", options.isa)));
    }
    if operands.queries.shape().is_empty() {
        return Ok(());
    }
    match options.isa {
        Isa::Portable => schedule::run::<portable::Portable>(operands, out, options),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 | Isa::AvxVnni => schedule::run::<avx2::Avx2>(operands, out, options),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => schedule::run::<avx512::Avx512>(operands, out, options),
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Avx2 | Isa::AvxVnni | Isa::Avx512 => unreachable!("not available"),
    }
    Ok(())
}
