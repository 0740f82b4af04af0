//! Which vectors the machine has.

use std::sync::OnceLock;

/// The instruction sets with a kernel of their own.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Isa {
    Scalar,
    /// AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F, BW, DQ, VL and VNNI: Ice Lake and Zen 4, and what came after.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Isa {
    /// Every set this machine can run, the best one last. Only from here come values other than
    /// `Scalar`.
    pub(crate) fn available() -> Vec<Isa> {
        #[cfg(target_arch = "x86_64")]
        {
            let mut sets = vec![Isa::Scalar];
            let narrow =
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
            if narrow {
                sets.push(Isa::Avx2);
            }
            let wide = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vnni");
            if narrow && wide {
                sets.push(Isa::Avx512);
            }
            sets
        }
        #[cfg(not(target_arch = "x86_64"))]
        vec![Isa::Scalar]
    }

    #[inline]
    pub(crate) fn best() -> Isa {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| Self::available().pop().unwrap_or(Isa::Scalar))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_runs_the_set_it_reports() {
        assert_eq!(Isa::available().last(), Some(&Isa::best()));
        assert_eq!(Isa::available()[0], Isa::Scalar);
    }
}
