//! A compressed file back to an ordinary one.

use std::path::Path;

use super::header::Placement;
use super::manifest::{Coding, StoredTensor, Tensor, float_dtype};
use super::output::OutputFile;
use super::reader::File;
use crate::dtype::FloatSlice;
use crate::error::{Error, Result};
use crate::isa::Isa;
use crate::layout::{Layout, STRIP};
use crate::matrix::MatrixView;
use crate::threads;

/// Weights that are decoded at once: memory stays at some tens of megabytes.
const CHUNK: usize = 1 << 22;

/// Writes the original names, shapes and dtypes of `file` to an ordinary safetensors file at `path`
/// and returns its bytes. Tied tensors are written out as copies, and checksums are checked on the
/// way.
///
/// Decoding uses `threads` threads. `progress` is called after each tensor with its name, on the
/// caller's thread; an error from it ends the work. On any error nothing is left behind.
///
/// # Errors
/// [`Error::Format`] if `file` is not compressed, [`Error::Tensor`] if a tensor is damaged,
/// [`Error::Io`] if `path` exists (and is not to be overwritten) or cannot be written; whatever
/// `progress` returns.
pub fn decompress<E: From<Error>>(
    file: &File,
    path: &Path,
    overwrite: bool,
    isa: Isa,
    threads: usize,
    mut progress: impl FnMut(&str) -> Result<(), E>,
) -> Result<u64, E> {
    if !file.is_compressed() {
        let reason = "this is not a compressed file, so there is nothing to decompress".to_owned();
        return Err(Error::Format { path: file.path().to_owned(), reason }.into());
    }
    let original = |tensor: &Tensor| StoredTensor {
        name: tensor.name.clone(),
        dtype: tensor.dtype,
        shape: tensor.shape.clone(),
        aligned: false,
    };
    let placement = Placement::new(file.tensors().iter().map(original).collect())?;
    let header = placement
        .header(&[("format", "pt")])
        .map_err(|reason| Error::Format { path: path.to_owned(), reason })?;
    let output = OutputFile::create(path, overwrite)?;
    output.write_at(&header, 0)?;
    for tensor in file.tensors() {
        let offset = header.len() as u64 + placement.offset(&tensor.name);
        file.check(&tensor.name)?;
        write_tensor(file, tensor, isa, threads, &output, offset)?;
        progress(&tensor.name)?;
    }
    output.commit()?;
    Ok(header.len() as u64 + placement.data_len())
}

/// Writes the elements of a tensor in its original dtype.
fn write_tensor(
    file: &File,
    tensor: &Tensor,
    isa: Isa,
    threads: usize,
    output: &OutputFile,
    mut offset: u64,
) -> Result<()> {
    let holder = match &tensor.coding {
        Coding::Tied { to } => file.tensor(to)?,
        _ => tensor,
    };
    let original = float_dtype(tensor.dtype);
    match (&holder.coding, original) {
        (Coding::Stored { dtype, .. }, Some(original)) if *dtype != tensor.dtype => {
            let stored = float_dtype(*dtype).expect("the manifest was checked");
            let data = FloatSlice::new(file.bytes(&holder.name)?, stored)?;
            output.write_at(&data.to_dtype(original), offset)
        }
        (Coding::Stored { .. }, _) => output.write_at(file.bytes(&holder.name)?, offset),
        (_, original) => {
            let original = original.expect("the manifest was checked");
            let matrix = file.matrix(&holder.name)?;
            for rows in chunks(matrix.view()) {
                let rows = rows?;
                let decoded = threads::install(threads, || rows.decode(isa));
                let bytes = FloatSlice::from(&decoded[..]).to_dtype(original);
                output.write_at(&bytes, offset)?;
                offset += bytes.len() as u64;
            }
            Ok(())
        }
    }
}

/// The matrix in pieces of whole strips, of about [`CHUNK`] weights each.
fn chunks(matrix: MatrixView<'_>) -> impl Iterator<Item = Result<MatrixView<'_>>> {
    let layout = matrix.layout();
    let strips = if layout.is_empty() { 0 } else { layout.strips() };
    let step = (CHUNK / (STRIP * layout.cols().max(1))).max(1);
    (0..strips).step_by(step).map(move |first| {
        let end = strips.min(first + step);
        let rows = layout.rows().min(end * STRIP) - first * STRIP;
        let part = |bytes: &'_ [u8]| {
            let len = bytes.len() / strips;
            first * len..end * len
        };
        MatrixView::new(
            Layout::new(rows, layout.cols(), layout.trajectory())?,
            &matrix.codes()[part(matrix.codes())],
            &matrix.row_scales()[part(matrix.row_scales())],
            &matrix.group_exponents()[part(matrix.group_exponents())],
        )
    })
}
