//! Reading any safetensors file through a memory map.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use safetensors::Dtype;
use safetensors::tensor::Metadata;

use super::header::{self, ALIGNMENT};
use super::manifest::{
    Checksum, Coding, METADATA_KEY, Manifest, Settings, Tensor, VERSION, float_dtype, part_names,
};
use crate::codec::encode::Distortion;
use crate::dtype::FloatSlice;
use crate::error::{Error, Result};
use crate::isa::Isa;
use crate::matrix::{Bytes, HyperMatrix};

/// A safetensors file, compressed or plain.
///
/// Tensors are read from the map when they are asked for. Whoever changes the file in place while
/// it is open changes them too; truncating it ends the process.
#[derive(Debug)]
pub struct File {
    path: PathBuf,
    map: Arc<Mmap>,
    /// Where the data section lies in the file.
    data: Range<usize>,
    metadata: Metadata,
    /// In a plain file every tensor is stored, with a checksum that means nothing.
    manifest: Manifest,
    compressed: bool,
    by_name: HashMap<String, usize>,
}

impl File {
    /// Opens a file and checks its header and manifest completely.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read, [`Error::Format`] if it is damaged, no safetensors file
    /// or of a newer version.
    pub fn open(path: &Path) -> Result<File> {
        let io_error = |source| Error::Io { path: path.to_owned(), source };
        let format_error = |reason| Error::Format { path: path.to_owned(), reason };
        let found = fs::metadata(path).map_err(io_error)?;
        if found.is_dir() {
            let reason = "this is a folder, not a safetensors file";
            return Err(io_error(io::Error::new(io::ErrorKind::IsADirectory, reason)));
        }
        if !found.is_file() {
            return Err(format_error("this is not a regular file".to_owned()));
        }
        let file = fs::File::open(path).map_err(io_error)?;
        // SAFETY: the map is private to this process and read-only; its bytes are only ever read as
        // integers and floats, for which every value is valid. That nobody truncates or rewrites
        // the file meanwhile is what the documentation of this type asks of the user.
        let map = unsafe { Mmap::map(&file) }.map_err(io_error)?;
        let (metadata, data) = header::parse(&map).map_err(format_error)?;
        let json = metadata.metadata().as_ref().and_then(|metadata| metadata.get(METADATA_KEY));
        let compressed = json.is_some();
        let manifest = match json {
            Some(json) => {
                let manifest = Manifest::from_json(json).map_err(format_error)?;
                check_manifest(&manifest, &metadata)
                    .map_err(|error| format_error(error.to_string()))?;
                manifest
            }
            None => plain_manifest(&metadata),
        };
        let names = manifest.tensors.iter().enumerate();
        let by_name = names.map(|(index, tensor)| (tensor.name.clone(), index)).collect();
        let path = path.to_owned();
        Ok(File { path, map: Arc::new(map), data, metadata, manifest, compressed, by_name })
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is a compressed file, not a plain safetensors file.
    pub fn is_compressed(&self) -> bool {
        self.compressed
    }

    /// Bytes of the file.
    #[expect(clippy::len_without_is_empty, reason = "a safetensors file is never empty")]
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Settings of whoever compressed it; empty for a plain file.
    pub fn settings(&self) -> &Settings {
        &self.manifest.settings
    }

    /// The metadata of the safetensors header.
    pub fn metadata(&self) -> impl Iterator<Item = (&str, &str)> {
        let pairs = self.metadata.metadata().iter().flatten();
        pairs.map(|(key, value)| (key.as_str(), value.as_str()))
    }

    /// The original tensors: in their original order, or by offset in a plain file.
    pub fn tensors(&self) -> &[Tensor] {
        &self.manifest.tensors
    }

    /// The original tensor `name`.
    ///
    /// # Errors
    /// [`Error::Tensor`] if there is none.
    pub fn tensor(&self, name: &str) -> Result<&Tensor> {
        let index = self.by_name.get(name).ok_or_else(|| Error::Tensor {
            name: name.to_owned(),
            reason: format!("there is none of this name in {}", self.path.display()),
        })?;
        Ok(&self.manifest.tensors[*index])
    }

    /// The tensor that holds the data of `name`: itself, or the one it is tied to.
    ///
    /// # Errors
    /// As [`Self::tensor`].
    fn holder(&self, name: &str) -> Result<&Tensor> {
        let tensor = self.tensor(name)?;
        match &tensor.coding {
            Coding::Tied { to } => self.tensor(to),
            _ => Ok(tensor),
        }
    }

    /// Where a tensor of the header, which must exist, lies in the file.
    fn range(&self, stored_name: &str) -> Range<usize> {
        let info = self.metadata.info(stored_name).expect("the manifest was checked");
        let (start, end) = info.data_offsets;
        self.data.start + start..self.data.start + end
    }

    /// The bytes of a stored tensor (or one tied to it) as they are in the file.
    ///
    /// # Errors
    /// [`Error::Tensor`] if there is none, or it is coded.
    pub fn bytes(&self, name: &str) -> Result<&[u8]> {
        let holder = self.holder(name)?;
        match holder.coding {
            Coding::Stored { .. } => Ok(&self.map[self.range(&holder.name)]),
            _ => Err(holder.error("it is coded, so it has no stored elements".to_owned())),
        }
    }

    /// A coded tensor (or one tied to it) as a matrix on the memory map.
    ///
    /// Codes that do not start on a cache line, as in a file that another program has rewritten, are
    /// copied.
    ///
    /// # Errors
    /// [`Error::Tensor`] if there is none, or it is not coded.
    pub fn matrix(&self, name: &str) -> Result<HyperMatrix> {
        let holder = self.holder(name)?;
        let layout = holder.layout()?.ok_or_else(|| holder.error("it is not coded".to_owned()))?;
        let [codes, row_scales, group_exponents] = part_names(&holder.name).map(|part| {
            let range = self.range(&part);
            if range.start % ALIGNMENT == 0 || !part.ends_with(".codes") {
                Bytes::Mapped(Arc::clone(&self.map), range)
            } else {
                Bytes::copied(&self.map[range])
            }
        });
        HyperMatrix::new(layout, codes, row_scales, group_exponents)
    }

    /// The elements of a coded or stored float tensor as f32, on the current rayon pool.
    ///
    /// # Errors
    /// [`Error::Tensor`] if there is none, or it has no floats.
    pub fn float32(&self, isa: Isa, name: &str) -> Result<Vec<f32>> {
        let holder = self.holder(name)?;
        match holder.coding {
            Coding::Stored { dtype, .. } => {
                let data = stored_floats(holder, dtype, self.bytes(name)?)?;
                let mut out = vec![0.0; data.len()];
                data.read(0, &mut out);
                Ok(out)
            }
            _ => Ok(self.matrix(name)?.view().decode(isa)),
        }
    }

    /// Checks the checksums of a tensor. A plain file has none.
    ///
    /// # Errors
    /// [`Error::Tensor`] if there is no such tensor, or its bytes have changed.
    pub fn check(&self, name: &str) -> Result<()> {
        let holder = self.holder(name)?;
        if !self.compressed {
            return Ok(());
        }
        let check = |stored_name: &str, checksum: Checksum| {
            if Checksum::of(&self.map[self.range(stored_name)]) == checksum {
                return Ok(());
            }
            Err(holder
                .error(format!("the data of {stored_name:?} are damaged: their checksum is wrong")))
        };
        match &holder.coding {
            Coding::Coded { checksums, .. } => {
                let [codes, row_scales, group_exponents] = part_names(&holder.name);
                check(&codes, checksums.codes)?;
                check(&row_scales, checksums.row_scales)?;
                check(&group_exponents, checksums.group_exponents)
            }
            Coding::Stored { checksum, .. } => check(&holder.name, *checksum),
            Coding::Tied { .. } => unreachable!("a tied tensor is tied to one that is not"),
        }
    }

    /// How far a tensor is from the original `data`, on the current rayon pool.
    ///
    /// # Errors
    /// [`Error::Tensor`] if there is no such tensor, `data` is of another kind or size, or elements
    /// that are no floats differ.
    pub fn compare(&self, isa: Isa, name: &str, data: &[u8], dtype: Dtype) -> Result<Distortion> {
        let holder = self.holder(name)?;
        let named =
            |error: Error| Error::Tensor { name: name.to_owned(), reason: error.to_string() };
        let original = float_dtype(dtype);
        let same_kind = dtype == holder.dtype || original.zip(float_dtype(holder.dtype)).is_some();
        let elements = Tensor { dtype, ..holder.clone() }.original_len()?;
        if !same_kind || elements != data.len() {
            return Err(Error::Tensor {
                name: name.to_owned(),
                reason: format!(
                    "{} bytes of {dtype} are no {} tensor of shape {:?}",
                    data.len(),
                    holder.dtype,
                    holder.shape
                ),
            });
        }
        match (&holder.coding, original) {
            (Coding::Coded { .. }, Some(original)) => {
                let original = FloatSlice::new(data, original).map_err(named)?;
                self.matrix(name)?.view().distortion(isa, original).map_err(named)
            }
            (Coding::Stored { dtype, .. }, Some(original)) => {
                let stored = stored_floats(holder, *dtype, self.bytes(name)?)?;
                Ok(FloatSlice::new(data, original).map_err(named)?.distortion(stored))
            }
            _ if self.bytes(name)? == data => Ok(Distortion::default()),
            _ => Err(Error::Tensor {
                name: name.to_owned(),
                reason: format!("its {dtype} elements differ from the original"),
            }),
        }
    }
}

/// The elements of a stored float tensor.
fn stored_floats<'a>(tensor: &Tensor, dtype: Dtype, bytes: &'a [u8]) -> Result<FloatSlice<'a>> {
    let float = float_dtype(dtype)
        .ok_or_else(|| tensor.error(format!("its {dtype} elements are not read as float32")))?;
    FloatSlice::new(bytes, float)
}

/// Checks that the file holds exactly what the manifest says.
fn check_manifest(manifest: &Manifest, metadata: &Metadata) -> Result<()> {
    let stored = manifest.stored_tensors()?;
    for expected in &stored {
        let error = |reason: &str| {
            Err(Error::Tensor { name: expected.name.clone(), reason: reason.to_owned() })
        };
        match metadata.info(&expected.name) {
            None => return error("it is missing from the file"),
            Some(info) if info.dtype != expected.dtype => {
                return error("its dtype in the file is not the one in the manifest");
            }
            Some(info) if info.shape != expected.shape => {
                return error("its shape in the file is not the one in the manifest");
            }
            Some(_) => {}
        }
    }
    let found = metadata.tensors();
    if found.len() == stored.len() {
        return Ok(());
    }
    let expected: std::collections::HashSet<_> = stored.iter().map(|part| &part.name).collect();
    let extra = found.into_keys().filter(|name| !expected.contains(name)).min();
    Err(Error::Tensor {
        name: extra.unwrap_or_default(),
        reason: "it is in the file but not in the manifest".to_owned(),
    })
}

/// The manifest of a plain file: every tensor is stored as it is.
fn plain_manifest(metadata: &Metadata) -> Manifest {
    let mut tensors: Vec<_> = metadata.tensors().into_iter().collect();
    tensors.sort_by(|(a_name, a), (b_name, b)| {
        a.data_offsets.cmp(&b.data_offsets).then_with(|| a_name.cmp(b_name))
    });
    let tensors = tensors.into_iter().map(|(name, info)| Tensor {
        name,
        dtype: info.dtype,
        shape: info.shape.clone(),
        coding: Coding::Stored { dtype: info.dtype, checksum: Checksum::default() },
    });
    Manifest { version: VERSION, settings: Settings::new(), tensors: tensors.collect() }
}
