//! The CPU backend: a thread pool, vector instruction sets chosen at run time, and the
//! operations of a forward pass written once over them.

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
pub(crate) mod buffer;
pub(crate) mod elementwise;
pub(crate) mod linear;
pub(crate) mod micro;
pub(crate) mod pool;
pub(crate) mod simd;

use std::sync::Arc;

use super::cores::Cores;
use buffer::Buffers;
use pool::Pool;
pub use simd::Isa;

/// The CPU as a device: its threads and its best instruction set.
pub(crate) struct Cpu {
    pub(crate) pool: Pool,
    pub(crate) isa: Isa,
    pub(crate) buffers: Buffers,
    /// Threads for what goes on beside forward passes.
    pub(crate) cores: Arc<Cores>,
}

impl Cpu {
    /// `threads` of 0 means all the cores that this process may use.
    pub(crate) fn new(threads: usize) -> Cpu {
        let threads = if threads == 0 { std::thread::available_parallelism().map_or(1, usize::from) } else { threads };
        Cpu {
            pool: Pool::new(threads),
            isa: Isa::detect(),
            buffers: Buffers::default(),
            cores: Arc::new(Cores::new(threads)),
        }
    }
}
