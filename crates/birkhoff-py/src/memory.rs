//! Memory that another library owns, as slices.

/// A slice, also of no elements at a null pointer.
///
/// # Safety
/// `len` elements can be read at `start` for the lifetime of the slice.
pub(crate) unsafe fn slice<'a, T>(start: *const T, len: usize) -> &'a [T] {
    if len == 0 {
        return &[];
    }
    // SAFETY: the caller says so.
    unsafe { std::slice::from_raw_parts(start, len) }
}

/// As [`slice`], for writing.
///
/// # Safety
/// `len` elements can be read and written at `start`, by nobody else, for the lifetime of the slice.
pub(crate) unsafe fn slice_mut<'a, T>(start: *mut T, len: usize) -> &'a mut [T] {
    if len == 0 {
        return &mut [];
    }
    // SAFETY: the caller says so.
    unsafe { std::slice::from_raw_parts_mut(start, len) }
}
