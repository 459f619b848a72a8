//! The tensors of attention, and which tokens a window has.

use half::slice::HalfFloatSliceExt;

use super::Operands;
use crate::error::{Error, Result};
use crate::linear::{Floats, FloatsMut};

/// Sizes of a tensor of attention. A sequence is a grid of height 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Images.
    pub batch: usize,
    /// Rows of the grid of tokens.
    pub height: usize,
    /// Columns of the grid.
    pub width: usize,
    /// Heads, each of which attends for itself.
    pub heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
}

impl Shape {
    /// Whether there is not one element.
    pub fn is_empty(&self) -> bool {
        self.sizes().contains(&0)
    }

    pub(super) fn sizes(&self) -> [usize; 5] {
        [self.batch, self.height, self.width, self.heads, self.head_dim]
    }

    /// Number of elements, if it is a number.
    fn len(&self) -> Option<usize> {
        self.sizes().into_iter().try_fold(1usize, usize::checked_mul)
    }
}

/// A tensor of shape `(batch, height, width, heads, head_dim)` whose channels are contiguous.
#[derive(Clone, Copy, Debug)]
pub struct Heads<'a> {
    elements: Floats<'a>,
    shape: Shape,
    strides: [usize; 4],
}

impl<'a> Heads<'a> {
    /// A tensor whose images, rows, columns and heads lie `strides` elements apart; 0 repeats one.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are too few elements.
    pub fn new(elements: Floats<'a>, shape: Shape, strides: [usize; 4]) -> Result<Self> {
        let needed = if shape.is_empty() {
            Some(0)
        } else {
            shape.sizes().iter().zip(&strides).try_fold(shape.head_dim, |end, (&size, &stride)| {
                (size - 1).checked_mul(stride).and_then(|last| end.checked_add(last))
            })
        };
        let len = len(elements);
        if needed.is_none_or(|needed| needed > len) || shape.len().is_none() {
            return Err(Error::Shape(format!(
                "a tensor of {len} elements is too small for shape {:?} with strides {strides:?}",
                shape.sizes(),
            )));
        }
        Ok(Heads { elements, shape, strides })
    }

    /// Its sizes.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The channels of a token as f32, converted into `scratch` (head_dim long) where they are not.
    #[inline(always)]
    pub(super) fn channels<'s>(
        &'s self,
        (image, y, x): (usize, usize, usize),
        head: usize,
        scratch: &'s mut [f32],
    ) -> &'s [f32] {
        let start = image * self.strides[0]
            + y * self.strides[1]
            + x * self.strides[2]
            + head * self.strides[3];
        let range = start..start + self.shape.head_dim;
        match self.elements {
            Floats::F32(elements) => return &elements[range],
            Floats::F16(elements) => elements[range].convert_to_f32_slice(scratch),
            Floats::BF16(elements) => elements[range].convert_to_f32_slice(scratch),
        }
        scratch
    }
}

fn len(elements: Floats<'_>) -> usize {
    match elements {
        Floats::F32(elements) => elements.len(),
        Floats::F16(elements) => elements.len(),
        Floats::BF16(elements) => elements.len(),
    }
}

/// Tables of the decomposed relative position.
#[derive(Clone, Copy, Debug)]
pub struct RelativePosition<'a> {
    /// `(2 * height - 1, head_dim)` for the height of a window, or of the grid without windows: row
    /// `height - 1 + y - y'` for a query in row `y` and a key in row `y'`.
    pub height: &'a [f32],
    /// As `height`, for columns.
    pub width: &'a [f32],
}

/// Square windows that cut the grid; the last ones may reach beyond it.
#[derive(Clone, Copy, Debug)]
pub struct Window<'a> {
    /// Rows and columns of a window.
    pub size: usize,
    /// The key of tokens beyond the grid, `(heads, head_dim)`.
    pub padding_key: &'a [f32],
    /// The value of tokens beyond the grid, `(heads, head_dim)`.
    pub padding_value: &'a [f32],
}

impl Operands<'_> {
    /// Checks that shapes fit together.
    pub(super) fn check(&self, out: &FloatsMut<'_>) -> Result<()> {
        let (queries, keys, values) =
            (self.queries.shape(), self.keys.shape(), self.values.shape());
        let sizes = [queries.sizes(), keys.sizes(), values.sizes()];
        let refuse = |reason: String| Err(Error::Shape(reason));
        if keys != values {
            return refuse(format!(
                "keys of shape {:?} and values of shape {:?} must have the same shape",
                sizes[1], sizes[2]
            ));
        }
        if (queries.batch, queries.heads, queries.head_dim)
            != (keys.batch, keys.heads, keys.head_dim)
        {
            return refuse(format!(
                "queries of shape {:?} and keys of shape {:?} must have the same batch, heads and \
                 head_dim",
                sizes[0], sizes[1]
            ));
        }
        if keys.height * keys.width == 0 && !queries.is_empty() {
            return refuse(format!("keys of shape {:?} are no keys at all", sizes[1]));
        }
        let bound = self.window.is_some() || self.relative_position.is_some();
        if bound && queries != keys {
            return refuse(format!(
                "windows and relative positions need queries and keys on one grid, not of shapes \
                 {:?} and {:?}",
                sizes[0], sizes[1]
            ));
        }
        if let Some(window) = &self.window {
            let expected = queries.heads * queries.head_dim;
            if window.size == 0 || window.size > 1 << 16 {
                return refuse(format!("a window cannot have {} rows", window.size));
            }
            for (name, padding) in [("key", window.padding_key), ("value", window.padding_value)] {
                if padding.len() != expected {
                    return refuse(format!(
                        "a padding {name} of {} elements must have {expected}, those of a token",
                        padding.len()
                    ));
                }
            }
        }
        if let Some(tables) = &self.relative_position {
            let windows = Windows::new(self);
            let tables = [("height", tables.height), ("width", tables.width)];
            for ((name, table), size) in tables.into_iter().zip(windows.queries.window) {
                let rows = (2 * size).saturating_sub(1);
                if table.len() != rows * queries.head_dim {
                    return refuse(format!(
                        "the table of relative positions for the {name} has {} elements and must \
                         have {rows} x {} for a {name} of {size}",
                        table.len(),
                        queries.head_dim
                    ));
                }
            }
        }
        let len = match out {
            FloatsMut::F32(out) => out.len(),
            FloatsMut::F16(out) => out.len(),
            FloatsMut::BF16(out) => out.len(),
        };
        if Some(len) != queries.len() {
            return refuse(format!(
                "an output of {len} elements does not fit queries of shape {:?}",
                sizes[0]
            ));
        }
        Ok(())
    }
}

/// A token of an image: its image, row and column.
pub(super) type Place = (usize, usize, usize);

/// The grid of the tokens of an image, and of those of a window.
#[derive(Clone, Copy, Debug)]
pub(super) struct Grid {
    image: [usize; 2],
    pub(super) window: [usize; 2],
}

impl Grid {
    /// The grid of a tensor, in one window.
    fn whole(shape: Shape) -> Grid {
        Grid { image: [shape.height, shape.width], window: [shape.height, shape.width] }
    }

    /// Tokens of a window, those beyond the image included.
    pub(super) fn len(&self) -> usize {
        self.window[0] * self.window[1]
    }
}

/// How tokens are cut into sets that attend to each other: windows, or whole images.
#[derive(Clone, Copy, Debug)]
pub(super) struct Windows {
    batch: usize,
    /// Rows and columns of windows in an image.
    count: [usize; 2],
    pub(super) queries: Grid,
    pub(super) keys: Grid,
}

impl Windows {
    pub(super) fn new(operands: &Operands<'_>) -> Windows {
        let shape = operands.queries.shape();
        let (queries, keys) = (Grid::whole(shape), Grid::whole(operands.keys.shape()));
        match operands.window {
            None => Windows { batch: shape.batch, count: [1, 1], queries, keys },
            Some(Window { size, .. }) => Windows {
                batch: shape.batch,
                count: queries.image.map(|len| len.div_ceil(size)),
                queries: Grid { window: [size, size], ..queries },
                keys: Grid { window: [size, size], ..keys },
            },
        }
    }

    /// Windows of all images.
    pub(super) fn len(&self) -> usize {
        self.batch * self.count[0] * self.count[1]
    }

    /// Where a token of a window lies, None beyond the image.
    #[inline(always)]
    pub(super) fn place(&self, grid: &Grid, window: usize, token: usize) -> Option<Place> {
        let [rows, cols] = self.count;
        let (image, window) = (window / (rows * cols), window % (rows * cols));
        let y = window / cols * grid.window[0] + token / grid.window[1];
        let x = window % cols * grid.window[1] + token % grid.window[1];
        (y < grid.image[0] && x < grid.image[1]).then_some((image, y, x))
    }
}
