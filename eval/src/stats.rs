//! The few statistics that records need.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The middle value (the mean of the two middle ones for an even count); 0 for none.
#[must_use]
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => 0.0,
        n if n % 2 == 1 => sorted[middle],
        _ => (sorted[middle - 1] + sorted[middle]) / 2.0,
    }
}

/// The least value that a share `p` in \[0, 1\] of the values does not exceed (nearest rank); 0 for none.
#[must_use]
pub fn percentile(values: &[f64], p: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (p * sorted.len() as f64).ceil().max(1.0) as usize;
    sorted.get(rank.min(sorted.len()).wrapping_sub(1)).copied().unwrap_or(0.0)
}

/// The mean; 0 for none.
#[must_use]
pub fn mean(values: &[f64]) -> f64 {
    if values.is_empty() { 0.0 } else { values.iter().sum::<f64>() / values.len() as f64 }
}

/// Wilson's score interval for a share of `hits` in `n` trials at 95 % (E. B. Wilson, JASA 22, 1927), as shares in
/// \[0, 1\]. Unlike the normal interval it stays inside, and says something at 0 and `n` hits. `(0, 1)` for no trials.
#[must_use]
pub fn wilson95(hits: usize, n: usize) -> (f64, f64) {
    if n == 0 {
        return (0.0, 1.0);
    }
    let z = 1.959_963_984_540_054_f64;
    let n = n as f64;
    let p = hits as f64 / n;
    let centre = p + z * z / (2.0 * n);
    let spread = z * (p * (1.0 - p) / n + z * z / (4.0 * n * n)).sqrt();
    let scale = 1.0 + z * z / n;
    (((centre - spread) / scale).max(0.0), ((centre + spread) / scale).min(1.0))
}

/// The 95 % interval of a mean by the percentile bootstrap (B. Efron, Ann. Statist. 7, 1979): the 2.5th and the 97.5th percentile of
/// the means of `resamples` samples drawn from the values with replacement. Of differences between two sides asked the same questions
/// it is the paired interval. Equal values and seeds give equal intervals; `(0, 0)` for no values.
#[must_use]
pub fn bootstrap_mean95(values: &[f64], resamples: usize, seed: u64) -> (f64, f64) {
    if values.is_empty() || resamples == 0 {
        return (0.0, 0.0);
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut resampled = || (0..values.len()).map(|_| values[rng.random_range(0..values.len())]).sum::<f64>();
    let means: Vec<f64> = (0..resamples).map(|_| resampled() / values.len() as f64).collect();
    (percentile(&means, 0.025), percentile(&means, 0.975))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_is_the_middle_and_ignores_order() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 100.0]), 3.0);
        assert_eq!(median(&[]), 0.0);
    }

    #[test]
    fn percentiles_are_values_that_were_seen() {
        let values: Vec<f64> = (1..=200).rev().map(f64::from).collect();
        assert_eq!(
            [percentile(&values, 0.99), percentile(&values, 0.5), percentile(&values, 1.0)],
            [198.0, 100.0, 200.0]
        );
        assert_eq!([percentile(&values, 0.0), percentile(&[7.0], 0.99), percentile(&[], 0.5)], [1.0, 7.0, 0.0]);
    }

    #[test]
    fn wilson_agrees_with_worked_values() {
        // Newcombe 1998, table I: 81 of 263 and 0 of 20, 1 of 29.
        let near = |a: f64, b: f64| (a - b).abs() < 6e-5;
        let (low, high) = wilson95(81, 263);
        assert!(near(low, 0.2553) && near(high, 0.3662), "{low} {high}");
        let (low, high) = wilson95(0, 20);
        assert!(low == 0.0 && near(high, 0.1611), "{low} {high}");
        let (low, high) = wilson95(1, 29);
        assert!(near(low, 0.0061) && near(high, 0.1718), "{low} {high}");
    }

    #[test]
    fn wilson_holds_the_share_and_narrows_with_more_trials() {
        let mut last = 1.0;
        for n in [4, 16, 64, 256] {
            let (low, high) = wilson95(n / 2, n);
            assert!(low < 0.5 && 0.5 < high && high - low < last);
            last = high - low;
        }
        assert_eq!(wilson95(0, 0), (0.0, 1.0));
    }

    #[test]
    fn bootstrapped_intervals_agree_with_the_ones_of_known_distributions() {
        // 400 values, half 0 and half 1: the mean's deviation is 0.025, and 1.96 of it is 0.049.
        let coins: Vec<f64> = (0..400).map(|i| f64::from(i % 2)).collect();
        let (low, high) = bootstrap_mean95(&coins, 4000, 1);
        assert!((low - 0.451).abs() < 0.004 && (high - 0.549).abs() < 0.004, "{low} {high}");
        assert_eq!(bootstrap_mean95(&coins, 4000, 1), (low, high));
        assert_eq!(bootstrap_mean95(&[0.25; 30], 100, 1), (0.25, 0.25));
        assert_eq!(bootstrap_mean95(&[], 100, 1), (0.0, 0.0));
    }

    #[test]
    fn a_rare_loss_has_an_interval_that_reaches_further_up_than_down() {
        // 3 of 100 questions lost: few samples hold none, and the upper end is the count 7 of the binomial's 97.5th percentile.
        let losses: Vec<f64> = (0..100).map(|i| f64::from(u8::from(i < 3))).collect();
        let (low, high) = bootstrap_mean95(&losses, 10_000, 7);
        assert_eq!((low, high), (0.0, 0.07));
    }
}
