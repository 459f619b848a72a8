//! Decoding speed in cache, one thread, in weights a second.

use std::hint::black_box;

use birkhoff_core::decode;
use birkhoff_core::isa::Isa;
use birkhoff_core::layout::{BLOCK, DECODED_BLOCK, STRIP};
use birkhoff_core::{Codec, Trajectory};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

const IN_FEATURES: usize = 768;

fn bench(criterion: &mut Criterion) {
    let blocks = IN_FEATURES / BLOCK;
    let mut out = vec![0; blocks * DECODED_BLOCK];
    for isa in Isa::available() {
        let mut group = criterion.benchmark_group(format!("decode/{isa}"));
        group.throughput(Throughput::Elements((IN_FEATURES * STRIP) as u64));
        for codec in Codec::ALL {
            for &bits in codec.rates() {
                let trajectory = codec.trajectory(bits).expect("a rate of the codec");
                if trajectory == Trajectory::Int8 && codec != Codec::Shift {
                    continue;
                }
                let strip: Vec<u8> = (0..blocks * bits as usize * 64)
                    .map(|i| (i as u32).wrapping_mul(0x9e37_79b9).to_be_bytes()[0])
                    .collect();
                group.bench_function(format!("{}-{bits}", codec.name()), |bencher| {
                    bencher.iter(|| {
                        decode::blocks(isa, trajectory, black_box(&strip), 0, black_box(&mut out));
                    });
                });
            }
        }
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(std::time::Duration::from_millis(100))
        .measurement_time(std::time::Duration::from_millis(300));
    targets = bench
}
criterion_main!(benches);
