//! Memory that a thread keeps from call to call.

use std::cell::Cell;
use std::mem::MaybeUninit;

/// Most bytes of a buffer that a thread keeps for its next call.
pub(crate) const KEPT_BYTES: usize = 32 << 20;

/// A cache line.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line(#[allow(dead_code)] [u8; 64]);

/// Uninitialised memory that a thread keeps from call to call.
#[derive(Default)]
pub(crate) struct Scratch(Vec<MaybeUninit<Line>>);

impl Scratch {
    /// No memory yet.
    pub(crate) const fn new() -> Scratch {
        Scratch(Vec::new())
    }

    /// Takes the thread's buffer. (A call within a call would find none and make its own.)
    pub(crate) fn take(from: &'static std::thread::LocalKey<Cell<Scratch>>) -> Scratch {
        from.take()
    }

    /// Room for parts of so many bytes, each on a cache line of its own.
    pub(crate) fn split<const N: usize>(&mut self, bytes: [usize; N]) -> [*mut u8; N] {
        let lines = bytes.map(|bytes| bytes.div_ceil(size_of::<Line>()));
        let total = lines.iter().sum();
        if self.0.capacity() < total {
            // Nothing in the old buffer is worth copying.
            self.0 = Vec::with_capacity(total);
        }
        let mut next = self.0.as_mut_ptr();
        lines.map(|lines| {
            let part = next;
            next = next.wrapping_add(lines);
            part.cast()
        })
    }

    /// Keeps the buffer for the thread's next call, unless it is very large.
    pub(crate) fn give_back(self, to: &'static std::thread::LocalKey<Cell<Scratch>>) {
        if self.0.capacity() * size_of::<Line>() <= KEPT_BYTES {
            to.set(self);
        }
    }
}
