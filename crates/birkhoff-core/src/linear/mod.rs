//! Decode and multiply in one operator: `y = x W^T + b`.
//!
//! Activations are turned into fixed point, token by token (`activations`), and multiplied with
//! the int8 values of the weights in integers, group by group; only the sums of groups are floats.
//! Since integers are exact and the few float operations have a fixed order (`panel`), outputs are
//! bit-identical on every instruction set, number of threads and number of tokens in a call.
//!
//! | file | what it holds |
//! |---|---|
//! | `operand` | input and output matrices |
//! | `activations` | floats to planes of integers |
//! | `schedule` | chunks, tasks and scratch memory |
//! | `panel` | kernels that decode to cache and multiply with many tokens |
//! | `gemv` | kernels for a few tokens, that decode in registers |
//! | `kernel` | what they ask of an instruction set |
//! | `portable`, `avx2`, `avxvnni`, `avx512` | the instruction sets |

mod activations;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avxvnni;
#[cfg(target_arch = "x86_64")]
mod gemv;
mod kernel;
mod operand;
mod panel;
mod portable;
mod schedule;
#[cfg(test)]
mod tests;

pub use operand::{Floats, FloatsMut, Input, Output};

use crate::error::{Error, Result};
use crate::isa::Isa;
use crate::matrix::MatrixView;
use crate::threads;

/// How finely activations are represented.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Precision {
    /// 24-bit fixed point for each token: as accurate as a product in f32.
    Highest,
    /// 16-bit fixed point for each token: relative error about 3e-5.
    #[default]
    High,
    /// 8-bit fixed point for each token: relative error about 1e-2.
    Medium,
}

impl Precision {
    /// Every precision, finest first.
    pub const ALL: [Precision; 3] = [Precision::Highest, Precision::High, Precision::Medium];

    /// Its name in Python.
    pub fn name(self) -> &'static str {
        match self {
            Precision::Highest => "highest",
            Precision::High => "high",
            Precision::Medium => "medium",
        }
    }

    /// The precision of that name.
    pub fn from_name(name: &str) -> Option<Precision> {
        Precision::ALL.into_iter().find(|precision| precision.name() == name)
    }
}

/// How a product is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearOptions {
    /// How finely activations are represented.
    pub precision: Precision,
    /// Which instructions are used.
    pub isa: Isa,
    /// Most threads that work on it, the caller's included. Small products stay with the caller,
    /// and so do those that find the other threads busy.
    pub threads: usize,
}

impl LinearOptions {
    /// High precision, and what the environment or else the machine says of the rest.
    ///
    /// # Errors
    /// If `BIRKHOFF_ISA` or `BIRKHOFF_NUM_THREADS` hold something unusable.
    pub fn from_environment() -> Result<Self> {
        let (isa, threads) = (Isa::current()?, threads::default_threads()?);
        Ok(LinearOptions { precision: Precision::default(), isa, threads })
    }
}

/// `out = x W^T + bias`, with `x` of M x in_features and `out` of M x out_features.
///
/// A token (row of `x`) that holds NaN or infinity gets outputs that are all NaN; no other token is
/// touched by it. A token of zeros gets exactly the bias.
///
/// Takes, beside its arguments, at most 3 MiB a thread or 48 tokens of activations, whichever is more
/// (1 to 4 bytes a value, and never more than 1024 tokens), and half a MiB a thread for decoded
/// weights and sums. Threads keep that memory for their next call, up to 32 MiB of each.
///
/// # Errors
/// [`Error::Shape`] if the shapes do not fit together, [`Error::Isa`] if the CPU lacks the
/// instruction set.
pub fn linear(
    weight: MatrixView<'_>,
    x: Input<'_>,
    bias: Option<&[f32]>,
    mut out: Output<'_>,
    options: &LinearOptions,
) -> Result<()> {
    let layout = weight.layout();
    let (out_features, in_features) = (layout.rows(), layout.cols());
    if x.cols() != in_features {
        return Err(Error::Shape(format!(
            "x of shape {} x {} does not fit weights of shape {out_features} x {in_features}: it \
             must have {in_features} columns",
            x.rows(),
            x.cols(),
        )));
    }
    if (out.rows(), out.cols()) != (x.rows(), out_features) {
        return Err(Error::Shape(format!(
            "the output of shape {} x {} must be of shape {} x {out_features}",
            out.rows(),
            out.cols(),
            x.rows(),
        )));
    }
    if let Some(bias) = bias
        && bias.len() != out_features
    {
        return Err(Error::Shape(format!(
            "a bias of {} values does not fit weights of shape {out_features} x {in_features}: it \
             must have {out_features}",
            bias.len(),
        )));
    }
    if !options.isa.is_available() {
        return Err(Error::Isa(format!("this CPU has no {}", options.isa)));
    }
    if x.rows() == 0 || out_features == 0 {
        return Ok(());
    }
    if in_features == 0 {
        out.fill_rows(bias);
        return Ok(());
    }
    #[cfg(target_os = "linux")]
    out.advise_huge_pages();
    match options.isa {
        Isa::Portable => {
            schedule::run::<portable::Portable>(weight, &x, bias, &mut out, options);
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => schedule::run::<avx2::Avx2>(weight, &x, bias, &mut out, options),
        #[cfg(target_arch = "x86_64")]
        Isa::AvxVnni => avxvnni::run(weight, &x, bias, &mut out, options),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => schedule::run::<avx512::Avx512>(weight, &x, bias, &mut out, options),
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Avx2 | Isa::AvxVnni | Isa::Avx512 => unreachable!("not available"),
    }
    Ok(())
}
