//! Cuts attention into tasks, hands them to threads, and lends each its memory.
//!
//! A task is a range of the queries of a window and head (a *chunk*), with all keys. It copies the keys
//! and values that it reads, block by block, so that chunks must be large enough to make that cheap;
//! tasks share nothing else.

use std::cell::Cell;
use std::marker::PhantomData;

use super::kernel::Kernel;
use super::operand::Windows;
use super::{AttentionOptions, Operands};
use crate::dtype::Dtype;
use crate::floats::LANES;
use crate::linear::FloatsMut;
use crate::scratch::Scratch;
use crate::threads::team;

/// Keys of a block. The sums of outputs depend on it, in their last bits.
pub(super) const KEYS: usize = 64;
/// Most floats that a chunk keeps (queries, outputs and biases): they stay in the cache of second
/// level, unless a vector of queries takes more.
const CHUNK_FLOATS: usize = 96 << 10;
/// Tasks for each thread, so that a thread that is held up leaves its share to others.
const TASKS_PER_THREAD: usize = 4;
/// Fewest vectors of queries of a chunk that is made smaller to have more tasks.
const MIN_CHUNK_VECTORS: usize = 6;
/// Fewest multiplications that are worth waking other threads for: some 10 microseconds.
const MIN_PARALLEL_WORK: usize = 500_000;

/// Attention of all queries, as tasks see it.
pub(super) struct Call<'a> {
    pub(super) operands: &'a Operands<'a>,
    pub(super) windows: Windows,
    /// What products of queries and keys are multiplied with: scores are exponents of 2.
    pub(super) scale: f32,
    /// Tables of relative positions for rows and columns, if there are any.
    pub(super) tables: Option<[Table; 2]>,
    pub(super) head_dim: usize,
    /// Channels of a head, and more up to a whole number of tiles.
    pub(super) padded_dim: usize,
    pub(super) target: Target<'a>,
}

/// A table of relative positions, for exponents of 2 and with rows of zeros for a whole tile behind.
pub(super) struct Table(Vec<f32>);

impl Table {
    fn new(table: &[f32], padding: usize) -> Table {
        let scaled = table.iter().map(|value| value * std::f32::consts::LOG2_E);
        Table(scaled.chain(std::iter::repeat_n(0.0, padding)).collect())
    }

    /// Where a row lies.
    #[inline(always)]
    pub(super) fn row(&self, row: usize, head_dim: usize) -> *const f32 {
        self.0[row * head_dim..].as_ptr()
    }
}

/// The output as a raw pointer.
pub(super) struct Target<'a> {
    start: *mut u8,
    pub(super) dtype: Dtype,
    output: PhantomData<&'a mut [u8]>,
}

// SAFETY: a target is only written through, and tasks write disjoint elements.
unsafe impl Sync for Target<'_> {}

impl Target<'_> {
    fn new(out: FloatsMut<'_>) -> Target<'_> {
        let (start, dtype): (*mut u8, _) = match out {
            FloatsMut::F32(out) => (out.as_mut_ptr().cast(), Dtype::F32),
            FloatsMut::F16(out) => (out.as_mut_ptr().cast(), Dtype::F16),
            FloatsMut::BF16(out) => (out.as_mut_ptr().cast(), Dtype::BF16),
        };
        Target { start, dtype, output: PhantomData }
    }

    /// Where an element lies.
    #[inline(always)]
    pub(super) fn at(&self, index: usize) -> *mut u8 {
        self.start.wrapping_add(index * self.dtype.size())
    }
}

/// Queries of a window, for a head.
pub(super) struct Task {
    pub(super) window: usize,
    pub(super) head: usize,
    /// The first of them.
    pub(super) first: usize,
    /// How many they are.
    pub(super) queries: usize,
}

/// Memory of a thread. A tile has `lanes` queries, a whole number of vectors, and what it keeps lies
/// as `[row][lane]`, tile after tile.
pub(super) struct Workspace {
    /// `[tile][head_dim][lane]`
    pub(super) queries: *mut f32,
    /// Weighted sums of values, `[tile][padded_dim][lane]`.
    pub(super) outputs: *mut f32,
    /// Bias by row of the key, `[tile][height][lane]`.
    pub(super) bias_height: *mut f32,
    /// Bias by column of the key, `[tile][width][lane]`.
    pub(super) bias_width: *mut f32,
    /// Largest scores, `[tile][lane]`.
    pub(super) largest: *mut f32,
    /// Sums of exponentials, `[tile][lane]`.
    pub(super) sums: *mut f32,
    /// The keys of the block, times the scale: `[key][head_dim]`, and a tile of zeros behind.
    pub(super) keys: *mut f32,
    /// The values of the block, `[key][padded_dim]`.
    pub(super) values: *mut f32,
    /// Scores of the block, and then their exponentials: `[key][lane]` for a tile.
    pub(super) scores: *mut f32,
    /// Products with a table, `[row][lane]` for a tile.
    pub(super) products: *mut f32,
    /// Row and column of the keys of the block, with a tile of zeros behind.
    pub(super) places: *mut [u32; 2],
    /// Channels of a token.
    pub(super) channels: *mut f32,
}

thread_local! {
    static WORKSPACE: Cell<Scratch> = const { Cell::new(Scratch::new()) };
}

/// Attention of all queries; shapes are checked and there is at least one query.
pub(super) fn run<K: Kernel>(
    operands: &Operands<'_>,
    out: FloatsMut<'_>,
    options: &AttentionOptions,
) {
    let shape = operands.queries.shape();
    let windows = Windows::new(operands);
    let head_dim = shape.head_dim;
    let tables = operands.relative_position.as_ref().map(|tables| {
        [tables.height, tables.width].map(|table| Table::new(table, K::ROWS * head_dim))
    });
    let call = Call {
        operands,
        windows,
        scale: options.scale * std::f32::consts::LOG2_E,
        tables,
        head_dim,
        padded_dim: head_dim.next_multiple_of(K::ROWS),
        target: Target::new(out),
    };

    let [height, width] = if call.tables.is_some() { windows.keys.window } else { [0, 0] };
    let lane_floats = head_dim + call.padded_dim + height + width + 2;
    let (queries, keys) = (windows.queries.len(), windows.keys.len());
    let vectors = queries.div_ceil(LANES);
    let sets = windows.len() * shape.heads;
    let work = sets.saturating_mul(queries).saturating_mul(2 * keys).saturating_mul(head_dim);
    let threads = if work < MIN_PARALLEL_WORK { 1 } else { options.threads.max(1) };
    let largest_chunk = (CHUNK_FLOATS / (lane_floats * LANES)).max(1);
    let wanted = if threads == 1 { 1 } else { (TASKS_PER_THREAD * threads).div_ceil(sets) };
    let chunks = wanted.min(vectors / MIN_CHUNK_VECTORS).max(vectors.div_ceil(largest_chunk));
    let most_lanes = vectors.div_ceil(chunks) * LANES;

    team::for_each(threads, sets * chunks, &|task| {
        let (set, chunk) = (task / chunks, task % chunks);
        let first = chunk * vectors / chunks * LANES;
        let end = ((chunk + 1) * vectors / chunks * LANES).min(queries);
        let task = Task {
            window: set / shape.heads,
            head: set % shape.heads,
            first,
            queries: end - first,
        };
        let mut scratch = Scratch::take(&WORKSPACE);
        let tile_lanes = K::VECTORS * LANES;
        let parts = scratch.split(
            [
                most_lanes * head_dim,
                most_lanes * call.padded_dim,
                most_lanes * height,
                most_lanes * width,
                most_lanes,
                most_lanes,
                (KEYS + K::ROWS) * head_dim,
                KEYS * call.padded_dim,
                (KEYS + K::ROWS) * tile_lanes,
                (2 * height.max(width) + K::ROWS) * tile_lanes,
                (KEYS + K::ROWS) * 2,
                head_dim,
            ]
            .map(|floats| floats * size_of::<f32>()),
        );
        let [
            queries,
            outputs,
            bias_height,
            bias_width,
            largest,
            sums,
            keys,
            values,
            scores,
            products,
            places,
            channels,
        ] = parts.map(|part| part.cast::<f32>());
        let workspace = Workspace {
            queries,
            outputs,
            bias_height,
            bias_width,
            largest,
            sums,
            keys,
            values,
            scores,
            products,
            places: places.cast(),
            channels,
        };
        // SAFETY: the instruction set is available (`attention` has checked), the task is in range,
        // no other task has these queries, and the workspace has room for its chunk.
        unsafe { K::run_attend(&call, &task, &workspace) }
        scratch.give_back(&WORKSPACE);
    });
}
