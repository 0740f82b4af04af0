//! How inner products become the distances that a proximity graph is built from.
//!
//! Adding a coordinate that brings all keys to one norm turns the search for the largest inner
//! product into a search for the nearest point: Bachrach et al., "Speeding up the Xbox recommender
//! system using a Euclidean transformation for inner-product spaces" (RecSys 2014), section 4.
//! Before that the keys are centred, which changes no order of inner products with a query and
//! leaves a far smaller norm to level when the keys share a large mean.

use hnsw_rs::anndists::dist::distances::Distance;
use std::sync::Arc;

use super::visits;
use crate::element::Element;
use crate::metric::{dot, squared_distance};
use crate::rows::Rows;

/// How much longer than the longest key at the start a key may be. It is then lifted by 0 and lies
/// outside the sphere: the order of inner products with a query does not depend on the lift, so
/// such a key is still found, but the links around it are chosen less well.
const HEADROOM: f64 = 1.5;

/// Brings centred keys to one norm.
pub(super) struct Lift {
    pub(super) center: Vec<f32>,
    radius: f64,
}

impl Lift {
    /// The centre of the given rows, and the longest distance from it.
    pub(super) fn of<T: Element>(rows: &Rows<T>, ids: &[u32]) -> Self {
        let mut sums = vec![0.0f64; rows.dim()];
        let mut key = vec![0.0; rows.dim()];
        for &id in ids {
            T::decode(rows.row(id as usize), &mut key);
            for (sum, x) in sums.iter_mut().zip(&key) {
                *sum += f64::from(*x);
            }
        }
        let count = ids.len().max(1) as f64;
        let center = sums.iter().map(|sum| (sum / count) as f32).collect();
        let mut lift = Self { center, radius: 0.0 };
        let norms = ids.iter().map(|&id| lift.norm(rows.row(id as usize)));
        lift.radius = norms.fold(0.0, f64::max);
        lift
    }

    /// The distance of a row from the centre.
    pub(super) fn norm<T: Element>(&self, row: &[T]) -> f64 {
        f64::from(squared_distance(&self.center, row)).sqrt()
    }

    /// Whether a row of this norm is still lifted well enough.
    pub(super) fn covers(&self, norm: f64) -> bool {
        norm <= HEADROOM * self.radius
    }

    /// The added coordinate of a row of this norm.
    pub(super) fn height(&self, norm: f64) -> f32 {
        (self.radius * self.radius - norm * norm).max(0.0).sqrt() as f32
    }
}

/// A key as the graph holds it: its number and the height of its lift. The numbers of the key
/// itself stay in the rows.
pub(super) fn point(id: u32, height: f32) -> [f32; POINT] {
    [f32::from_bits(id), height]
}

const POINT: usize = 2;

/// A query as it is handed to the graph. `ceiling` is at least every inner product with it.
pub(super) fn probe(query: &[f32], ceiling: f32) -> Vec<f32> {
    let mut probe = Vec::with_capacity(POINT + query.len());
    probe.extend([f32::NAN, ceiling]);
    probe.extend_from_slice(query);
    probe
}

/// Distances between two points, or a probe and a point, told apart by their lengths. Those of a
/// probe are noted down for the search that runs on this thread.
pub(super) struct LiftedDistance<T>(pub(super) Arc<Rows<T>>);

impl<T: Element> Distance<f32> for LiftedDistance<T> {
    fn eval(&self, a: &[f32], b: &[f32]) -> f32 {
        let id = b[0].to_bits();
        let row = self.0.row(id as usize);
        if a.len() == POINT {
            let other = self.0.row(a[0].to_bits() as usize);
            let rise = a[1] - b[1];
            return squared_distance(other, row) + rise * rise;
        }
        let score = dot(&a[POINT..], row);
        visits::note(id, score);
        // The walk only compares such distances with each other; any falling function of the
        // product will do. `hnsw_rs` insists on one that is not negative.
        (a[1] - score).max(0.0)
    }
}
