//! The one error type of the crate.

use std::path::PathBuf;

/// A result with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong. Every message says what was wrong and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A number of bits that the codec does not have.
    #[error("codec {codec:?} has no {bits}-bit rate; choose {choices}")]
    Bits {
        /// Name of the codec.
        codec: &'static str,
        /// The rate asked for.
        bits: u32,
        /// The rates there are.
        choices: &'static str,
    },
    /// A codec name that does not exist.
    #[error("there is no codec {0:?}; choose \"shift\" or \"winding\"")]
    Codec(String),
    /// A dtype name that is not a float.
    #[error("cannot encode dtype {0}; convert it to float32, float64, float16 or bfloat16 first")]
    Dtype(String),
    /// A dtype name that safetensors does not have.
    #[error("dtype: {0}")]
    ElementType(String),
    /// A matrix holds NaN or infinite values.
    #[error(
        "{count} of {total} weights are NaN or infinite; repair them or leave the tensor out with --skip"
    )]
    NotFinite {
        /// How many are not finite.
        count: usize,
        /// How many there are.
        total: usize,
    },
    /// Shape and data disagree, or the parts of a coded matrix do not fit together.
    #[error("{0}")]
    Shape(String),
    /// An instruction set that does not exist or that the CPU lacks.
    #[error("{0}; choose one of portable, avx2, avx512 that this CPU has, or auto")]
    Isa(String),
    /// `BIRKHOFF_ISA` holds something unusable.
    #[error("environment variable BIRKHOFF_ISA: {0}")]
    IsaVariable(String),
    /// `BIRKHOFF_NUM_THREADS` holds something unusable.
    #[error(
        "environment variable BIRKHOFF_NUM_THREADS is {0:?}; set it to a whole number from 1 to 1024"
    )]
    ThreadsVariable(String),
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is damaged or not of the format.
    #[error("{}: {reason}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A tensor of a file is missing, damaged or unusable.
    #[error("tensor {name:?}: {reason}")]
    Tensor {
        /// Name of the tensor.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
}
