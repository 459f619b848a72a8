//! The safetensors file that holds a compressed checkpoint; `docs/format.md` is its specification.
//!
//! | module | what it holds |
//! |---|---|
//! | [`manifest`] | what each original tensor was and how it is kept: JSON in the file's metadata |
//! | `header` | the safetensors header: where each stored tensor lies |
//! | `output` | a file that appears under its name complete or not at all |
//! | [`writer`] | compressing a checkpoint, tensor by tensor |
//! | [`reader`] | reading any safetensors file through a memory map |
//! | [`decompress`] | a compressed file back to an ordinary one |
//!
//! A coded tensor `X` is three stored tensors, `X.codes`, `X.row_scales` and `X.group_exponents`; any
//! other tensor keeps its name. Files are not trusted: everything is checked before it is used.

pub mod decompress;
mod header;
pub mod manifest;
mod output;
pub mod reader;
pub mod writer;

pub use decompress::decompress;
pub use manifest::{Coding, ElementType, Tensor};
pub use reader::File;
pub use writer::{Writer, WriterOptions};

#[cfg(test)]
mod tests;
