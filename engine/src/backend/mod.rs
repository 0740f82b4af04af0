//! Where the arithmetic runs. The CPU is the specification of every operation.

pub(crate) mod cores;
pub(crate) mod cpu;
pub(crate) mod cuda;
