//! The textbook search: every state at every weight, in floating point.
//!
//! Far too slow for models; it says how good the fast search can be, and tests hold it to that.

use super::generator;
use crate::codec::curve::CURVE;

/// The fresh bits of each weight, along the open path (free start and end) of least squared error.
///
/// `targets` are weights in units of the curve. Returns the bits and the squared error.
pub fn best_path(bits: u32, targets: &[f32]) -> (Vec<u8>, f64) {
    let window = bits + 8;
    let states = 1usize << window;
    let branches = 1usize << bits;
    let g = usize::from(generator(bits));
    let value = |theta: usize| f32::from(CURVE[((theta * g) & (states - 1)) >> bits]);

    // cost[theta]: least error of a path that ends at theta.
    let mut cost = vec![0.0f32; states];
    let mut decisions = Vec::with_capacity(targets.len());
    for &target in targets {
        // States with the same low 8 bits have the same successors.
        let decision: Vec<usize> = (0..256)
            .map(|class| {
                let of_class = (0..branches).map(|high| high << 8 | class);
                of_class.min_by(|&a, &b| cost[a].total_cmp(&cost[b])).expect("there are branches")
            })
            .collect();
        let least = cost.iter().copied().fold(f32::INFINITY, f32::min);
        cost = (0..states)
            .map(|theta| {
                let error = target - value(theta);
                cost[decision[theta >> bits]] - least + error * error
            })
            .collect();
        decisions.push(decision);
    }

    let end = (0..states).min_by(|&a, &b| cost[a].total_cmp(&cost[b])).expect("there are states");
    let (mut theta, mut error) = (end, 0.0);
    let mut path = vec![0; targets.len()];
    for (i, decision) in decisions.iter().enumerate().rev() {
        path[i] = (theta & (branches - 1)) as u8;
        error += f64::from(targets[i] - value(theta)).powi(2);
        theta = decision[theta >> bits];
    }
    (path, error)
}
