//! The definition of attention, in f64 and with the scores of a query at once: what the operator is
//! tested against.

use super::Operands;
use super::operand::{Place, Windows};

/// `softmax(scale q k^T + bias) v`, contiguous of the shape of the queries; shapes must fit together.
pub fn attention(operands: &Operands<'_>, scale: f32) -> Vec<f64> {
    let shape = operands.queries.shape();
    let mut out = vec![0.0; shape.sizes().iter().product()];
    if shape.is_empty() {
        return out;
    }
    let windows = Windows::new(operands);
    for window in 0..windows.len() {
        for head in 0..shape.heads {
            for query in 0..windows.queries.len() {
                let Some(place) = windows.place(&windows.queries, window, query) else { continue };
                let (image, y, x) = place;
                let token = (image * shape.height + y) * shape.width + x;
                let start = (token * shape.heads + head) * shape.head_dim;
                let out = &mut out[start..start + shape.head_dim];
                attend(operands, &windows, window, head, (query, place), f64::from(scale), out);
            }
        }
    }
    out
}

/// Attention of one query.
fn attend(
    operands: &Operands<'_>,
    windows: &Windows,
    window: usize,
    head: usize,
    (query, place): (usize, Place),
    scale: f64,
    out: &mut [f64],
) {
    let head_dim = operands.queries.shape().head_dim;
    let q = channels(|scratch| operands.queries.channels(place, head, scratch).to_vec(), head_dim);
    let padding = |of_tokens: &[f32]| -> Vec<f64> {
        of_tokens[head * head_dim..][..head_dim].iter().copied().map(f64::from).collect()
    };
    let keys = 0..windows.keys.len();
    let scores: Vec<f64> = keys
        .clone()
        .map(|key| {
            let k = match windows.place(&windows.keys, window, key) {
                Some(at) => {
                    channels(|scratch| operands.keys.channels(at, head, scratch).to_vec(), head_dim)
                }
                None => padding(operands.window.expect("a window").padding_key),
            };
            scale * dot(&q, &k) + bias(operands, windows, query, key, &q)
        })
        .collect();
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
    let sum: f64 = weights.iter().sum();
    for (key, weight) in keys.zip(weights) {
        let v = match windows.place(&windows.keys, window, key) {
            Some(at) => {
                channels(|scratch| operands.values.channels(at, head, scratch).to_vec(), head_dim)
            }
            None => padding(operands.window.expect("a window").padding_value),
        };
        for (out, v) in out.iter_mut().zip(v) {
            *out += weight / sum * v;
        }
    }
}

/// The bias of a query and a key of a window.
fn bias(operands: &Operands<'_>, windows: &Windows, query: usize, key: usize, q: &[f64]) -> f64 {
    let Some(tables) = &operands.relative_position else { return 0.0 };
    let [height, width] = windows.queries.window;
    let row = |table: &[f32], row: usize| -> f64 {
        let row = &table[row * q.len()..][..q.len()];
        q.iter().zip(row).map(|(q, t)| q * f64::from(*t)).sum()
    };
    row(tables.height, height - 1 + query / width - key / width)
        + row(tables.width, width - 1 + query % width - key % width)
}

fn channels(read: impl Fn(&mut [f32]) -> Vec<f32>, head_dim: usize) -> Vec<f64> {
    read(&mut vec![0.0; head_dim]).into_iter().map(f64::from).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
