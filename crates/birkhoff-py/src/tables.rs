//! The tables that other decoders than the CPU's are made from.

use birkhoff_core::Codec;
use birkhoff_core::codec::curve::CURVE;
use birkhoff_core::codec::scale::GROUP_SCALE;
use birkhoff_core::layout::STREAM;
use pyo3::prelude::*;

use crate::errors::Result;

#[pyfunction]
pub(crate) fn curve() -> Vec<i8> {
    CURVE.to_vec()
}

#[pyfunction]
pub(crate) fn group_scales() -> Vec<f32> {
    GROUP_SCALE.to_vec()
}

#[pyfunction]
pub(crate) fn taps(codec: &str, bits: u32) -> Result<Vec<(u32, u16)>> {
    let trajectory = Codec::from_name(codec)?.trajectory(bits)?;
    let taps = (0..STREAM as u32).filter_map(|weight| trajectory.tap(weight));
    Ok(taps.map(|tap| (tap.end, tap.multiplier)).collect())
}
