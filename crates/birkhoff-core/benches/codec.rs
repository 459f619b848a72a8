//! Encode and decode by codec, bits and instruction set, on one thread; throughput in weights/s.
//!
//! `cargo bench -p birkhoff-core --bench codec [-- FILTER]`, e.g. `-- encode/shift/4` or `-- decode`.

use std::hint::black_box;
use std::time::Duration;

use birkhoff_core::layout::DECODED_BLOCK;
use birkhoff_core::{Codec, EncodeOptions, HyperMatrix, Isa, ScaleRefit, threads};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

/// Rows and columns of the matrix that is encoded.
const ENCODE: (usize, usize) = (32, 1280);
/// Columns of the strip that is decoded: its codes and values stay in the cache.
const DECODE_COLS: usize = 768;

fn weights(count: usize) -> Vec<f32> {
    let mut state = 1u64;
    let mut uniform = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    };
    let mut gaussian =
        || (-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos();
    (0..count).map(|_| (0.02 * gaussian()) as f32).collect()
}

fn rates() -> impl Iterator<Item = (Codec, u32)> {
    let winding = Codec::Winding.rates().iter().filter(|&&bits| bits != 8);
    let shift = Codec::Shift.rates().iter().map(|&bits| (Codec::Shift, bits));
    shift.chain(winding.map(|&bits| (Codec::Winding, bits)))
}

fn id(codec: Codec, bits: u32, isa: Isa) -> BenchmarkId {
    BenchmarkId::new(codec.name(), format!("{bits}/{isa}"))
}

fn encode(criterion: &mut Criterion) {
    let (rows, cols) = ENCODE;
    let weights = weights(rows * cols);
    let mut group = criterion.benchmark_group("encode");
    group.throughput(Throughput::Elements(weights.len() as u64));
    for (codec, bits) in rates() {
        for isa in Isa::available() {
            let options = EncodeOptions { codec, bits, refit: ScaleRefit::default(), isa };
            group.bench_function(id(codec, bits, isa), |bencher| {
                threads::install(1, || {
                    bencher.iter(|| {
                        HyperMatrix::encode(black_box(&weights[..]).into(), rows, cols, &options)
                    });
                });
            });
        }
    }
    group.finish();
}

fn decode(criterion: &mut Criterion) {
    let weights = weights(16 * DECODE_COLS);
    let mut group = criterion.benchmark_group("decode");
    group.throughput(Throughput::Elements(weights.len() as u64));
    for (codec, bits) in rates() {
        let refit = ScaleRefit::default();
        let options = EncodeOptions { codec, bits, refit, isa: Isa::best() };
        let (matrix, _) =
            HyperMatrix::encode(weights[..].into(), 16, DECODE_COLS, &options).expect("is finite");
        let mut values = vec![0; matrix.layout().blocks() * DECODED_BLOCK];
        for isa in Isa::available() {
            group.bench_function(id(codec, bits, isa), |bencher| {
                bencher.iter(|| matrix.view().decode_strip(isa, 0, black_box(&mut values)));
            });
        }
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .sample_size(20);
    targets = encode, decode
}
criterion_main!(benches);
