//! Attention by grid, window, instruction set and threads.
//!
//! Prints GFLOP/s of the products of scores and outputs (two operations a multiplication; exponentials
//! and biases come on top), the best of interleaved rounds of about a millisecond: on a busy machine
//! the median says more about what else runs.
//!
//! `cargo bench -p birkhoff-core --bench attention -- [isa=avx512,avx2] [threads=1,2]
//! [shapes=64x64x64,14x14x64]` (shapes are height x width x head_dim)

use std::time::Instant;

use birkhoff_core::attention::{
    AttentionOptions, Heads, Operands, RelativePosition, Shape, attention,
};
use birkhoff_core::isa::Isa;
use birkhoff_core::linear::{Floats, FloatsMut};

/// Rounds of which the best is taken.
const ROUNDS: usize = 101;
/// Multiplications of a timing.
const WORK: usize = 1 << 27;

fn choices<T>(name: &str, default: &str, parse: impl Fn(&str) -> T) -> Vec<T> {
    let prefix = format!("{name}=");
    let given = std::env::args().find_map(|arg| arg.strip_prefix(&prefix).map(str::to_owned));
    given.as_deref().unwrap_or(default).split(',').map(parse).collect()
}

fn floats(len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 37) % 101) as f32 / 50.0 - 1.0).collect()
}

fn main() {
    let number = |text: &str| text.parse::<usize>().expect("a number");
    let shapes = choices("shapes", "64x64x64,64x64x80,14x14x64,14x14x80", |shape| {
        let sizes: Vec<usize> = shape.split('x').map(number).collect();
        <[usize; 3]>::try_from(sizes).expect("height x width x head_dim")
    });
    let isas = choices("isa", Isa::best().name(), |name| {
        Isa::from_name(name).expect("an instruction set of this CPU")
    });
    let threads = choices("threads", "1", number);
    println!("{:>12} {:>8} {:>7} | {:>9} {:>9}", "shape", "isa", "threads", "no bias", "bias");
    for &[height, width, head_dim] in &shapes {
        let (tokens, heads) = (height * width, 2);
        let batch = (WORK / (2 * heads * tokens * tokens * head_dim)).max(1);
        let shape = Shape { batch, height, width, heads, head_dim };
        let token = 3 * heads * head_dim;
        let qkv = floats(batch * tokens * token);
        let part = |index: usize| {
            let strides = [tokens * token, width * token, token, head_dim];
            Heads::new(Floats::F32(&qkv[index * heads * head_dim..]), shape, strides)
                .expect("as many as that")
        };
        let tables = [height, width].map(|size| floats((2 * size - 1) * head_dim));
        let operands = Operands {
            queries: part(0),
            keys: part(1),
            values: part(2),
            relative_position: None,
            window: None,
        };
        let relative_position = RelativePosition { height: &tables[0], width: &tables[1] };
        let biased = Operands { relative_position: Some(relative_position), ..operands };
        let mut out = vec![0.0; batch * tokens * heads * head_dim];
        let operations = (4 * batch * heads * tokens * tokens * head_dim) as f64;
        for &isa in &isas {
            for &threads in &threads {
                let options =
                    AttentionOptions { scale: (head_dim as f32).powf(-0.5), isa, threads };
                let mut best = [f64::INFINITY; 2];
                for _ in 0..ROUNDS {
                    for (operands, best) in [operands, biased].iter().zip(&mut best) {
                        let start = Instant::now();
                        attention(operands, FloatsMut::F32(&mut out), &options)
                            .expect("shapes fit");
                        *best = best.min(start.elapsed().as_secs_f64());
                    }
                }
                let [plain, biased] = best.map(|best| operations / best / 1e9);
                println!(
                    "{:>12} {:>8} {threads:>7} | {plain:>9.1} {biased:>9.1}",
                    format!("{height}x{width}x{head_dim}"),
                    isa.name()
                );
            }
        }
    }
}
