//! The winding line, `theta -> (theta, g theta) mod 2^(2b)`: two weights of `b` bits a theta.
//!
//! This is the trajectory of "Compress Any Segment Anything Model" (arXiv 2507.08765, section 3)
//! with integer steps; the curve and the scales are those of [`super::shift`].

use std::sync::OnceLock;

use super::Tap;
use super::curve::CURVE;

/// The generators g for b = 4, 5, 6.
pub const GENERATORS: [u16; 3] = [157, 741, 1701];

/// The generator at `bits` a weight.
pub const fn generator(bits: u32) -> u16 {
    GENERATORS[bits as usize - 4]
}

/// How weight `index` of a block of a stream is read.
pub(super) const fn tap(bits: u32, index: u32) -> Tap {
    let coordinate = if index.is_multiple_of(2) { 1 } else { generator(bits) };
    Tap { end: (index / 2 + 1) * 2 * bits, multiplier: coordinate << (16 - 2 * bits) }
}

/// The code bits of each weight: of every two weights, the theta whose point lies nearest.
///
/// `targets` are weights in units of the curve; both slices have the same even length. The two
/// halves of theta are the codes of the pair, the high one first.
pub(super) fn nearest(bits: u32, targets: &[f32], codes: &mut [u8]) {
    let grid = Grid::of(bits);
    let pairs = targets.as_chunks::<2>().0.iter().zip(codes.as_chunks_mut::<2>().0);
    for (targets, codes) in pairs {
        let theta = grid.nearest(targets.map(fixed_point));
        *codes = [(theta >> bits) as u8, (theta & ((1 << bits) - 1)) as u8];
    }
}

/// Fixed-point steps a unit of the curve.
const STEPS: i32 = 16;
/// Cells along each axis of the grid, and their size in steps.
const CELLS: i32 = 64;
const CELL: i32 = 4 * STEPS;

/// A target in fixed point, within the square that the grid covers.
fn fixed_point(target: f32) -> i32 {
    let largest = (CELLS * CELL / 2 - 1) as f32;
    (target * STEPS as f32).clamp(-largest, largest).round_ties_even() as i32
}

/// The points of the trajectory, and for each cell of the square those that are nearest to some
/// place in it.
struct Grid {
    points: Vec<[i32; 2]>,
    /// Where each cell's points start in `thetas`; one more at the end.
    starts: Vec<u32>,
    thetas: Vec<u16>,
}

impl Grid {
    fn of(bits: u32) -> &'static Grid {
        static GRIDS: [OnceLock<Grid>; 3] = [const { OnceLock::new() }; 3];
        GRIDS[bits as usize - 4].get_or_init(|| Grid::new(bits))
    }

    fn new(bits: u32) -> Grid {
        let size = 1u32 << (2 * bits);
        let place = |theta: u32| ((theta & (size - 1)) >> (2 * bits - 8)) as usize;
        let value = |theta: u32| i32::from(CURVE[place(theta)]) * STEPS;
        let points: Vec<[i32; 2]> = (0..size)
            .map(|theta| [value(theta), value(theta.wrapping_mul(u32::from(generator(bits))))])
            .collect();
        let (mut starts, mut thetas) = (vec![0], Vec::new());
        for x in 0..CELLS {
            for y in 0..CELLS {
                let centre = [x, y].map(|i| (i - CELLS / 2) * CELL + CELL / 2);
                // Squared distance to the nearest and the farthest place of the cell.
                let distances = points.iter().map(|point| {
                    let d = [0, 1].map(|axis| (point[axis] - centre[axis]).abs());
                    let near = d.map(|d| (d - CELL / 2).max(0));
                    let far = d.map(|d| d + CELL / 2);
                    (near[0].pow(2) + near[1].pow(2), far[0].pow(2) + far[1].pow(2))
                });
                let reach = distances.clone().map(|(_, far)| far).min().expect("there are points");
                let near = distances.enumerate().filter(|(_, (near, _))| *near <= reach);
                thetas.extend(near.map(|(theta, _)| theta as u16));
                starts.push(thetas.len() as u32);
            }
        }
        Grid { points, starts, thetas }
    }

    /// The theta of the nearest point; of several, the smallest.
    fn nearest(&self, target: [i32; 2]) -> u16 {
        let [x, y] = target.map(|t| (t + CELLS / 2 * CELL) / CELL);
        let cell = (x * CELLS + y) as usize;
        let thetas = &self.thetas[self.starts[cell] as usize..self.starts[cell + 1] as usize];
        let distance = |theta: u16| {
            let point = self.points[usize::from(theta)];
            (point[0] - target[0]).pow(2) + (point[1] - target[1]).pow(2)
        };
        thetas.iter().copied().min_by_key(|&theta| distance(theta)).expect("no cell is empty")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_grid_finds_the_nearest_point() {
        for bits in 4..=6 {
            let grid = Grid::of(bits);
            for i in 0..500 {
                let target = [i * 7919 % 4095 - 2047, i * 104_729 % 4095 - 2047];
                let distance = |p: &[i32; 2]| (p[0] - target[0]).pow(2) + (p[1] - target[1]).pow(2);
                let best = grid.points.iter().map(distance).min().unwrap();
                let found = &grid.points[usize::from(grid.nearest(target))];
                assert_eq!(distance(found), best, "{bits} bits, {target:?}");
            }
        }
    }
}
