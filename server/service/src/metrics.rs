//! What is counted, and under which names.
//!
//! What vLLM counts too has vLLM's names (the prefix is a setting), so that existing dashboards and routers work. What
//! only Quire has begins with `quire:`.

use engine::{DecodeStats, EngineLoad, PrefillStats, TierLoad, Usage};
use metrics::{
    Counter, Gauge, Histogram, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram,
};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

use crate::monitor::Level;
use settings::{QuireError, Result};

const SECONDS: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0,
];
const TOKEN_SECONDS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0];
const KEYS: &[f64] = &[0.0, 1e2, 1e3, 1e4, 3e4, 1e5, 3e5, 1e6, 3e6, 1e7, 1e8];
const DEVIATION: &[f64] = &[0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0];

const DIVERGENCE: &[f64] = &[0.001, 0.003, 0.01, 0.03, 0.06, 0.1, 0.2, 0.4, 0.8, 1.6, 5.0];
const SHARE: &[f64] = &[0.05, 0.1, 0.125, 0.15, 0.175, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5];

/// Installs the recorder of this process; what it gathered is rendered by the handle.
///
/// # Errors
/// [`QuireError::Internal`] when there is one already.
pub fn install() -> Result<PrometheusHandle> {
    let failed = |e: metrics_exporter_prometheus::BuildError| QuireError::Internal(format!("metrics: {e}"));
    let recorder = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), SECONDS)
        .and_then(|b| b.set_buckets_for_metric(Matcher::Suffix("inter_token_latency_seconds".into()), TOKEN_SECONDS))
        .and_then(|b| b.set_buckets_for_metric(Matcher::Suffix("keys_scanned_per_token".into()), KEYS))
        .and_then(|b| b.set_buckets_for_metric(Matcher::Suffix("blend_deviation".into()), DEVIATION))
        .and_then(|b| b.set_buckets_for_metric(Matcher::Suffix("blend_charged_share".into()), SHARE))
        .and_then(|b| b.set_buckets_for_metric(Matcher::Suffix("monitor_divergence".into()), DIVERGENCE))
        .map_err(failed)?
        .install_recorder()
        .map_err(failed)?;
    describe_http();
    Ok(recorder)
}

/// A request was answered with this status, or given up by its client (499). `handler` is its route, not its path: what
/// clients choose must not become a label.
pub fn http_request(method: &'static str, handler: &str, status: u16) {
    let labels = [("method", method.to_string()), ("handler", handler.to_string()), ("status", status.to_string())];
    counter!("quire:http_requests_total", &labels).increment(1);
}

/// A request was refused or failed with this code, also within a stream whose status was 200.
pub fn http_error(status: u16, code: &'static str) {
    let labels = [("status", status.to_string()), ("code", code.to_string())];
    counter!("quire:request_errors_total", &labels).increment(1);
}

/// A command of the command line ended: `done`, `failed` or `cancelled`.
pub fn command(name: &'static str, outcome: &'static str) {
    counter!("quire:commands_total", "command" => name, "outcome" => outcome).increment(1);
}

/// So many connections are open.
pub fn connections(open: usize) {
    gauge!("quire:connections").set(open as f64);
}

/// A connection ended before its client or the server meant it to: `timeout`, `evicted`, or `client`.
pub fn connection_cut(reason: &'static str) {
    counter!("quire:connections_cut_total", "reason" => reason).increment(1);
}

fn describe_http() {
    describe_counter!("quire:http_requests_total", "Requests by method, route and status; 499: the client went away");
    describe_counter!("quire:request_errors_total", "Refusals and errors by status and code");
    describe_counter!(
        "quire:commands_total",
        "Commands of the command line by name and outcome: done, failed, cancelled"
    );
    describe_counter!(
        "quire:monitor_samples_total",
        "Questions compared with full recompute, by collection and whether their first tokens were the same"
    );
    describe_counter!(
        "quire:monitor_dropped_total",
        "Questions that were to be compared and were not: no time for them"
    );
    describe_histogram!(
        "quire:monitor_divergence",
        "Mean divergence of blended questions from full recompute, in nats"
    );
    describe_gauge!(
        "quire:monitor_level",
        "How a collection is blended: 0 as set, 1 with more recomputed, 2 not at all"
    );
    describe_counter!(
        "quire:blend_gate_total",
        "Contexts blended by the question, by the gate's reason for what was recomputed"
    );
    describe_gauge!("quire:connections", "Open connections");
    describe_counter!("quire:connections_cut_total", "Connections that ended early: timeout, evicted, client");
    connections(0);
}

/// Handles of all metrics of a service. Without a recorder they do nothing.
pub struct Metrics {
    prefix: String,
    model: String,
    running: Gauge,
    waiting: Gauge,
    kv_usage: Gauge,
    preemptions: Counter,
    cache_queries: Counter,
    cache_hits: Counter,
    prompt_tokens: Counter,
    prompt_tokens_cached: Counter,
    generation_tokens: Counter,
    first_token: Histogram,
    inter_token: Histogram,
    end_to_end: Histogram,
    queue_time: Histogram,
    prefill_time: Histogram,
    decode_time: Histogram,
    chunk_hits: Counter,
    chunk_misses: Counter,
    chunk_bytes: Gauge,
    chunks: Gauge,
    tokens_reused: Counter,
    tokens_recomputed: Counter,
    deviation: Histogram,
    charged: Histogram,
    keys_scanned: Histogram,
    index_build: Histogram,
    corruption: Counter,
    failed_chunks: Counter,
}

impl Metrics {
    /// Registers all metrics for a model.
    #[must_use]
    pub fn new(prefix: &str, model: &str) -> Metrics {
        let name = |suffix: &str| format!("{prefix}:{suffix}");
        let label = || [("model_name", model.to_string())];
        let counter_of = |name: String, about: &'static str| {
            describe_counter!(name.clone(), about);
            let handle = counter!(name, &label());
            handle.absolute(0);
            handle
        };
        let gauge_of = |name: String, about: &'static str| {
            describe_gauge!(name.clone(), about);
            gauge!(name, &label())
        };
        let histogram_of = |name: String, about: &'static str| {
            describe_histogram!(name.clone(), about);
            histogram!(name, &label())
        };
        let disk = || [("model_name", model.to_string()), ("tier", "disk".to_string())];
        Metrics {
            running: gauge_of(name("num_requests_running"), "Requests that are read or answered"),
            waiting: gauge_of(name("num_requests_waiting"), "Requests that wait"),
            kv_usage: gauge_of(name("kv_cache_usage_perc"), "Share of the KV memory in use, 0 to 1"),
            preemptions: counter_of(name("num_preemptions_total"), "Running requests that gave their memory back"),
            cache_queries: counter_of(name("prefix_cache_queries_total"), "Prompt tokens asked of the prefix cache"),
            cache_hits: counter_of(name("prefix_cache_hits_total"), "Prompt tokens that the prefix cache had"),
            prompt_tokens: counter_of(name("prompt_tokens_total"), "Tokens of prompts"),
            prompt_tokens_cached: counter_of(name("prompt_tokens_cached_total"), "Tokens of prompts from the cache"),
            generation_tokens: counter_of(name("generation_tokens_total"), "Tokens of answers"),
            first_token: histogram_of(name("time_to_first_token_seconds"), "From request to first token"),
            inter_token: histogram_of(name("inter_token_latency_seconds"), "Between two tokens"),
            end_to_end: histogram_of(name("e2e_request_latency_seconds"), "From request to last token"),
            queue_time: histogram_of(name("request_queue_time_seconds"), "Waiting for the engine"),
            prefill_time: histogram_of(name("request_prefill_time_seconds"), "Reading the prompt"),
            decode_time: histogram_of(name("request_decode_time_seconds"), "Writing the answer"),
            chunk_hits: counter!("quire:chunk_hits_total", &disk()),
            chunk_misses: counter_of("quire:chunk_misses_total".into(), "Chunks that had to be computed"),
            chunk_bytes: gauge!("quire:chunk_bytes", &disk()),
            chunks: gauge!("quire:chunks", &disk()),
            tokens_reused: counter_of("quire:tokens_reused_total".into(), "Context tokens reused as cached"),
            tokens_recomputed: counter_of("quire:tokens_recomputed_total".into(), "Context tokens computed again"),
            deviation: histogram_of(
                "quire:blend_deviation".into(),
                "Deviation of cached state from fresh state, where they were compared",
            ),
            charged: histogram_of(
                "quire:blend_charged_share".into(),
                "What blending computed, over what computing the cached tokens would have been",
            ),
            keys_scanned: histogram_of("quire:keys_scanned_per_token".into(), "Cold keys the index read per token"),
            index_build: histogram_of("quire:index_build_seconds".into(), "Building indexes over cold keys"),
            corruption: counter_of("quire:corruption_found_total".into(), "Damaged layers found in the chunk store"),
            failed_chunks: counter_of("quire:chunks_failed_total".into(), "Cached chunks that could not be used"),
            prefix: prefix.into(),
            model: model.into(),
        }
    }

    /// A chunk was looked up.
    pub fn chunk(&self, hit: bool) {
        if hit { self.chunk_hits.increment(1) } else { self.chunk_misses.increment(1) }
    }

    /// A prompt was read, `since_request` seconds after it came.
    pub fn first_token(&self, stats: &PrefillStats, since_request: f64) {
        self.first_token.record(since_request);
        self.queue_time.record(stats.queue_seconds);
        self.prefill_time.record(stats.seconds);
        self.prompt_tokens.increment(stats.prompt_tokens as u64);
        self.prompt_tokens_cached.increment((stats.reused_tokens + stats.prefix_tokens) as u64);
        self.tokens_reused.increment(stats.reused_tokens as u64);
        self.tokens_recomputed.increment(stats.recomputed_tokens as u64);
        self.failed_chunks.increment(stats.failed_chunks as u64);
        if let Some(deviation) = stats.blend_deviation {
            self.deviation.record(f64::from(deviation));
        }
        if let Some(share) = stats.charged_share {
            self.charged.record(f64::from(share));
        }
        if let Some(gate) = stats.gate {
            let labels = [("model_name", self.model.clone()), ("reason", gate.reason.to_string())];
            counter!("quire:blend_gate_total", &labels).increment(1);
        }
    }

    /// A question over a collection was compared with full recompute: how far it was apart, in nats, whether its first tokens were the
    /// same, and how the collection's questions are blended from now on.
    pub(crate) fn sample(&self, collection: &str, divergence: f64, same: bool, level: Level) {
        let labels = || [("model_name", self.model.clone()), ("collection", collection.to_owned())];
        let [model, collection] = labels();
        let outcome = ("outcome", if same { "same" } else { "differs" }.to_owned());
        counter!("quire:monitor_samples_total", &[model, collection, outcome]).increment(1);
        histogram!("quire:monitor_divergence", &labels()).record(divergence);
        gauge!("quire:monitor_level", &labels()).set(f64::from(level.number()));
    }

    /// A question that was to be compared was not: the server was never idle, or too many waited.
    pub(crate) fn sample_dropped(&self) {
        counter!("quire:monitor_dropped_total", "model_name" => self.model.clone()).increment(1);
    }

    /// Another token came, so many seconds after the one before.
    pub fn next_token(&self, seconds: f64) {
        self.inter_token.record(seconds);
    }

    /// An answer is complete, `seconds` after its request came.
    pub fn finished(&self, reason: &'static str, usage: &Usage, decode: &DecodeStats, seconds: f64) {
        let labels = [("model_name", self.model.clone()), ("finished_reason", reason.to_string())];
        counter!(format!("{}:request_success_total", self.prefix), &labels).increment(1);
        self.end_to_end.record(seconds);
        self.decode_time.record(decode.seconds);
        self.generation_tokens.increment(usage.completion_tokens as u64);
        if decode.cold_keys > 0 && decode.steps > 0 {
            self.keys_scanned.record(decode.keys_scored as f64 / decode.steps as f64);
            self.index_build.record(decode.index_build_seconds);
        }
    }

    /// Brings up to date what the engine keeps near of chunks: in the host's memory, and in a GPU's.
    pub fn tiers(&self, tiers: &[TierLoad; 2]) {
        for (tier, load) in ["host", "device"].into_iter().zip(tiers).filter(|(_, load)| load.budget > 0) {
            let labels = [("model_name", self.model.clone()), ("tier", tier.to_string())];
            counter!("quire:chunk_hits_total", &labels).absolute(load.hits);
            gauge!("quire:chunk_bytes", &labels).set(load.bytes as f64);
            gauge!("quire:chunks", &labels).set(load.chunks as f64);
        }
    }

    /// Brings what is a state, not an event, up to date.
    pub fn state(&self, load: &EngineLoad, chunks: u64, bytes: u64, corrupt_reads: u64) {
        self.running.set(load.running as f64);
        self.waiting.set(load.waiting as f64);
        self.kv_usage.set(load.kv_bytes as f64 / (load.kv_budget_bytes.max(1)) as f64);
        self.preemptions.absolute(load.preemptions);
        self.cache_queries.absolute(load.prefix_queries);
        self.cache_hits.absolute(load.prefix_hits);
        self.chunks.set(chunks as f64);
        self.chunk_bytes.set(bytes as f64);
        self.corruption.absolute(corrupt_reads);
    }
}
