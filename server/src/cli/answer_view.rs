//! How an answer is shown to people.

use super::output::{Out, count, grouped, place, seconds};
use engine::GateReason;
use service::{Citation, Stats};

/// Characters of a passage that are shown.
const EXCERPT: usize = 300;

/// Prints the passages that contain the answer with their text, and names the others.
pub(super) fn citations(citations: &[Citation], answer: &str, out: &Out) {
    let (with, without): (Vec<_>, Vec<_>) = citations.iter().partition(|c| c.contains_answer);
    for citation in &with {
        out.line(format!("  * {}", place(&citation.document, citation.line, citation.span)));
        out.line(format!("    \"{}\"", excerpt(&citation.passage, answer)));
    }
    for citation in &without {
        out.line(format!("  - {}", place(&citation.document, citation.line, citation.span)));
    }
    if with.is_empty() && !citations.is_empty() {
        out.line("    (no passage contains the answer word for word)");
    } else if !without.is_empty() {
        out.line("    (* contains the answer word for word; - was read as well)");
    }
}

/// The passage on one line, cut to what lies around the answer.
pub(super) fn excerpt(passage: &str, answer: &str) -> String {
    let line = passage.split_whitespace().collect::<Vec<_>>().join(" ");
    let chars: Vec<char> = line.chars().collect();
    if chars.len() <= EXCERPT {
        return line;
    }
    let at = answer
        .split(", ")
        .chain([answer])
        .filter(|part| !part.trim().is_empty())
        .find_map(|part| line.find(part.trim()))
        .map_or(0, |byte| line[..byte].chars().count());
    let start = at.saturating_sub(EXCERPT / 2).min(chars.len() - EXCERPT);
    let cut: String = chars[start..start + EXCERPT].iter().collect();
    let before = if start > 0 { "..." } else { "" };
    let after = if start + EXCERPT < chars.len() { "..." } else { "" };
    format!("{before}{}{after}", cut.trim())
}

/// Tells what the reader should know of an answer, beside it.
pub(super) fn notes(notes: &[String], out: &Out) {
    for note in notes {
        out.note(&format!("note: {note}"));
    }
}

/// Says what an answer cost, in a few lines beside it.
pub(super) fn stats(stats: &Stats, out: &Out) {
    out.note(&format!(
        "  first token after {} (search {}, chunks {}, prompt {}), all after {}",
        seconds(stats.ttft_seconds),
        seconds(stats.retrieve_seconds),
        seconds(stats.prepare_seconds),
        seconds(stats.prefill_seconds),
        seconds(stats.total_seconds)
    ));
    out.note(&format!("  prompt of {}: {}", count(stats.prompt_tokens, "token"), tokens(stats)));
    out.note(&format!("  chunks: {} cached, {} computed", stats.chunks_cached, stats.chunks_computed));
    if let Some(line) = blending(stats) {
        out.note(&line);
    }
    if let (Some(scored), Some(attended)) = (stats.scored_share, stats.attended_share) {
        out.note(&format!(
            "  cold keys: {:.1} % read by the index, {:.1} % attended ({})",
            scored * 100.0,
            attended * 100.0,
            stats.strategy
        ));
    }
}

/// What blending cost, and why so much.
fn blending(stats: &Stats) -> Option<String> {
    let (rule, charged) = (stats.rule.as_ref()?, stats.charged_share?);
    let gate = stats.gate.filter(|gate| gate.reason != GateReason::Off).map(|gate| format!(", gate: {}", gate.reason));
    Some(format!("  blended by {rule}: {:.1} % of computing it all{}", 100.0 * charged, gate.unwrap_or_default()))
}

/// Where the tokens of a prompt came from.
pub(super) fn tokens(stats: &Stats) -> String {
    format!(
        "{} reused, {} recomputed, {} of the question",
        grouped(stats.reused_tokens as u64),
        grouped(stats.recomputed_tokens as u64),
        grouped(stats.suffix_tokens as u64)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_excerpt_shows_the_answer() {
        let passage = format!("{} the key is Ümlaut-7. {}", "word ".repeat(200), "more ".repeat(200));
        let shown = excerpt(&passage, "Ümlaut-7");
        assert!(shown.contains("Ümlaut-7") && shown.starts_with("...") && shown.ends_with("..."), "{shown}");
        assert!(shown.chars().count() <= EXCERPT + 6);
        assert_eq!(excerpt("short\n text", "none"), "short text");
    }
}
