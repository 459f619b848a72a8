//! `HyperLinear` by shape, tokens, bits, precision, instruction set and threads.
//!
//! Prints a table of GFLOP/s (two operations a multiplication), medians of interleaved runs. Not a
//! criterion bench: interleaving is what makes the columns comparable on a noisy machine.
//!
//! `cargo bench -p birkhoff-core --bench linear -- [tokens=1,196] [bits=4,8] [isa=avx512,avx2]
//! [threads=1,2] [shapes=768x3072,3072x768]` (shapes are in_features x out_features)
//!
//! With the argument `peaks`: only what a thread of this CPU can do at most, as JSON. The share of
//! the time that decoding takes is that of decoding the whole matrix once for each 1024 tokens.

mod peak;

use std::time::{Duration, Instant};

use birkhoff_core::isa::Isa;
use birkhoff_core::layout::{DECODED_BLOCK, Layout};
use birkhoff_core::linear::{Floats, FloatsMut, Input, LinearOptions, Output, Precision, linear};
use birkhoff_core::matrix::{Bytes, HyperMatrix};
use birkhoff_core::{Codec, MatrixView};

/// Rounds of which the median is taken.
const ROUNDS: usize = 7;
/// Time of a cell in a round.
const ROUND_TIME: Duration = Duration::from_millis(15);

/// Random bytes are valid codes.
fn bytes(len: usize) -> Bytes {
    Bytes::copied(
        &(0..len)
            .map(|i| (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes()[0])
            .collect::<Vec<u8>>(),
    )
}

fn matrix(out_features: usize, in_features: usize, bits: u32) -> HyperMatrix {
    let trajectory = Codec::Shift.trajectory(bits).expect("a rate of the codec");
    let layout = Layout::new(out_features, in_features, trajectory).expect("a small shape");
    let row_scales = Bytes::copied(&[0x80, 0x3c].repeat(layout.row_scales_len() / 2));
    let codes = bytes(layout.codes_len());
    HyperMatrix::new(layout, codes, row_scales, bytes(layout.group_exponents_len()))
        .expect("parts of the right length")
}

fn run(weight: MatrixView<'_>, x: &[f32], y: &mut [f32], options: &LinearOptions) {
    let (out_features, in_features) = (weight.layout().rows(), weight.layout().cols());
    let tokens = x.len() / in_features;
    let input = Input::new(Floats::F32(x), tokens, in_features, in_features);
    let output = Output::new(FloatsMut::F32(y), tokens, out_features, out_features);
    let (input, output) = (input.expect("fits"), output.expect("fits"));
    linear(weight, input, None, output, options).expect("shapes fit");
}

fn choices<T>(name: &str, default: &str, parse: impl Fn(&str) -> T) -> Vec<T> {
    let prefix = format!("{name}=");
    let given = std::env::args().find_map(|arg| arg.strip_prefix(&prefix).map(str::to_owned));
    given.as_deref().unwrap_or(default).split(',').map(parse).collect()
}

/// Seconds to decode the matrix once, on one thread.
fn decode_seconds(weight: MatrixView<'_>, isa: Isa) -> f64 {
    let mut values = vec![0; weight.layout().blocks() * DECODED_BLOCK];
    let times = (0..ROUNDS).map(|_| {
        let start = Instant::now();
        for strip in 0..weight.layout().strips() {
            weight.decode_strip(isa, strip, std::hint::black_box(&mut values));
        }
        start.elapsed().as_secs_f64()
    });
    times.fold(f64::INFINITY, f64::min)
}

fn main() {
    let peaks = peak::peaks();
    if std::env::args().any(|arg| arg == "peaks") {
        let peaks: Vec<String> =
            peaks.iter().map(|(name, speed)| format!("\"{name}\": {speed:.1}")).collect();
        println!("{{{}}}", peaks.join(", "));
        return;
    }
    for (name, speed) in &peaks {
        println!("peak of a thread, {name}: {speed:.1} GFLOP/s");
    }
    let number = |text: &str| text.parse::<usize>().expect("a number");
    let shapes = choices("shapes", "768x3072,3072x768,256x256", |shape| {
        let (cols, rows) = shape.split_once('x').expect("in_features x out_features");
        (number(cols), number(rows))
    });
    let tokens = choices("tokens", "1,7,64,196,4096", number);
    let bits = choices("bits", "4,8", |bits| number(bits) as u32);
    let isas = choices("isa", Isa::best().name(), |name| {
        Isa::from_name(name).expect("an instruction set of this CPU")
    });
    let threads = choices("threads", "1,2", number);
    println!(
        "{:>11} {:>5} {:>4} {:>8} {:>7} | {:>8} {:>8} {:>8}   GFLOP/s (share of decoding)",
        "in x out", "M", "bits", "isa", "threads", "highest", "high", "medium"
    );
    for &(in_features, out_features) in &shapes {
        for &tokens in &tokens {
            let x: Vec<f32> =
                (0..tokens * in_features).map(|i| ((i * 37) % 101) as f32 - 50.0).collect();
            let mut y = vec![0.0; tokens * out_features];
            let flop = (2 * tokens * in_features * out_features) as f64;
            for &bits in &bits {
                let matrix = matrix(out_features, in_features, bits);
                let cells: Vec<LinearOptions> = isas
                    .iter()
                    .flat_map(|&isa| threads.iter().map(move |&threads| (isa, threads)))
                    .flat_map(|(isa, threads)| {
                        Precision::ALL.map(|precision| LinearOptions { precision, isa, threads })
                    })
                    .collect();
                let mut speeds = vec![Vec::new(); cells.len()];
                for _ in 0..ROUNDS {
                    for (options, speeds) in cells.iter().zip(&mut speeds) {
                        run(matrix.view(), &x, &mut y, options);
                        let (start, mut runs) = (Instant::now(), 0);
                        while runs == 0 || start.elapsed() < ROUND_TIME {
                            run(matrix.view(), &x, &mut y, options);
                            runs += 1;
                        }
                        speeds.push(flop * f64::from(runs) / start.elapsed().as_secs_f64() / 1e9);
                    }
                }
                let medians: Vec<f64> = speeds
                    .into_iter()
                    .map(|mut speeds| {
                        speeds.sort_by(f64::total_cmp);
                        speeds[ROUNDS / 2]
                    })
                    .collect();
                for (options, speeds) in cells.chunks(3).zip(medians.chunks(3)) {
                    let decodings = tokens.div_ceil(1024) as f64;
                    let decoding = decode_seconds(matrix.view(), options[0].isa) * decodings
                        / options[0].threads as f64;
                    let shares: Vec<String> = speeds
                        .iter()
                        .map(|speed| format!("{:.1} %", 100.0 * decoding * speed * 1e9 / flop))
                        .collect();
                    println!(
                        "{:>11} {tokens:>5} {bits:>4} {:>8} {:>7} | {:>8.1} {:>8.1} {:>8.1}   ({})",
                        format!("{in_features}x{out_features}"),
                        options[0].isa.name(),
                        options[0].threads,
                        speeds[0],
                        speeds[1],
                        speeds[2],
                        shares.join(", "),
                    );
                }
            }
        }
    }
}
