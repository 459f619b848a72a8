//! Which instruction set the kernels use.
//!
//! Chosen once, at first use: the best the CPU has, or what `BIRKHOFF_ISA` asks for. Functions that
//! depend on it take an [`Isa`] argument, so that tests can run every path in one process.

use std::sync::OnceLock;

use crate::error::{Error, Result};

/// The environment variable that forces an instruction set.
pub const ISA_VARIABLE: &str = "BIRKHOFF_ISA";

/// An instruction set that the kernels are written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Plain Rust: runs everywhere, and is what the others are tested against.
    Portable,
    /// x86-64 with AVX2 and FMA.
    Avx2,
    /// AVX2 with VNNI on 256 bits: AVX-VNNI (Alder Lake, Zen 5 and newer), or AVX-512 VL and VNNI
    /// where VBMI is missing (Cascade Lake).
    AvxVnni,
    /// x86-64 with AVX-512 F, BW, DQ, VL, VBMI, VBMI2 and VNNI (Ice Lake, Zen 4 and newer).
    Avx512,
}

impl Isa {
    /// Every instruction set, plainest first.
    pub const ALL: [Isa; 4] = [Isa::Portable, Isa::Avx2, Isa::AvxVnni, Isa::Avx512];

    /// The name that `BIRKHOFF_ISA` takes.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::AvxVnni => "avxvnni",
            Isa::Avx512 => "avx512",
        }
    }

    /// Whether this CPU can run it.
    pub fn is_available(self) -> bool {
        match self {
            Isa::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni => {
                Isa::Avx2.is_available()
                    && (is_x86_feature_detected!("avxvnni")
                        || is_x86_feature_detected!("avx512vl")
                            && is_x86_feature_detected!("avx512vnni"))
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                Isa::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vbmi")
                    && is_x86_feature_detected!("avx512vbmi2")
                    && is_x86_feature_detected!("avx512vnni")
            }
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    /// The instruction sets that this CPU can run, plainest first.
    pub fn available() -> impl Iterator<Item = Isa> {
        Isa::ALL.into_iter().filter(|isa| isa.is_available())
    }

    /// The best instruction set of this CPU.
    pub fn best() -> Isa {
        Isa::available().last().unwrap_or(Isa::Portable)
    }

    /// The instruction set named by `name` (`"auto"` or empty: the best one).
    ///
    /// # Errors
    /// [`Error::Isa`] if there is none of that name or this CPU lacks it.
    pub fn from_name(name: &str) -> Result<Isa> {
        if name.is_empty() || name == "auto" {
            return Ok(Isa::best());
        }
        match Isa::ALL.into_iter().find(|isa| isa.name() == name) {
            Some(isa) if isa.is_available() => Ok(isa),
            Some(_) => Err(Error::Isa(format!("this CPU has no {name}"))),
            None => Err(Error::Isa(format!("there is no instruction set {name:?}"))),
        }
    }

    /// The instruction set in use: `BIRKHOFF_ISA` if set, else the best one. Read once.
    ///
    /// # Errors
    /// [`Error::Isa`] if the variable names none, or one that this CPU lacks.
    pub fn current() -> Result<Isa> {
        static CURRENT: OnceLock<std::result::Result<Isa, String>> = OnceLock::new();
        CURRENT
            .get_or_init(|| {
                let name = std::env::var(ISA_VARIABLE).unwrap_or_default();
                Isa::from_name(&name).map_err(|error| error.to_string())
            })
            .clone()
            .map_err(Error::IsaVariable)
    }
}

/// The CPU features present that matter to the kernels, by the names that the compiler gives them.
pub fn cpu_features() -> Vec<&'static str> {
    #[allow(unused_mut)]
    let mut features = Vec::new();
    #[cfg(target_arch = "x86_64")]
    macro_rules! detect {
        ($($name:tt)*) => {
            $(if is_x86_feature_detected!($name) { features.push($name); })*
        };
    }
    #[cfg(target_arch = "x86_64")]
    detect!(
        "avx2" "fma" "f16c" "avxvnni" "avx512f" "avx512bw" "avx512dq" "avx512vl" "avx512vbmi"
        "avx512vbmi2" "avx512vnni" "avx512bf16"
    );
    features
}

impl std::fmt::Display for Isa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_available_isa_is_found_by_its_name() {
        for isa in Isa::available() {
            assert_eq!(Isa::from_name(isa.name()).unwrap(), isa);
        }
        assert_eq!(Isa::from_name("auto").unwrap(), Isa::best());
    }

    #[test]
    fn an_unknown_name_is_refused() {
        let error = Isa::from_name("sse9").unwrap_err().to_string();
        assert!(error.contains("sse9") && error.contains("portable"), "{error}");
    }
}
