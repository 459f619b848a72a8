//! The safetensors header: where each stored tensor lies.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::ops::Range;

use safetensors::tensor::{Metadata, TensorInfo};
use serde::ser::{Serialize, SerializeMap, Serializer};

use super::manifest::StoredTensor;
use crate::error::{Error, Result};

/// Bytes of the header's length, which come first in the file.
const PREFIX: usize = size_of::<u64>();

/// Longest header that readers of safetensors accept.
const LONGEST: usize = 100_000_000;

/// What the data section, and in it each tensor of codes, starts on a multiple of.
pub(super) const ALIGNMENT: usize = 64;

/// Where the tensors of a file to be written lie.
#[derive(Debug)]
pub(super) struct Placement {
    /// In the order of their offsets.
    tensors: Vec<(String, TensorInfo)>,
    by_name: HashMap<String, usize>,
}

impl Placement {
    /// Places tensors without holes: codes first, then the others by descending element size, so
    /// that all are aligned.
    ///
    /// # Errors
    /// [`Error::Tensor`] if the file would be impossibly large.
    pub(super) fn new(mut tensors: Vec<StoredTensor>) -> Result<Placement> {
        tensors.sort_by_key(|tensor| (!tensor.aligned, Reverse(tensor.dtype.bitsize())));
        let mut end = 0usize;
        let tensors: Vec<_> = tensors
            .into_iter()
            .map(|StoredTensor { name, dtype, shape, .. }| {
                let start = end;
                end = (shape.iter().try_fold(dtype.bitsize(), |bits, &dim| bits.checked_mul(dim)))
                    .and_then(|bits| start.checked_add(bits / 8))
                    .filter(|&end| i64::try_from(end).is_ok())
                    .ok_or_else(|| Error::Tensor {
                        name: name.clone(),
                        reason: "the file would be too large".to_owned(),
                    })?;
                Ok((name, TensorInfo { dtype, shape, data_offsets: (start, end) }))
            })
            .collect::<Result<_>>()?;
        let names = tensors.iter().enumerate().map(|(index, (name, _))| (name.clone(), index));
        Ok(Placement { by_name: names.collect(), tensors })
    }

    /// Where the tensor `name` starts in the data section.
    ///
    /// # Panics
    /// If it was not placed.
    pub(super) fn offset(&self, name: &str) -> u64 {
        self.tensors[self.by_name[name]].1.data_offsets.0 as u64
    }

    /// Bytes of the data section.
    pub(super) fn data_len(&self) -> u64 {
        self.tensors.last().map_or(0, |(_, info)| info.data_offsets.1 as u64)
    }

    /// The header with its length in front, padded with spaces to [`ALIGNMENT`].
    ///
    /// # Errors
    /// The reason, if it is longer than readers accept.
    pub(super) fn header(&self, metadata: &[(&str, &str)]) -> Result<Vec<u8>, String> {
        let json = serde_json::to_vec(&Header { metadata, tensors: &self.tensors })
            .map_err(|error| error.to_string())?;
        let len = (PREFIX + json.len()).next_multiple_of(ALIGNMENT) - PREFIX;
        if len > LONGEST {
            return Err(format!("the header would take {len} bytes; the format has {LONGEST}"));
        }
        let mut header = Vec::with_capacity(PREFIX + len);
        header.extend_from_slice(&(len as u64).to_le_bytes());
        header.extend_from_slice(&json);
        header.resize(PREFIX + len, b' ');
        Ok(header)
    }
}

/// The JSON of a header, in a fixed order (safetensors itself writes metadata in a random one).
struct Header<'a> {
    metadata: &'a [(&'a str, &'a str)],
    tensors: &'a [(String, TensorInfo)],
}

impl Serialize for Header<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        struct Pairs<'a>(&'a [(&'a str, &'a str)]);
        impl Serialize for Pairs<'_> {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_map(self.0.iter().copied())
            }
        }
        let mut map = serializer.serialize_map(Some(self.tensors.len() + 1))?;
        map.serialize_entry("__metadata__", &Pairs(self.metadata))?;
        for (name, info) in self.tensors {
            map.serialize_entry(name, info)?;
        }
        map.end()
    }
}

/// The header of any safetensors file, checked, and the range of its data section.
///
/// # Errors
/// The reason, if `file` is no complete safetensors file.
pub(super) fn parse(file: &[u8]) -> Result<(Metadata, Range<usize>), String> {
    let Some((prefix, rest)) = file.split_first_chunk::<PREFIX>() else {
        return Err(format!("{} bytes are no safetensors file", file.len()));
    };
    let len = u64::from_le_bytes(*prefix);
    if rest.first() != Some(&b'{') || len > LONGEST as u64 {
        return Err("this is not a safetensors file".to_owned());
    }
    let json = usize::try_from(len).ok().and_then(|len| rest.get(..len)).ok_or_else(|| {
        format!(
            "the file is cut short: its header has {len} bytes, of which {} are here",
            rest.len()
        )
    })?;
    let metadata: Metadata = serde_json::from_slice(json)
        .map_err(|error| format!("the safetensors header is damaged: {error}"))?;
    let data = PREFIX + json.len()..file.len();
    // The tensors follow each other without holes, which `Metadata` has checked.
    if metadata.data_len() != data.len() {
        return Err(format!(
            "the file is cut short or damaged: its tensors take {} bytes, but it holds {}",
            metadata.data_len(),
            data.len()
        ));
    }
    Ok((metadata, data))
}
