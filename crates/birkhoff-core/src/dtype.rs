//! The element types of checkpoints, and how their floats are read as f32.

use half::{bf16, f16};

use crate::codec::encode::Distortion;
use crate::error::{Error, Result};

/// Element type of a tensor that can be encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE double.
    F64,
    /// IEEE single.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    BF16,
}

impl Dtype {
    /// Every float dtype.
    pub const ALL: [Dtype; 4] = [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::BF16];

    /// The name that safetensors uses.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::F64 => "F64",
            Dtype::F32 => "F32",
            Dtype::F16 => "F16",
            Dtype::BF16 => "BF16",
        }
    }

    /// The dtype that safetensors calls `name`.
    ///
    /// # Errors
    /// [`Error::Dtype`] if `name` is no float of 16, 32 or 64 bits.
    pub fn from_name(name: &str) -> Result<Dtype> {
        Dtype::ALL
            .into_iter()
            .find(|dtype| dtype.name() == name)
            .ok_or_else(|| Error::Dtype(name.to_owned()))
    }

    /// Bytes an element.
    pub fn size(self) -> usize {
        match self {
            Dtype::F64 => 8,
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::BF16 => 2,
        }
    }
}

/// Little-endian floats of any dtype and alignment, read as f32.
#[derive(Clone, Copy, Debug)]
pub struct FloatSlice<'a> {
    bytes: &'a [u8],
    dtype: Dtype,
}

impl<'a> FloatSlice<'a> {
    /// Wraps `bytes`.
    ///
    /// # Errors
    /// [`Error::Shape`] if their number is no multiple of the element size.
    pub fn new(bytes: &'a [u8], dtype: Dtype) -> Result<Self> {
        if !bytes.len().is_multiple_of(dtype.size()) {
            return Err(Error::Shape(format!(
                "{} bytes are no whole number of {} elements",
                bytes.len(),
                dtype.name()
            )));
        }
        Ok(FloatSlice { bytes, dtype })
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.bytes.len() / self.dtype.size()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Writes elements `start..start + out.len()` to `out` as f32.
    ///
    /// # Panics
    /// If the range is out of bounds.
    #[inline(always)]
    pub fn read(&self, start: usize, out: &mut [f32]) {
        let size = self.dtype.size();
        let bytes = &self.bytes[start * size..(start + out.len()) * size];
        #[inline(always)]
        fn convert<const N: usize>(bytes: &[u8], out: &mut [f32], f: impl Fn([u8; N]) -> f32) {
            let (elements, rest) = bytes.as_chunks::<N>();
            debug_assert!(rest.is_empty());
            for (out, element) in out.iter_mut().zip(elements) {
                *out = f(*element);
            }
        }
        match self.dtype {
            Dtype::F64 => convert(bytes, out, |b| f64::from_le_bytes(b) as f32),
            Dtype::F32 => convert(bytes, out, f32::from_le_bytes),
            Dtype::F16 => convert(bytes, out, |b| f16::from_le_bytes(b).to_f32()),
            Dtype::BF16 => convert(bytes, out, |b| bf16::from_le_bytes(b).to_f32()),
        }
    }

    /// The elements, exactly.
    pub fn values(self) -> impl Iterator<Item = f64> {
        let size = self.dtype.size();
        self.bytes.chunks_exact(size).map(move |b| match self.dtype {
            Dtype::F64 => f64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]),
            Dtype::F32 => f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
            Dtype::F16 => f16::from_le_bytes([b[0], b[1]]).to_f64(),
            Dtype::BF16 => bf16::from_le_bytes([b[0], b[1]]).to_f64(),
        })
    }

    /// The elements as little-endian floats of another dtype, rounded to f32 first.
    pub fn to_dtype(self, dtype: Dtype) -> Vec<u8> {
        const CHUNK: usize = 1024;
        let mut out = Vec::with_capacity(self.len() * dtype.size());
        let mut values = [0.0; CHUNK];
        for start in (0..self.len()).step_by(CHUNK) {
            let values = &mut values[..CHUNK.min(self.len() - start)];
            self.read(start, values);
            match dtype {
                Dtype::F64 => out.extend(values.iter().flat_map(|&v| f64::from(v).to_le_bytes())),
                Dtype::F32 => out.extend(values.iter().flat_map(|v| v.to_le_bytes())),
                Dtype::F16 => {
                    out.extend(values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()));
                }
                Dtype::BF16 => {
                    out.extend(values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()));
                }
            }
        }
        out
    }

    /// How far `other` is from these elements, of which it has as many. A value that has become NaN
    /// or stopped being NaN is infinitely far.
    pub fn distortion(self, other: FloatSlice<'_>) -> Distortion {
        let mut distortion = Distortion::default();
        for (value, other) in self.values().zip(other.values()) {
            let error = if value == other || value.is_nan() && other.is_nan() {
                0.0
            } else if value.is_nan() || other.is_nan() {
                f64::INFINITY
            } else {
                (value - other).abs()
            };
            distortion.add(&Distortion {
                signal: if value.is_finite() { value * value } else { 0.0 },
                noise: error * error,
                max_error: error,
            });
        }
        distortion
    }
}

impl<'a> From<&'a [f32]> for FloatSlice<'a> {
    fn from(values: &'a [f32]) -> Self {
        const { assert!(cfg!(target_endian = "little")) };
        // SAFETY: any initialised f32 slice is readable as bytes of the same length and lifetime.
        let bytes = unsafe {
            std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), std::mem::size_of_val(values))
        };
        FloatSlice { bytes, dtype: Dtype::F32 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_dtype_reads_as_f32() {
        let values = [0.0f32, -1.5, 0.25, 96.0];
        for dtype in Dtype::ALL {
            let bytes: Vec<u8> = values
                .iter()
                .flat_map(|&v| match dtype {
                    Dtype::F64 => f64::from(v).to_le_bytes().to_vec(),
                    Dtype::F32 => v.to_le_bytes().to_vec(),
                    Dtype::F16 => f16::from_f32(v).to_le_bytes().to_vec(),
                    Dtype::BF16 => bf16::from_f32(v).to_le_bytes().to_vec(),
                })
                .collect();
            let mut out = [0.0; 3];
            FloatSlice::new(&bytes, dtype).unwrap().read(1, &mut out);
            assert_eq!(out, values[1..]);
        }
    }
}
