//! What one thread of this CPU can do at most, by the instructions that do the work.

use std::time::Instant;

use birkhoff_core::isa::Isa;

/// Names and speeds in GFLOP/s (two operations a multiply-add) of a thread: the best of a few runs.
pub(crate) fn peaks() -> Vec<(&'static str, f64)> {
    let mut peaks = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        if Isa::Avx512.is_available() {
            // SAFETY: the CPU has the instructions.
            peaks.push(("vpdpbusd zmm", best_of(64.0, |rounds| unsafe { vpdpbusd(rounds) })));
            // SAFETY: as above.
            peaks.push(("fma f32 zmm", best_of(16.0, |rounds| unsafe { fma_512(rounds) })));
        }
        if Isa::Avx2.is_available() {
            // SAFETY: the CPU has the instructions.
            peaks.push(("fma f32 ymm", best_of(8.0, |rounds| unsafe { fma_256(rounds) })));
        }
    }
    peaks
}

/// Accumulators that keep the pipes full.
#[cfg(target_arch = "x86_64")]
const CHAINS: usize = 16;

#[cfg(target_arch = "x86_64")]
fn best_of(multiply_adds: f64, work: impl Fn(usize)) -> f64 {
    const ROUNDS: usize = 1_000_000;
    let run = |_| {
        let start = Instant::now();
        work(ROUNDS);
        2.0 * multiply_adds * (CHAINS * ROUNDS) as f64 / start.elapsed().as_secs_f64() / 1e9
    };
    (0..9).map(run).fold(0.0, f64::max)
}

/// # Safety
/// The CPU has AVX-512 VNNI.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn vpdpbusd(rounds: usize) {
    use std::arch::x86_64::*;
    let (a, b) = (_mm512_set1_epi32(std::hint::black_box(3)), _mm512_set1_epi32(5));
    let mut sums = [_mm512_setzero_si512(); CHAINS];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm512_dpbusd_epi32(*sum, a, b);
        }
    }
    std::hint::black_box(sums);
}

/// # Safety
/// The CPU has AVX-512.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn fma_512(rounds: usize) {
    use std::arch::x86_64::*;
    let (a, b) = (_mm512_set1_ps(std::hint::black_box(0.5)), _mm512_set1_ps(0.25));
    let mut sums = [_mm512_setzero_ps(); CHAINS];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm512_fmadd_ps(*sum, a, b);
        }
    }
    std::hint::black_box(sums);
}

/// # Safety
/// The CPU has AVX2 and FMA.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn fma_256(rounds: usize) {
    use std::arch::x86_64::*;
    let (a, b) = (_mm256_set1_ps(std::hint::black_box(0.5)), _mm256_set1_ps(0.25));
    let mut sums = [_mm256_setzero_ps(); CHAINS - 4];
    for _ in 0..rounds * CHAINS / (CHAINS - 4) {
        for sum in &mut sums {
            *sum = _mm256_fmadd_ps(*sum, a, b);
        }
    }
    std::hint::black_box(sums);
}
