//! Which cached tokens are recomputed.

/// The `ratio` of the tokens whose state deviates most, as ascending indices into `deviation`. Ties go to the
/// earlier token. (CacheBlend, arXiv 2405.16444, section 4.3: high-KV-deviation tokens; the same set on
/// all later layers, as its code does.)
pub(crate) fn most_deviating(deviation: &[f32], ratio: f32) -> Vec<usize> {
    let count = (deviation.len() as f64 * f64::from(ratio)).round() as usize;
    let mut order: Vec<usize> = (0..deviation.len()).collect();
    order.sort_by(|a, b| deviation[*b].total_cmp(&deviation[*a]));
    order.truncate(count);
    order.sort_unstable();
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_deviations_are_chosen_in_order_of_position() {
        let deviation = [0.1, 5.0, 0.2, 9.0, 5.0];
        assert_eq!(most_deviating(&deviation, 0.4), [1, 3]);
        assert_eq!(most_deviating(&deviation, 0.6), [1, 3, 4]);
        assert_eq!(most_deviating(&deviation, 1.0), [0, 1, 2, 3, 4]);
        assert!(most_deviating(&deviation, 0.0).is_empty());
        assert!(most_deviating(&[], 0.5).is_empty());
    }
}
