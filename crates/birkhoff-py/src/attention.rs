//! Attention on memory that torch owns.

use birkhoff_core::Dtype;
use birkhoff_core::attention::{
    AttentionOptions, Heads, Operands, RelativePosition, Shape, Window, attention as attend,
};
use birkhoff_core::isa::Isa;
use birkhoff_core::linear::{Floats, FloatsMut};
use half::{bf16, f16};
use pyo3::prelude::*;

use crate::errors::{Failure, Result};
use crate::memory::{slice, slice_mut};

/// Address, shape `(batch, height, width, heads, head_dim)`, and strides of all but the channels.
type Tensor = (usize, [usize; 5], [usize; 4]);

/// A tensor in memory.
///
/// # Safety
/// It must be there, of that dtype, for the lifetime.
unsafe fn heads<'a>(dtype: Dtype, (address, sizes, strides): Tensor) -> Result<Heads<'a>> {
    let [batch, height, width, heads, head_dim] = sizes;
    let shape = Shape { batch, height, width, heads, head_dim };
    let len = if shape.is_empty() {
        0
    } else {
        sizes.iter().zip(&strides).map(|(size, stride)| (size - 1) * stride).sum::<usize>()
            + head_dim
    };
    // SAFETY: the caller says that the tensor is there, which ends with its last channel.
    let elements = unsafe {
        match dtype {
            Dtype::F32 => Floats::F32(slice(address as *const f32, len)),
            Dtype::F16 => Floats::F16(slice(address as *const f16, len)),
            Dtype::BF16 => Floats::BF16(slice(address as *const bf16, len)),
            Dtype::F64 => return Err(Failure::value("q must not be float64; convert it first")),
        }
    };
    Ok(Heads::new(elements, shape, strides)?)
}

#[pyfunction]
#[pyo3(signature = (queries, keys, values, dtype, out, scale, relative_position, window, threads))]
#[expect(clippy::too_many_arguments, reason = "addresses and shapes, called from one place")]
pub(crate) fn attention(
    py: Python<'_>,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    dtype: &str,
    out: usize,
    scale: f32,
    relative_position: Option<[(usize, usize); 2]>,
    window: Option<(usize, [(usize, usize); 2])>,
    threads: usize,
) -> Result<()> {
    let options = AttentionOptions { scale, isa: Isa::current()?, threads };
    let dtype = Dtype::from_name(dtype)?;
    let out_len = queries.1.iter().product();
    py.detach(|| {
        // SAFETY: `birkhoff.attention`, the one caller, passes the addresses of live CPU tensors: queries,
        // keys and values of `dtype` with their shapes and strides; `out` contiguous, fresh, of the
        // shape of the queries and of `dtype`; tables and paddings contiguous, f32 and of the
        // lengths that stand beside them.
        let (operands, out) = unsafe {
            let floats = |(address, len): (usize, usize)| slice(address as *const f32, len);
            let operands = Operands {
                queries: heads(dtype, queries)?,
                keys: heads(dtype, keys)?,
                values: heads(dtype, values)?,
                relative_position: relative_position.map(|[height, width]| RelativePosition {
                    height: floats(height),
                    width: floats(width),
                }),
                window: window.map(|(size, [key, value])| Window {
                    size,
                    padding_key: floats(key),
                    padding_value: floats(value),
                }),
            };
            let out = match dtype {
                Dtype::F16 => FloatsMut::F16(slice_mut(out as *mut f16, out_len)),
                Dtype::BF16 => FloatsMut::BF16(slice_mut(out as *mut bf16, out_len)),
                _ => FloatsMut::F32(slice_mut(out as *mut f32, out_len)),
            };
            (operands, out)
        };
        Ok(attend(&operands, out, &options)?)
    })
}
