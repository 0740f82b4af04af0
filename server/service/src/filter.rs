//! Which files a search is about, by their attributes.

use serde_json::{Map, Value};

/// What attributes must be like.
#[derive(Clone, Debug, PartialEq)]
pub enum Filter {
    /// One attribute compares so with a value.
    Compare {
        /// The attribute's name.
        key: String,
        /// How it is compared.
        comparison: Comparison,
        /// With what: a list where the comparison is one of membership.
        value: Value,
    },
    /// All of these hold.
    And(Vec<Filter>),
    /// At least one of these holds.
    Or(Vec<Filter>),
}

/// How two values are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Comparison {
    /// They are equal.
    Eq,
    /// They are not.
    Ne,
    /// The attribute is greater.
    Gt,
    /// The attribute is greater or equal.
    Gte,
    /// The attribute is smaller.
    Lt,
    /// The attribute is smaller or equal.
    Lte,
    /// The attribute is one of a list.
    In,
    /// The attribute is none of a list.
    Nin,
}

impl Filter {
    /// Whether these attributes are as they must be. Numbers are compared with numbers and texts with texts, by their
    /// characters; what cannot be compared, as an attribute that is missing, is unequal and neither smaller nor greater.
    #[must_use]
    pub fn admits(&self, attributes: &Map<String, Value>) -> bool {
        match self {
            Filter::And(filters) => filters.iter().all(|filter| filter.admits(attributes)),
            Filter::Or(filters) => filters.iter().any(|filter| filter.admits(attributes)),
            Filter::Compare { key, comparison, value } => comparison.holds(attributes.get(key), value),
        }
    }
}

impl Comparison {
    fn holds(self, found: Option<&Value>, value: &Value) -> bool {
        use std::cmp::Ordering::{Equal, Greater, Less};
        let order = found.and_then(|found| compare(found, value));
        let member = || {
            let among = value.as_array().into_iter().flatten();
            found.is_some_and(|found| among.into_iter().any(|value| compare(found, value) == Some(Equal)))
        };
        match self {
            Comparison::Eq => order == Some(Equal),
            Comparison::Ne => order != Some(Equal),
            Comparison::Gt => order == Some(Greater),
            Comparison::Gte => matches!(order, Some(Greater | Equal)),
            Comparison::Lt => order == Some(Less),
            Comparison::Lte => matches!(order, Some(Less | Equal)),
            Comparison::In => member(),
            Comparison::Nin => !member(),
        }
    }
}

/// `None` for values of two kinds.
fn compare(a: &Value, b: &Value) -> Option<std::cmp::Ordering> {
    match (a, b) {
        (Value::String(a), Value::String(b)) => Some(a.cmp(b)),
        (Value::Bool(a), Value::Bool(b)) => Some(a.cmp(b)),
        (Value::Number(a), Value::Number(b)) => match (a.as_i64(), b.as_i64()) {
            (Some(a), Some(b)) => Some(a.cmp(&b)),
            _ => a.as_f64()?.partial_cmp(&b.as_f64()?),
        },
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    fn admits(comparison: Comparison, value: Value) -> bool {
        let attributes = json!({"author": "Ada", "year": 1851, "share": 0.5, "public": true});
        let attributes = attributes.as_object().unwrap();
        let compare = |key: &str| Filter::Compare { key: key.into(), comparison, value: value.clone() };
        let any = ["author", "year", "share", "public"].map(|key| compare(key).admits(attributes));
        // A missing attribute is like one of another kind.
        assert_eq!(compare("missing").admits(attributes), matches!(comparison, Comparison::Ne | Comparison::Nin));
        match comparison {
            Comparison::Ne | Comparison::Nin => any.iter().all(|admitted| *admitted),
            _ => any.iter().any(|admitted| *admitted),
        }
    }

    #[test]
    fn values_are_compared_with_values_of_their_kind() {
        use Comparison::{Eq, Gt, Gte, In, Lt, Lte, Ne, Nin};
        for (comparison, value) in [
            (Eq, json!("Ada")),
            (Eq, json!(1851.0)),
            (Eq, json!(true)),
            (Ne, json!("ada")),
            (Ne, json!("1851")),
            (Gt, json!("Acb")),
            (Gt, json!(1850)),
            (Gte, json!(1851)),
            (Lt, json!(0.6)),
            (Lte, json!(0.5)),
            (In, json!(["x", "Ada"])),
            (In, json!([1, 1851])),
            (Nin, json!(["x", 7, "1851"])),
            (Nin, json!([])),
        ] {
            assert!(admits(comparison, value.clone()), "{comparison:?} {value}");
        }
        for (comparison, value) in [
            (Eq, json!("1851")),
            (Eq, json!(1)),
            (Ne, json!(1851)),
            (Gt, json!(1851)),
            (Gt, json!("B")),
            (Lt, json!(0.5)),
            (Gte, json!("x")),
            (In, json!([])),
            (In, json!([2, "ada"])),
            (Nin, json!([true])),
        ] {
            assert!(!admits(comparison, value.clone()), "{comparison:?} {value}");
        }
        let large = |number: i64| json!({"n": number}).as_object().unwrap().clone();
        let exact = Filter::Compare { key: "n".into(), comparison: Eq, value: json!(i64::MAX) };
        assert!(exact.admits(&large(i64::MAX)) && !exact.admits(&large(i64::MAX - 1)));
    }

    #[test]
    fn filters_are_joined_by_and_and_or() {
        let year = |comparison, year: i32| Filter::Compare { key: "year".into(), comparison, value: json!(year) };
        let old = || year(Comparison::Lt, 1900);
        let not_1851 = || year(Comparison::Ne, 1851);
        let of = |found: i32| json!({"year": found}).as_object().unwrap().clone();
        let both = Filter::And(vec![old(), not_1851()]);
        let either = Filter::Or(vec![old(), not_1851()]);
        assert_eq!([1850, 1851, 1950].map(|found| both.admits(&of(found))), [true, false, false]);
        assert_eq!([1850, 1851, 1950].map(|found| either.admits(&of(found))), [true, true, true]);
        assert!(Filter::And(vec![]).admits(&of(0)) && !Filter::Or(vec![]).admits(&of(0)));
    }
}
