//! The online softmax of a chunk of queries.
//!
//! Queries lie in the lanes of vectors: a *tile* has one to three vectors of them. Everything that is
//! done to the scores of a query is then done to whole vectors, and keys, values and tables are read as
//! they are, one float at a time for all queries. For each block of keys and each tile of queries:
//!
//! ```text
//! s[key]     = (bias_height[row of key] + bias_width[column of key]) + sum over c: k[key][c] q[c]
//! largest'   = max(largest, s[key] for each key)
//! p[key]     = 2^(s[key] - largest')
//! fade       = 2^(largest - largest')
//! sum        = fma(sum, fade, sum over keys: p[key])
//! output[c]  = fma(output[c], fade, sum over keys: v[key][c] p[key])
//! ```
//!
//! Keys are multiplied with `scale log2(e)`, and tables with `log2(e)`. Sums are of fused
//! multiply-adds in the order of channels or keys.

use super::kernel::Kernel;
use super::schedule::{Call, KEYS, Task, Workspace};
use crate::floats::{Floats, LANES};
use crate::linear::write;

/// Coefficients of `2^f = 1 + f (...)` for f in [-1/2, 1/2], highest power first: relative error 2e-9.
const EXP2: [f32; 6] =
    [1.535_336_2e-4, 1.339_887_5e-3, 9.618_437e-3, 5.550_332_4e-2, 2.402_264_8e-1, 6.931_472e-1];

/// Most lanes of a tile: what [`Kernel::VECTORS`] may be at most.
const MOST_LANES: usize = 3 * LANES;

/// Queries of a chunk that are computed together.
#[derive(Clone, Copy)]
struct Tile {
    /// First lane among those of the chunk.
    first: usize,
    lanes: usize,
}

/// The tiles of so many vectors, of nearly equal size: small ones are less efficient.
fn tiles(vectors: usize, most: usize) -> impl Iterator<Item = Tile> {
    let tiles = vectors.div_ceil(most);
    (0..tiles).map(move |tile| {
        let (first, end) = (tile * vectors / tiles, (tile + 1) * vectors / tiles);
        Tile { first: first * LANES, lanes: (end - first) * LANES }
    })
}

/// Attention of the queries of a task.
///
/// # Safety
/// The CPU must have the instruction set of `K`, whose [`Kernel::ROWS`] is `ROWS`; the task must be in
/// range and no one else may write its outputs; the workspace must have room for its queries.
#[inline(always)]
pub(super) unsafe fn attend<K: Kernel, const ROWS: usize>(
    call: &Call<'_>,
    task: &Task,
    workspace: &Workspace,
) {
    let vectors = task.queries.div_ceil(LANES);
    // SAFETY: the caller upholds all that is needed; tiles are within the chunk.
    unsafe {
        workspace.channels.write_bytes(0, call.head_dim);
        macro_rules! for_lanes {
            ($function:ident, $tile:expr, $($argument:expr),*) => {
                match $tile.lanes / LANES {
                    1 => $function::<K, ROWS, 1>($tile, $($argument),*),
                    2 => $function::<K, ROWS, 2>($tile, $($argument),*),
                    _ => $function::<K, ROWS, 3>($tile, $($argument),*),
                }
            };
        }
        for tile in tiles(vectors, K::VECTORS) {
            for_lanes!(start, tile, call, task, workspace);
        }
        let keys = call.windows.keys.len();
        for first in (0..keys).step_by(KEYS) {
            let len = KEYS.min(keys - first);
            copy_block::<ROWS>(call, task, workspace, first, len);
            for tile in tiles(vectors, K::VECTORS) {
                for_lanes!(block, tile, call, workspace, len);
            }
        }
        for tile in tiles(vectors, K::VECTORS) {
            for_lanes!(finish, tile, call, task, workspace);
        }
    }
}

/// `sums[row][lane] += sum over i: a[row][i] b[i][lane]`, in the order of i. Elements of `a` lie
/// `row_stride` and `step` apart.
///
/// # Safety
/// As for [`attend`]; `a` and `b` must be readable.
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "one index runs through several arrays")]
unsafe fn multiply<K: Kernel, const ROWS: usize, const VECTORS: usize>(
    mut sums: [[K::Float; VECTORS]; ROWS],
    a: *const f32,
    (row_stride, step): (usize, usize),
    b: *const f32,
    len: usize,
) -> [[K::Float; VECTORS]; ROWS] {
    // SAFETY: the caller says that all this is readable.
    unsafe {
        for i in 0..len {
            let b: [K::Float; VECTORS] =
                std::array::from_fn(|v| K::Float::load(b.add((i * VECTORS + v) * LANES)));
            for row in 0..ROWS {
                let a = K::Float::splat(*a.add(row * row_stride + i * step));
                for v in 0..VECTORS {
                    sums[row][v] = K::Float::mul_add(a, b[v], sums[row][v]);
                }
            }
        }
        sums
    }
}

/// `2^x` for x <= 0, with an error below one unit in the last place; 0 below 2^-126.5.
///
/// # Safety
/// As for [`attend`].
#[inline(always)]
unsafe fn exp2<K: Kernel>(x: K::Float) -> K::Float {
    // SAFETY: the caller says that the CPU has the instruction set.
    unsafe {
        let whole = K::Float::round(x);
        let fraction = K::Float::sub(x, whole);
        let mut power = K::Float::splat(EXP2[0]);
        for coefficient in &EXP2[1..] {
            power = K::Float::mul_add(power, fraction, K::Float::splat(*coefficient));
        }
        power = K::Float::mul_add(power, fraction, K::Float::splat(1.0));
        K::Float::scale_by_exp2(power, whole)
    }
}

/// Reads the queries of a tile, computes their biases and clears what is summed up.
///
/// # Safety
/// As for [`attend`].
#[inline(always)]
unsafe fn start<K: Kernel, const ROWS: usize, const VECTORS: usize>(
    tile: Tile,
    call: &Call<'_>,
    task: &Task,
    workspace: &Workspace,
) {
    let lanes = VECTORS * LANES;
    // SAFETY: the caller says that the workspace has room.
    unsafe {
        let queries = workspace.queries.add(tile.first * call.head_dim);
        let scratch = std::slice::from_raw_parts_mut(workspace.channels, call.head_dim);
        for lane in 0..lanes {
            let query = task.first + tile.first + lane;
            let place = (tile.first + lane < task.queries)
                .then(|| call.windows.place(&call.windows.queries, task.window, query))
                .flatten();
            let Some(place) = place else {
                for c in 0..call.head_dim {
                    *queries.add(c * lanes + lane) = 0.0;
                }
                continue;
            };
            let channels = call.operands.queries.channels(place, task.head, scratch);
            for (c, channel) in channels.iter().enumerate() {
                *queries.add(c * lanes + lane) = *channel;
            }
        }
        if call.tables.is_some() {
            bias::<K, ROWS, VECTORS>(tile, call, task, workspace);
        }
        for vector in 0..VECTORS {
            // Not infinite, so that differences of two are numbers.
            K::Float::store(
                K::Float::splat(f32::MIN),
                workspace.largest.add(tile.first + vector * LANES),
            );
            K::Float::store(K::Float::splat(0.0), workspace.sums.add(tile.first + vector * LANES));
        }
        let outputs = workspace.outputs.add(tile.first * call.padded_dim);
        for vector in 0..call.padded_dim * VECTORS {
            K::Float::store(K::Float::splat(0.0), outputs.add(vector * LANES));
        }
    }
}

/// Computes the biases of the queries of a tile, which lie in the workspace.
///
/// # Safety
/// As for [`attend`].
#[inline(always)]
unsafe fn bias<K: Kernel, const ROWS: usize, const VECTORS: usize>(
    tile: Tile,
    call: &Call<'_>,
    task: &Task,
    workspace: &Workspace,
) {
    let Some(tables) = &call.tables else { return };
    let lanes = VECTORS * LANES;
    let width = call.windows.keys.window[1];
    let biases = [workspace.bias_height, workspace.bias_width];
    // SAFETY: the caller says that the workspace has room; rows of the table from `first` to
    // `last` and a tile more are there.
    unsafe {
        let queries = workspace.queries.add(tile.first * call.head_dim);
        for (axis, size) in call.windows.keys.window.into_iter().enumerate() {
            let bias = biases[axis].add(tile.first * size);
            let positions: [usize; MOST_LANES] = std::array::from_fn(|lane| {
                let query = task.first + (tile.first + lane).min(task.queries - 1);
                if axis == 0 { query / width } else { query % width }
            });
            let positions = &positions[..lanes];
            let first = positions.iter().copied().fold(usize::MAX, usize::min);
            let last = positions.iter().copied().fold(0, usize::max) + size - 1;
            for row in (first..=last).step_by(ROWS) {
                let sums = [[K::Float::splat(0.0); VECTORS]; ROWS];
                let rows = tables[axis].row(row, call.head_dim);
                let strides = (call.head_dim, 1);
                let sums =
                    multiply::<K, ROWS, VECTORS>(sums, rows, strides, queries, call.head_dim);
                let products = workspace.products.add((row - first) * lanes);
                store_rows::<K, ROWS, VECTORS>(&sums, products);
            }
            for key in 0..size {
                for (lane, position) in positions.iter().enumerate() {
                    let row = position + size - 1 - key - first;
                    *bias.add(key * lanes + lane) = *workspace.products.add(row * lanes + lane);
                }
            }
        }
    }
}

/// Writes a tile of sums.
///
/// # Safety
/// As for [`attend`]; `to` must be writable.
#[inline(always)]
unsafe fn store_rows<K: Kernel, const ROWS: usize, const VECTORS: usize>(
    rows: &[[K::Float; VECTORS]; ROWS],
    to: *mut f32,
) {
    for (row, vectors) in rows.iter().enumerate() {
        for (v, vector) in vectors.iter().enumerate() {
            // SAFETY: the caller says that it is writable.
            unsafe { K::Float::store(*vector, to.add((row * VECTORS + v) * LANES)) }
        }
    }
}

/// Copies the keys `first..first + len` and their values.
///
/// # Safety
/// As for [`attend`].
#[inline(always)]
unsafe fn copy_block<const ROWS: usize>(
    call: &Call<'_>,
    task: &Task,
    workspace: &Workspace,
    first: usize,
    len: usize,
) {
    let (head_dim, width) = (call.head_dim, call.windows.keys.window[1]);
    let operands = call.operands;
    let padding = |of_tokens: fn(&super::Window<'_>) -> *const f32| match &operands.window {
        Some(window) => of_tokens(window).wrapping_add(task.head * head_dim),
        None => std::ptr::null(),
    };
    let padding_key = padding(|window| window.padding_key.as_ptr());
    let padding_value = padding(|window| window.padding_value.as_ptr());
    // SAFETY: the caller says that the workspace has room; where tokens are beyond the image there are
    // windows, whose paddings hold the channels of all heads.
    unsafe {
        let scratch = std::slice::from_raw_parts_mut(workspace.channels, head_dim);
        for index in 0..len {
            let key = first + index;
            let place = call.windows.place(&call.windows.keys, task.window, key);
            let from = match place {
                Some(place) => operands.keys.channels(place, task.head, scratch),
                None => std::slice::from_raw_parts(padding_key, head_dim),
            };
            let to = workspace.keys.add(index * head_dim);
            for (c, channel) in from.iter().enumerate() {
                *to.add(c) = channel * call.scale;
            }
            let from = match place {
                Some(place) => operands.values.channels(place, task.head, scratch),
                None => std::slice::from_raw_parts(padding_value, head_dim),
            };
            let to = workspace.values.add(index * call.padded_dim);
            std::ptr::copy_nonoverlapping(from.as_ptr(), to, head_dim);
            for c in head_dim..call.padded_dim {
                *to.add(c) = 0.0;
            }
            *workspace.places.add(index) = [(key / width) as u32, (key % width) as u32];
        }
        let end = len.next_multiple_of(ROWS);
        for index in len..end {
            *workspace.places.add(index) = [0, 0];
        }
        for c in len * head_dim..end * head_dim {
            *workspace.keys.add(c) = 0.0;
        }
    }
}

/// Takes a block of keys into the softmax of a tile.
///
/// # Safety
/// As for [`attend`]; the tile must be started and the block copied.
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "one index runs through several arrays")]
unsafe fn block<K: Kernel, const ROWS: usize, const VECTORS: usize>(
    tile: Tile,
    call: &Call<'_>,
    workspace: &Workspace,
    len: usize,
) {
    let lanes = VECTORS * LANES;
    let [height, width] = call.windows.keys.window;
    // SAFETY: the caller says that all this is in the workspace.
    unsafe {
        let zeros = [K::Float::splat(0.0); VECTORS];
        let queries = workspace.queries.add(tile.first * call.head_dim);
        let before: [K::Float; VECTORS] =
            std::array::from_fn(|v| K::Float::load(workspace.largest.add(tile.first + v * LANES)));
        let mut largest = before;
        for first in (0..len).step_by(ROWS) {
            let mut scores = [zeros; ROWS];
            if call.tables.is_some() {
                let bias_height = workspace.bias_height.add(tile.first * height);
                let bias_width = workspace.bias_width.add(tile.first * width);
                for row in 0..ROWS {
                    let [y, x] = *workspace.places.add(first + row);
                    for v in 0..VECTORS {
                        scores[row][v] = K::Float::add(
                            K::Float::load(bias_height.add(y as usize * lanes + v * LANES)),
                            K::Float::load(bias_width.add(x as usize * lanes + v * LANES)),
                        );
                    }
                }
            }
            let keys = workspace.keys.add(first * call.head_dim);
            let strides = (call.head_dim, 1);
            let scores =
                multiply::<K, ROWS, VECTORS>(scores, keys, strides, queries, call.head_dim);
            store_rows::<K, ROWS, VECTORS>(&scores, workspace.scores.add(first * lanes));
            for row in 0..ROWS.min(len - first) {
                for v in 0..VECTORS {
                    largest[v] = K::Float::max(largest[v], scores[row][v]);
                }
            }
        }
        let fade: [K::Float; VECTORS] =
            std::array::from_fn(|v| exp2::<K>(K::Float::sub(before[v], largest[v])));
        let mut sums = zeros;
        for key in 0..len {
            for v in 0..VECTORS {
                let score = workspace.scores.add((key * VECTORS + v) * LANES);
                let power = exp2::<K>(K::Float::sub(K::Float::load(score), largest[v]));
                K::Float::store(power, score);
                sums[v] = K::Float::add(sums[v], power);
            }
        }
        for v in 0..VECTORS {
            K::Float::store(largest[v], workspace.largest.add(tile.first + v * LANES));
            let sum = workspace.sums.add(tile.first + v * LANES);
            K::Float::store(K::Float::mul_add(K::Float::load(sum), fade[v], sums[v]), sum);
        }
        for first in (0..call.padded_dim).step_by(ROWS) {
            let values = workspace.values.add(first);
            let strides = (1, call.padded_dim);
            let sums = [zeros; ROWS];
            let sums = multiply::<K, ROWS, VECTORS>(sums, values, strides, workspace.scores, len);
            let outputs = workspace.outputs.add(tile.first * call.padded_dim + first * lanes);
            for row in 0..ROWS {
                for v in 0..VECTORS {
                    let output = outputs.add((row * VECTORS + v) * LANES);
                    K::Float::store(
                        K::Float::mul_add(K::Float::load(output), fade[v], sums[row][v]),
                        output,
                    );
                }
            }
        }
    }
}

/// Divides by the sums of exponentials, and writes the outputs of the tokens of the image.
///
/// # Safety
/// As for [`attend`].
#[inline(always)]
unsafe fn finish<K: Kernel, const ROWS: usize, const VECTORS: usize>(
    tile: Tile,
    call: &Call<'_>,
    task: &Task,
    workspace: &Workspace,
) {
    let lanes = VECTORS * LANES;
    let shape = call.operands.queries.shape();
    // SAFETY: the caller says that all this is in the workspace, and that no one else writes these
    // outputs; `attention` has checked that the target holds all tokens.
    unsafe {
        let outputs = workspace.outputs.add(tile.first * call.padded_dim);
        for v in 0..VECTORS {
            let sum = K::Float::load(workspace.sums.add(tile.first + v * LANES));
            let inverse = K::Float::div(K::Float::splat(1.0), sum);
            for c in 0..call.head_dim {
                let output = outputs.add((c * VECTORS + v) * LANES);
                K::Float::store(K::Float::mul(K::Float::load(output), inverse), output);
            }
        }
        let channels = std::slice::from_raw_parts_mut(workspace.channels, call.head_dim);
        for lane in 0..lanes.min(task.queries - tile.first) {
            let query = task.first + tile.first + lane;
            let place = call.windows.place(&call.windows.queries, task.window, query);
            let Some((image, y, x)) = place else { continue };
            for (c, channel) in channels.iter_mut().enumerate() {
                *channel = *outputs.add(c * lanes + lane);
            }
            let token = (image * shape.height + y) * shape.width + x;
            let start = (token * shape.heads + task.head) * shape.head_dim;
            write(channels, call.target.dtype, call.target.at(start));
        }
    }
}
