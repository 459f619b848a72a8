//! Trajectory codec, file format and `HyperLinear` CPU operator.
//!
//! Data flows one way: checkpoint -> [`codec`] -> [`container`] -> [`linear`].
//!
//! | module | what it holds |
//! |---|---|
//! | [`codec`] | how a vector of weights becomes a point theta on a trajectory, and back |
//! | [`layout`] | where each weight's bits lie in the code bytes |
//! | [`matrix`] | a coded matrix, owned or borrowed, and whole-matrix encode and decode |
//! | [`decode`] | theta to int8, sixteen rows at a time, for every instruction set |
//! | [`linear`] | decode and multiply in one operator |
//! | [`attention`] | softmax attention of image encoders, without copies and score matrices |
//! | [`container`] | the safetensors file: header, checksums, memory map |
//! | [`isa`], [`threads`] | which instructions and how many threads are used |
//!
//! Decoding is bit-identical on every instruction set, thread count and machine.

pub mod attention;
pub mod codec;
pub mod container;
pub mod decode;
pub mod dtype;
pub mod error;
mod floats;
pub mod isa;
pub mod layout;
pub mod linear;
pub mod matrix;
mod scratch;
pub mod threads;

pub use codec::encode::{Distortion, EncodeOptions};
pub use codec::{Codec, ScaleRefit, Trajectory};
pub use dtype::{Dtype, FloatSlice};
pub use error::{Error, Result};
pub use isa::Isa;
pub use matrix::{HyperMatrix, MatrixView};
