//! What attention asks of an instruction set.

use super::schedule::{Call, Task, Workspace};
use crate::floats::Floats;

/// Tiles of an instruction set, and its vectors: a float of each for one of 16 queries.
pub(super) trait Kernel: Sized + 'static {
    /// 16 values of f32.
    type Float: Floats;

    /// Rows (keys, channels) of a tile of sums that stay in registers.
    const ROWS: usize;
    /// Most vectors of a tile, 1 to 3.
    const VECTORS: usize;

    /// [`super::tile::attend`] with the instruction set enabled.
    ///
    /// # Safety
    /// See [`super::tile::attend`].
    unsafe fn run_attend(call: &Call<'_>, task: &Task, workspace: &Workspace);
}
