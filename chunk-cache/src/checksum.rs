//! crc32c (Castagnoli's polynomial, RFC 3720), which covers everything that is stored.

use crc_fast::{CrcAlgorithm, Digest};

/// crc32c of bytes that come piece by piece.
pub(crate) struct Crc32c(Digest);

impl Crc32c {
    pub(crate) fn new() -> Crc32c {
        Crc32c(Digest::new(CrcAlgorithm::Crc32Iscsi))
    }

    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub(crate) fn finish(&self) -> u32 {
        // 32 bits by the algorithm.
        self.0.finalize() as u32
    }
}

/// crc32c of the parts joined.
pub(crate) fn crc32c(parts: &[&[u8]]) -> u32 {
    let mut crc = Crc32c::new();
    parts.iter().for_each(|part| crc.update(part));
    crc.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Bit by bit, from the polynomial.
    fn slow(bytes: &[u8]) -> u32 {
        let step = |crc: u32, _| if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 };
        !bytes.iter().fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), step))
    }

    proptest! {
        #[test]
        fn any_bytes_in_any_pieces_have_the_checksum_that_the_polynomial_gives(
            bytes in proptest::collection::vec(any::<u8>(), 0..5000), cuts in proptest::collection::vec(any::<prop::sample::Index>(), 0..4),
        ) {
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).chain([0, bytes.len()]).collect();
            cuts.sort_unstable();
            let parts: Vec<&[u8]> = cuts.windows(2).map(|ends| &bytes[ends[0]..ends[1]]).collect();
            prop_assert_eq!(crc32c(&parts), slow(&bytes));
        }
    }

    #[test]
    fn the_check_value_is_the_published_one() {
        assert_eq!(crc32c(&[b"123456789"]), 0xe306_9283);
    }
}
