//! What was measured, as records and as curves.

use serde_json::{Value, json};

use super::heads::{Curve, Point as MassPoint};
use super::side::{Built, Pass};
use super::svg::{Chart, Series, render};
use super::sweep::{Point, TARGET, touched_at_target};
use crate::record::{Record, RunInfo};
use crate::speed::round;
use crate::stats::mean;

/// The bench that all records here belong to.
pub(super) const BENCH: &str = "index";

/// One side, measured.
pub(super) struct Timed {
    pub(super) name: &'static str,
    pub(super) is_peer: bool,
    pub(super) knob_name: Option<String>,
    pub(super) built: Built,
    /// On the tuning queries.
    pub(super) curve: Vec<Point>,
    /// The setting that is reported.
    pub(super) knob: usize,
    /// Whether any setting reaches the target.
    pub(super) reaches: bool,
    /// Test queries with that setting.
    pub(super) at: Pass,
    /// How many.
    pub(super) queries: usize,
    /// Test queries with the largest setting within these shares of the keys.
    pub(super) budgets: Vec<(f64, Pass)>,
    /// Test queries with a setting that is asked for by name.
    pub(super) fixed: Option<Pass>,
    /// Microseconds, a round each.
    pub(super) latencies: Vec<f64>,
    pub(super) batched: Vec<f64>,
    /// Keys that a query of a group reads, shared ones counted once; `None` where the library does not tell.
    pub(super) batched_touched: Option<f64>,
}

/// The graph after keys were appended.
pub(super) struct Growth {
    pub(super) recall: f64,
    pub(super) touched: f64,
    pub(super) ef: usize,
    pub(super) appended: usize,
    pub(super) seconds: f64,
}

/// One data set, measured.
pub(super) struct Measured {
    pub(super) sides: Vec<Timed>,
    /// Exact neighbours of the sample queries.
    pub(super) knn_seconds: Option<f64>,
    /// Of the graph, before it grew.
    pub(super) link_bytes: Option<usize>,
    pub(super) growth: Option<Growth>,
    /// What one thread reads from a buffer of the keys' size, or from a large one if that is faster.
    pub(super) read_gb_s: f64,
    pub(super) peer_version: Option<String>,
}

/// What all records of a data set share.
pub(super) struct Frame<'a> {
    pub(super) info: &'a RunInfo,
    /// `ood/128k`
    pub(super) case: String,
    pub(super) config: Value,
    pub(super) keys: usize,
    pub(super) dim: usize,
    pub(super) k: usize,
    pub(super) threads: usize,
}

impl Frame<'_> {
    /// All records of a data set.
    pub(super) fn records(&self, measured: &Measured) -> Vec<Record> {
        measured.sides.iter().flat_map(|side| self.side(side, measured)).collect()
    }

    fn side(&self, side: &Timed, measured: &Measured) -> Vec<Record> {
        let info = self.info.clone().with_config(self.side_config(side, measured));
        let case = format!("{}/{}", self.case, side.name);
        let record = |metric: &str, unit: &str, value: f64, samples: usize| {
            info.record(BENCH, &case, metric, unit, round(value), samples)
        };
        let (queries, rounds) = (side.queries, side.latencies.len());
        let share = |touched: f64| touched / self.keys as f64;
        let mut records = vec![record(&format!("recall_at_{}", self.k), "ratio", side.at.recall.mean, queries)];
        records.extend(side.at.touched.map(|keys| record("keys_touched_share", "ratio", share(keys), queries)));
        records.extend(side.at.bytes.map(|bytes| record("bytes_touched", "B", bytes, queries)));
        records.push(record("latency_us", "us", side.latency_us(), rounds));
        records.push(record("latency_batched_us", "us", side.batched_us(), rounds));
        records.extend(
            side.batched_touched.map(|keys| record("keys_touched_batched_share", "ratio", share(keys), queries)),
        );
        records.push(record(&format!("build_seconds_{}cores", self.threads), "s", side.built.seconds, 1));
        records.push(record("memory", "MiB", side.built.bytes / f64::from(1 << 20), 1));
        for (budget, pass) in &side.budgets {
            let metric = format!("recall_at_{}_budget_{:.0}pct", self.k, budget * 100.0);
            records.push(record(&metric, "ratio", pass.recall.mean, queries));
        }
        match side.name {
            "graph" => records.extend(self.graph(side, measured, &record)),
            "flat" => {
                let rate = side.at.bytes.unwrap_or_default() / side.latency_us() / 1e3;
                records.push(record("bandwidth", "GB/s", rate, rounds));
                records.push(record("bandwidth_share", "ratio", rate / measured.read_gb_s, rounds));
            }
            "faiss-ivf" => records.extend(
                touched_at_target(&side.curve)
                    .map(|keys| record("keys_share_at_recall_95", "ratio", share(keys), queries)),
            ),
            _ => {}
        }
        let metric = format!("recall_at_{}_ef1024", self.k);
        records.extend(side.fixed.map(|pass| record(&metric, "ratio", pass.recall.mean, queries)));
        records
    }

    fn graph(
        &self,
        side: &Timed,
        measured: &Measured,
        record: &dyn Fn(&str, &str, f64, usize) -> Record,
    ) -> Vec<Record> {
        let mut records = Vec::new();
        records.extend(measured.knn_seconds.map(|seconds| record("knn_seconds", "s", seconds, 1)));
        // Of the keys in bf16.
        let key_bytes = (self.keys * self.dim * 2) as f64;
        records.extend(measured.link_bytes.map(|b| record("link_bytes_share", "ratio", b as f64 / key_bytes, 1)));
        if let Some(growth) = &measured.growth {
            records.push(record(
                "recall_loss_after_growth",
                "ratio",
                side.at.recall.mean - growth.recall,
                side.queries,
            ));
            records.push(record("append_keys_per_second", "keys/s", growth.appended as f64 / growth.seconds, 1));
        }
        let peers: Vec<(&str, f64)> = measured
            .sides
            .iter()
            .filter(|peer| peer.is_peer && peer.reaches)
            .map(|peer| (peer.name, peer.best_us() / side.latency_us()))
            .collect();
        let best = peers.iter().map(|(_, ratio)| *ratio).min_by(f64::total_cmp);
        if let Some(best) = best.filter(|_| side.reaches) {
            let mut speedup = record("speedup_over_best_peer", "ratio", best, side.latencies.len());
            speedup.peers = peers.into_iter().map(|(name, ratio)| (name.to_owned(), round(ratio))).collect();
            records.push(speedup);
        }
        records
    }

    fn side_config(&self, side: &Timed, measured: &Measured) -> Value {
        let mut config = self.config.clone();
        let mut more = json!({"settings": side.built.settings, "reaches_recall_95": side.reaches});
        if let Some(knob) = &side.knob_name {
            more["knob"] = format!("{knob}={}", side.knob).into();
        }
        match (side.name, &measured.growth) {
            ("flat", _) => more["read_gb_s"] = round(measured.read_gb_s).into(),
            ("graph", Some(growth)) => {
                more["growth"] = json!({
                    "keys": growth.appended, "ef": growth.ef, "recall": round(growth.recall),
                    "keys_touched": round(growth.touched), "keys_touched_before": side.at.touched.map(round),
                });
            }
            _ => {}
        }
        if let (true, Some(version)) = (side.is_peer, &measured.peer_version) {
            more["peer"] = version.as_str().into();
        }
        if let (Value::Object(config), Value::Object(more)) = (&mut config, more) {
            config.extend(more);
        }
        config
    }
}

impl Timed {
    /// The lower of the two times: of peers, where a call with one query includes the cost of calling from Python.
    fn best_us(&self) -> f64 {
        self.latency_us().min(self.batched_us())
    }
}

/// Recall against the share of keys read and against latency, side by side.
pub(super) fn recall_curves(measured: &Measured, title: &str, keys: usize, k: usize) -> String {
    let chart = |x_label: &str, x: &dyn Fn(&Pass) -> Option<f64>| {
        let series = measured.sides.iter().map(|side| Series {
            name: side.name.to_owned(),
            points: side.curve.iter().filter_map(|p| Some((x(&p.pass)?, p.pass.recall.mean))).collect(),
            dashed: side.is_peer,
        });
        Chart {
            title: title.to_owned(),
            x_label: x_label.to_owned(),
            y_label: format!("recall@{k}"),
            mark_y: Some(TARGET),
            series: series.filter(|series| !series.points.is_empty()).collect(),
        }
    };
    render(&[
        chart("share of the keys read", &|pass| pass.touched.map(|touched| touched / keys as f64)),
        chart("microseconds a query, one thread", &|pass| Some(pass.latency_us)),
    ])
}

/// A model's heads: attention recovered against the share of the keys read, each point a mean over groups.
pub(super) fn mass_curves(curves: &[Curve], title: &str) -> String {
    let mut series: Vec<Series> = Vec::new();
    for method in curves.iter().map(|curve| curve.method) {
        if series.iter().any(|series| series.name == method) {
            continue;
        }
        let of: Vec<&[MassPoint]> = curves.iter().filter(|c| c.method == method).map(|c| &c.points[..]).collect();
        // As far as all groups go, so that a point is of the same groups as the next.
        let len = of.iter().map(|points| points.len()).min().unwrap_or_default();
        let mean_at =
            |i: usize, figure: &dyn Fn(&MassPoint) -> f64| mean(&of.iter().map(|p| figure(&p[i])).collect::<Vec<_>>());
        let points = (0..len).map(|i| (mean_at(i, &|p| p.touched), mean_at(i, &|p| p.recovered))).collect();
        series.push(Series { name: method.to_owned(), points, dashed: method == "exact" });
    }
    render(&[Chart {
        title: title.to_owned(),
        x_label: "share of the cold keys read".to_owned(),
        y_label: "share of the attention on cold keys recovered".to_owned(),
        mark_y: None,
        series,
    }])
}
