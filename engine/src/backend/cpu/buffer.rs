//! Memory for intermediate results that is used again: clearing and mapping fresh memory for every layer costs a
//! prefill step about a third of its time.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

/// Buffers that are kept at most; more are given back to the system.
const KEPT: usize = 16;

type Shelf = Arc<Mutex<Vec<Vec<f32>>>>;

/// Where buffers come from and return to.
#[derive(Clone, Default)]
pub(crate) struct Buffers(Shelf);

/// Numbers that hold anything until they are written.
pub(crate) struct Buffer {
    data: Vec<f32>,
    len: usize,
    shelf: Shelf,
}

impl Buffers {
    /// A buffer of `len` numbers: the smallest kept one that is large enough, or the largest, grown.
    pub(crate) fn take(&self, len: usize) -> Buffer {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |(at, data): (usize, &Vec<f32>)| (data.len() < len, data.len().abs_diff(len), at);
        let best = kept.iter().enumerate().map(fits).min();
        let mut data = best.map(|(_, _, at)| kept.swap_remove(at)).unwrap_or_default();
        drop(kept);
        if data.len() < len {
            data.resize(len, 0.0);
        }
        Buffer { data, len, shelf: Arc::clone(&self.0) }
    }
}

impl Deref for Buffer {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.data[..self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.data[..self.len]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut kept = self.shelf.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < KEPT {
            kept.push(std::mem::take(&mut self.data));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_used_again_and_never_by_two_at_once() {
        let buffers = Buffers::default();
        let (mut a, mut b) = (buffers.take(100), buffers.take(100));
        a.fill(1.0);
        b.fill(2.0);
        assert!(a.iter().all(|x| *x == 1.0) && a.len() == 100);
        let place = b.as_ptr();
        drop((a, b));
        // The one that fits best, however long the others are.
        drop(buffers.take(5000));
        let again = [buffers.take(80), buffers.take(90)];
        assert!(again.iter().any(|buffer| buffer.as_ptr() == place));
        assert_ne!(again[0].as_ptr(), again[1].as_ptr());
        assert_eq!(again.iter().map(|buffer| buffer.len()).collect::<Vec<_>>(), [80, 90]);
    }
}
