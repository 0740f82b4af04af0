//! Names of what clients make: files, vector stores, batches.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

/// Digits in the order of their characters (base 32 with the extended hex alphabet of RFC 4648, in lower case).
const DIGITS: &[u8; 32] = b"0123456789abcdefghijklmnopqrstuv";
/// Digits of an id behind its prefix: 120 bits.
const LENGTH: usize = 24;
/// Of these, bits that tell the time, in milliseconds since 1970.
const TIME_BITS: u32 = 48;

/// An id that no other thing has: `prefix`, when it was made, and random digits. Ids of one process are in the order in
/// which they were made, which is how lists are sorted and cursors keep their place when what they name is gone.
pub(crate) fn new_id(prefix: &str) -> String {
    static LAST: AtomicU64 = AtomicU64::new(0);
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let now = u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
    let later = |last: u64| Some(now.max(last + 1));
    let time = LAST.fetch_update(Ordering::Relaxed, Ordering::Relaxed, later).map_or(now, |last| now.max(last + 1));
    let seed = format!("{} {} {}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed), since.as_nanos());
    let random = blake3::Hasher::new_derive_key("quire object id 1").update(seed.as_bytes()).finalize();
    with_digits(prefix, time, &random)
}

/// The id of something that has had none, made at `created`, in seconds since 1970: always the same for the same `of`.
pub(crate) fn derived_id(prefix: &str, created: u64, of: &[u8]) -> String {
    let hash = blake3::Hasher::new_derive_key("quire derived object id 1").update(of).finalize();
    with_digits(prefix, created.saturating_mul(1000), &hash)
}

fn with_digits(prefix: &str, milliseconds: u64, rest: &blake3::Hash) -> String {
    let mut low = [0; 16];
    low.copy_from_slice(&rest.as_bytes()[..16]);
    let bits = (u128::from(milliseconds) << (120 - TIME_BITS)) | (u128::from_be_bytes(low) >> (8 + TIME_BITS));
    let digit = |place: usize| char::from(DIGITS[((bits >> (place * 5)) & 31) as usize]);
    prefix.chars().chain((0..LENGTH).rev().map(digit)).collect()
}

/// Whether a text can be an id with this prefix.
pub(crate) fn is_id(prefix: &str, text: &str) -> bool {
    text.strip_prefix(prefix).is_some_and(|rest| rest.len() == LENGTH && rest.bytes().all(|b| DIGITS.contains(&b)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_distinct_and_in_the_order_in_which_they_were_made() {
        let ids: Vec<String> = (0..2000).map(|_| new_id("file-")).collect();
        assert!(ids.is_sorted_by(|a, b| a < b));
        assert!(ids.iter().all(|id| is_id("file-", id)));
        assert!(!is_id("file-", "file-") && !is_id("vs_", &ids[0]) && !is_id("file-", &format!("{}x", ids[0])));
    }

    #[test]
    fn a_derived_id_stays_and_has_its_place_among_others() {
        let id = |created: u64, of: &[u8]| derived_id("vs_", created, of);
        assert_eq!(id(7, b"1"), id(7, b"1"));
        assert_ne!(id(7, b"1"), id(7, b"2"));
        assert!(is_id("vs_", &id(7, b"1")) && id(7, b"1") < id(8, b"1") && id(8, b"1") < new_id("vs_"));
    }
}
