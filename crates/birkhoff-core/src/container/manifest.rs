//! What each original tensor was and how it is kept.

use std::collections::HashMap;

use safetensors::Dtype;
pub use safetensors::Dtype as ElementType;
use serde::de::IntoDeserializer;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use xxhash_rust::xxh3::xxh3_64;

use crate::codec::Codec;
use crate::error::{Error, Result};
use crate::layout::{EXPONENTS, Layout, STRIP};

/// The version of the format that is written, and the newest that is read.
pub const VERSION: u64 = 1;

/// The key of the manifest in the metadata of the file.
pub(super) const METADATA_KEY: &str = "birkhoff";

/// Free settings of whoever wrote the file: a JSON object.
pub type Settings = serde_json::Map<String, serde_json::Value>;

/// The JSON document in the metadata of a compressed file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`VERSION`].
    pub version: u64,
    /// How the file was made; nothing here is needed to read it.
    pub settings: Settings,
    /// The original tensors in their original order.
    pub tensors: Vec<Tensor>,
}

/// An original tensor, and how it is kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tensor {
    /// Its name in the original.
    pub name: String,
    /// Its element type in the original.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
    /// How it is kept.
    pub coding: Coding,
}

/// How a tensor is kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Coding {
    /// As a [`crate::HyperMatrix`] of its elements in row-major order.
    Coded {
        /// The trajectory family.
        #[serde(with = "codec_name")]
        codec: Codec,
        /// Bits a weight.
        bits: u32,
        /// Rows of the matrix.
        rows: usize,
        /// Columns of the matrix.
        cols: usize,
        /// Checksums of its parts.
        checksums: PartChecksums,
    },
    /// As its elements, perhaps as floats of another size.
    Stored {
        /// Their element type in the file.
        dtype: Dtype,
        /// Checksum of their bytes in the file.
        checksum: Checksum,
    },
    /// Not at all: it is the same as another tensor.
    Tied {
        /// The name of that tensor, which is not itself tied.
        to: String,
    },
}

/// Checksums of the parts of a coded tensor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartChecksums {
    /// Of `X.codes`.
    pub codes: Checksum,
    /// Of `X.row_scales`.
    pub row_scales: Checksum,
    /// Of `X.group_exponents`.
    pub group_exponents: Checksum,
}

impl PartChecksums {
    /// The checksums of the three parts.
    pub fn of(codes: &[u8], row_scales: &[u8], group_exponents: &[u8]) -> PartChecksums {
        let [codes, row_scales, group_exponents] =
            [codes, row_scales, group_exponents].map(Checksum::of);
        PartChecksums { codes, row_scales, group_exponents }
    }
}

/// XXH3 (64 bit, seed 0) of the bytes of a tensor; 16 hexadecimal digits in JSON.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Checksum(u64);

impl Checksum {
    /// The checksum of `bytes`.
    pub fn of(bytes: &[u8]) -> Checksum {
        Checksum(xxh3_64(bytes))
    }
}

impl Serialize for Checksum {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{:016x}", self.0))
    }
}

impl<'de> Deserialize<'de> for Checksum {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let digits = String::deserialize(deserializer)?;
        let is_hexadecimal = |digit: u8| matches!(digit, b'0'..=b'9' | b'a'..=b'f');
        if digits.len() != 16 || !digits.bytes().all(is_hexadecimal) {
            return Err(serde::de::Error::custom("a checksum is no 16 hexadecimal digits"));
        }
        u64::from_str_radix(&digits, 16).map(Checksum).map_err(serde::de::Error::custom)
    }
}

mod codec_name {
    use super::{Codec, Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(codec: &Codec, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(codec.name())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Codec, D::Error> {
        Codec::from_name(&String::deserialize(from)?).map_err(serde::de::Error::custom)
    }
}

/// The names of the three parts of coded tensor `name`: codes, row scales, group exponents.
pub fn part_names(name: &str) -> [String; 3] {
    ["codes", "row_scales", "group_exponents"].map(|part| format!("{name}.{part}"))
}

/// A tensor of the file: one that is stored, or one part of a coded one.
#[derive(Debug)]
pub(super) struct StoredTensor {
    pub(super) name: String,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    /// Whether it must start on a cache line.
    pub(super) aligned: bool,
}

impl Tensor {
    /// Number of elements.
    ///
    /// # Errors
    /// [`Error::Tensor`] if it overflows.
    pub fn elements(&self) -> Result<usize> {
        (self.shape.iter().try_fold(1usize, |product, &dim| product.checked_mul(dim)))
            .ok_or_else(|| self.error("its shape is too large for memory".to_owned()))
    }

    /// Bytes that it takes in the original.
    ///
    /// # Errors
    /// [`Error::Tensor`] if their number overflows or is not whole.
    pub fn original_len(&self) -> Result<usize> {
        self.len_as(self.dtype)
    }

    /// Bytes that it takes in the file.
    ///
    /// # Errors
    /// As [`Self::original_len`].
    pub fn stored_len(&self) -> Result<usize> {
        match &self.coding {
            Coding::Coded { .. } => Ok(self.layout()?.map_or(0, |layout| layout.len())),
            Coding::Stored { dtype, .. } => self.len_as(*dtype),
            Coding::Tied { .. } => Ok(0),
        }
    }

    /// Bytes that its elements take as `dtype`.
    fn len_as(&self, dtype: Dtype) -> Result<usize> {
        match self.elements()?.checked_mul(dtype.bitsize()) {
            Some(bits) if bits % 8 == 0 => Ok(bits / 8),
            Some(_) => Err(self.error(format!("its {dtype} elements fill no whole bytes"))),
            None => Err(self.error("its shape is too large for memory".to_owned())),
        }
    }

    /// The layout of a coded tensor; `None` for others.
    ///
    /// # Errors
    /// [`Error::Tensor`] if the matrix is impossible.
    pub fn layout(&self) -> Result<Option<Layout>> {
        let Coding::Coded { codec, bits, rows, cols, .. } = self.coding else { return Ok(None) };
        let layout = codec
            .trajectory(bits)
            .and_then(|trajectory| Layout::new(rows, cols, trajectory))
            .map_err(|error| self.error(error.to_string()))?;
        Ok(Some(layout))
    }

    /// An error about this tensor.
    pub(super) fn error(&self, reason: String) -> Error {
        Error::Tensor { name: self.name.clone(), reason }
    }

    /// The tensor with the checksums of what a file holds for it: the three parts of a coded tensor,
    /// the elements of a stored one, nothing for one that is tied.
    ///
    /// # Errors
    /// [`Error::Tensor`] if the tensor is impossible, or their number or one of their lengths is
    /// another.
    pub fn with_checksums(mut self, data: &[&[u8]]) -> Result<Tensor> {
        let mut expected = Vec::new();
        for stored in self.stored_tensors()? {
            let bits = stored.shape.iter().product::<usize>() * stored.dtype.bitsize();
            expected.push(bits / 8);
        }
        if !data.iter().map(|bytes| bytes.len()).eq(expected.iter().copied()) {
            let lengths: Vec<_> = data.iter().map(|bytes| bytes.len()).collect();
            return Err(
                self.error(format!("a file holds {expected:?} bytes of it, not {lengths:?}"))
            );
        }
        match &mut self.coding {
            Coding::Coded { checksums, .. } => {
                *checksums = PartChecksums::of(data[0], data[1], data[2])
            }
            Coding::Stored { checksum, .. } => *checksum = Checksum::of(data[0]),
            Coding::Tied { .. } => {}
        }
        Ok(self)
    }

    /// Checks that dtype, shape and coding fit each other, and lists what the file holds for it.
    fn stored_tensors(&self) -> Result<Vec<StoredTensor>> {
        let is_float = |dtype| float_dtype(dtype).is_some();
        self.original_len()?;
        match &self.coding {
            Coding::Coded { rows, cols, .. } => {
                if !is_float(self.dtype) {
                    return Err(self.error(format!("{} tensors cannot be coded", self.dtype)));
                }
                if rows.checked_mul(*cols) != Some(self.elements()?) {
                    return Err(self
                        .error(format!("shape {:?} is no matrix of {rows} x {cols}", self.shape)));
                }
                let layout = self.layout()?.expect("it is coded");
                let (strips, bits) = (layout.strips(), layout.trajectory().bits() as usize);
                let [codes, row_scales, group_exponents] = part_names(&self.name);
                let part = |name, dtype, shape| StoredTensor { name, dtype, shape, aligned: false };
                Ok(vec![
                    StoredTensor {
                        aligned: true,
                        ..part(codes, Dtype::U8, vec![strips, layout.blocks(), bits * 64])
                    },
                    part(row_scales, Dtype::BF16, vec![strips * STRIP]),
                    part(group_exponents, Dtype::U8, vec![strips, layout.groups(), EXPONENTS]),
                ])
            }
            &Coding::Stored { dtype, .. } => {
                if dtype != self.dtype && !(is_float(dtype) && is_float(self.dtype)) {
                    return Err(self.error(format!("{} cannot be stored as {dtype}", self.dtype)));
                }
                self.len_as(dtype)?;
                Ok(vec![StoredTensor {
                    name: self.name.clone(),
                    dtype,
                    shape: self.shape.clone(),
                    aligned: false,
                }])
            }
            Coding::Tied { .. } => Ok(vec![]),
        }
    }
}

impl Manifest {
    /// The JSON document, for the metadata of a file that another program writes.
    ///
    /// # Errors
    /// [`Error::Tensor`] with the first tensor that is impossible.
    pub fn to_json(&self) -> Result<String> {
        self.stored_tensors()?;
        Ok(serde_json::to_string(self)
            .expect("it has neither other keys than strings nor failing parts"))
    }

    /// Reads the JSON document.
    ///
    /// # Errors
    /// The reason, if it is none of this format or of a newer version.
    pub(super) fn from_json(json: &str) -> Result<Manifest, String> {
        #[derive(Deserialize)]
        struct Version {
            version: u64,
        }
        let damaged = |error| format!("the {METADATA_KEY:?} metadata is damaged: {error}");
        let Version { version } = serde_json::from_str(json).map_err(damaged)?;
        if version > VERSION {
            return Err(format!(
                "the file has format version {version}, but this birkhoff reads up to version \
                 {VERSION}; install a newer birkhoff"
            ));
        }
        if version == 0 {
            return Err("the file has format version 0, which does not exist".to_owned());
        }
        serde_json::from_str(json).map_err(damaged)
    }

    /// Checks everything that can be checked without the file, and lists what the file must hold.
    ///
    /// # Errors
    /// [`Error::Tensor`] with the first tensor that is wrong.
    pub(super) fn stored_tensors(&self) -> Result<Vec<StoredTensor>> {
        let mut by_name = HashMap::with_capacity(self.tensors.len());
        for tensor in &self.tensors {
            if tensor.name == "__metadata__" {
                return Err(tensor.error("safetensors reserves this name".to_owned()));
            }
            if by_name.insert(tensor.name.as_str(), tensor).is_some() {
                return Err(tensor.error("the name occurs twice".to_owned()));
            }
        }
        let mut stored = Vec::with_capacity(self.tensors.len());
        for tensor in &self.tensors {
            if let Coding::Tied { to } = &tensor.coding {
                let problem = match by_name.get(to.as_str()) {
                    None => "does not exist",
                    Some(Tensor { coding: Coding::Tied { .. }, .. }) => "is itself tied",
                    Some(target) if target.dtype != tensor.dtype => "has another dtype",
                    Some(target) if target.shape != tensor.shape => "has another shape",
                    Some(_) => continue,
                };
                return Err(tensor.error(format!("it is tied to {to:?}, which {problem}")));
            }
            for part in tensor.stored_tensors()? {
                // A part may not take the name of another tensor; parts of distinct tensors differ.
                if part.name != tensor.name && by_name.contains_key(part.name.as_str()) {
                    let reason = format!("its part {:?} has the name of a tensor", part.name);
                    return Err(tensor.error(reason));
                }
                stored.push(part);
            }
        }
        Ok(stored)
    }
}

/// The element type that safetensors calls `name`.
///
/// # Errors
/// [`Error::ElementType`] if there is none.
pub fn element_type(name: &str) -> Result<ElementType> {
    let name: serde::de::value::StrDeserializer<'_, serde::de::value::Error> =
        name.into_deserializer();
    ElementType::deserialize(name).map_err(|error| Error::ElementType(error.to_string()))
}

/// The float type that can be encoded, if `dtype` is one.
pub(super) fn float_dtype(dtype: Dtype) -> Option<crate::Dtype> {
    crate::Dtype::from_name(&dtype.to_string()).ok()
}
