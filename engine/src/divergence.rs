//! How far one distribution of the next token is from another.

/// The Kullback-Leibler divergence KL(p || q) of the distributions that two rows of logits, `[vocab]`, stand for, in nats.
#[must_use]
pub fn kl_divergence(p: &[f32], q: &[f32]) -> f64 {
    let (of_p, of_q) = (log_sum(p), log_sum(q));
    let terms = p.iter().zip(q).filter(|(p, _)| p.is_finite());
    terms
        .map(|(p, q)| {
            let (p, q) = (f64::from(*p) - of_p, f64::from(*q) - of_q);
            p.exp() * (p - q)
        })
        .sum()
}

/// The token with the largest logit, the first among equals, as greedy decoding chooses; `None`: there is none.
#[must_use]
pub fn largest_logit(logits: &[f32]) -> Option<u32> {
    let mut best: Option<(u32, f32)> = None;
    for (id, &value) in (0_u32..).zip(logits) {
        if best.is_none_or(|(_, most)| value > most) {
            best = Some((id, value));
        }
    }
    best.map(|(id, _)| id)
}

/// The logarithm of the sum of exponentials.
fn log_sum(logits: &[f32]) -> f64 {
    let most = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|logit| (f64::from(*logit) - most).exp()).sum();
    most + sum.ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_divergence_is_that_of_the_distributions_whatever_the_logits_are_up_to() {
        let logits = |shares: &[f32], by: f32| shares.iter().map(|share| share.ln() + by).collect::<Vec<f32>>();
        let (p, q) = (logits(&[0.5, 0.25, 0.25], 3.0), logits(&[0.25, 0.5, 0.25], -40.0));
        let wanted = 0.5 * 2.0_f64.ln() + 0.25 * 0.5_f64.ln();
        assert!((kl_divergence(&p, &q) - wanted).abs() < 1e-6);
        assert!(kl_divergence(&p, &p).abs() < 1e-12);
        // What is impossible adds nothing.
        let some = [0.0, 0.0, f32::NEG_INFINITY];
        assert!((kl_divergence(&some, &[0.0; 3]) - (1.5_f64).ln()).abs() < 1e-6);
    }

    #[test]
    fn the_first_of_the_largest_is_chosen() {
        assert_eq!(largest_logit(&[1.0, 7.0, 7.0, f32::NEG_INFINITY]), Some(1));
        assert_eq!((largest_logit(&[-2.0]), largest_logit(&[])), (Some(0), None));
    }
}
