//! Filters over attributes, as requests say them.

use serde_json::Value;

use super::super::fields::Fields;
use super::super::values::{brief, cut, invalid};
use service::{Comparison, Filter};
use settings::Result;

/// Filters within filters at most, filters of one request at most, and values of one list at most.
const DEEPEST: usize = 16;
const MOST: usize = 256;
const MOST_VALUES: usize = 1000;

const KNOWN: &str = "a filter takes type, key and value; of type `and` or `or`: type and filters";

/// Reads a filter, called `name` in errors.
pub(super) fn read(name: &str, value: Value) -> Result<Filter> {
    read_within(name, value, DEEPEST, &mut MOST.clone())
}

fn read_within(name: &str, value: Value, depth: usize, left: &mut usize) -> Result<Filter> {
    if depth == 0 {
        return Err(invalid(name, format!("expected at most {DEEPEST} filters within one another")));
    }
    *left = left.checked_sub(1).ok_or_else(|| invalid(name, format!("expected at most {MOST} filters in all")))?;
    let mut fields = Fields::within(name, value, KNOWN)?;
    let kind = fields.required("type")?;
    let filter = match kind.as_str() {
        "and" | "or" => {
            let place = fields.name("filters");
            let items = fields.list("filters")?.filter(|items| !items.is_empty());
            let items = items.ok_or_else(|| invalid(&place, "expected at least one filter".into()))?;
            let each = |(index, item)| read_within(&format!("{place}[{index}]"), item, depth - 1, left);
            let filters = items.into_iter().enumerate().map(each).collect::<Result<_>>()?;
            if kind == "and" { Filter::And(filters) } else { Filter::Or(filters) }
        }
        other => read_comparison(other, &mut fields)?,
    };
    fields.finish()?;
    Ok(filter)
}

fn read_comparison(kind: &str, fields: &mut Fields) -> Result<Filter> {
    let comparison = match kind {
        "eq" => Comparison::Eq,
        "ne" => Comparison::Ne,
        "gt" => Comparison::Gt,
        "gte" => Comparison::Gte,
        "lt" => Comparison::Lt,
        "lte" => Comparison::Lte,
        "in" => Comparison::In,
        "nin" => Comparison::Nin,
        other => {
            let problem = format!("expected eq, ne, gt, gte, lt, lte, in, nin, and or or, found `{}`", cut(other));
            return Err(invalid(&fields.name("type"), problem));
        }
    };
    let (key, place) = (fields.required("key")?, fields.name("value"));
    let value = fields.take("value").unwrap_or(Value::Null);
    check_value(&place, comparison, &value)?;
    Ok(Filter::Compare { key, comparison, value })
}

fn check_value(place: &str, comparison: Comparison, value: &Value) -> Result<()> {
    let ordered = |value: &Value| value.is_string() || value.is_number();
    let scalar = |value: &Value| ordered(value) || value.is_boolean();
    let (fits, expected) = match comparison {
        Comparison::In | Comparison::Nin => {
            let fits = |values: &Vec<Value>| values.len() <= MOST_VALUES && values.iter().all(scalar);
            (value.as_array().is_some_and(fits), "a list of at most 1000 texts or numbers")
        }
        Comparison::Eq | Comparison::Ne => (scalar(value), "a text, a number, true or false"),
        _ => (ordered(value), "a text or a number"),
    };
    if fits { Ok(()) } else { Err(invalid(place, format!("expected {expected}, found {}", brief(value)))) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::values::param_of;
    use serde_json::json;

    #[test]
    fn filters_are_read_with_all_that_they_hold() {
        let filter = json!({"type": "and", "filters": [
            {"type": "in", "key": "author", "value": ["Ada", "Bo"]},
            {"type": "or", "filters": [{"type": "gte", "key": "year", "value": 1900},
                                       {"type": "eq", "key": "public", "value": true}]}]});
        let filter = read("filters", filter).unwrap();
        let admits = |attributes: Value| filter.admits(attributes.as_object().unwrap());
        assert!(admits(json!({"author": "Ada", "year": 1901})) && admits(json!({"author": "Bo", "public": true})));
        assert!(!admits(json!({"author": "Ada", "year": 1899})) && !admits(json!({"year": 1901, "public": true})));
    }

    #[test]
    fn what_is_wrong_with_a_filter_is_named_by_its_place() {
        let mut deep = json!({"type": "eq", "key": "a", "value": 1});
        for _ in 0..DEEPEST {
            deep = json!({"type": "and", "filters": [deep]});
        }
        let comparison = json!({"type": "eq", "key": "a", "value": 1});
        for (filter, place) in [
            (json!([]), "filters"),
            (json!({"type": "magic", "key": "a", "value": 1}), "filters.type"),
            (json!({"type": "eq", "value": 1}), "filters.key"),
            (json!({"type": "eq", "key": "a"}), "filters.value"),
            (json!({"type": "eq", "key": "a", "value": [1]}), "filters.value"),
            (json!({"type": "gt", "key": "a", "value": true}), "filters.value"),
            (json!({"type": "in", "key": "a", "value": 1}), "filters.value"),
            (json!({"type": "in", "key": "a", "value": vec![1; MOST_VALUES + 1]}), "filters.value"),
            (json!({"type": "and", "filters": []}), "filters.filters"),
            (
                json!({"type": "or", "filters": [{"type": "nin", "key": "a", "value": [[]]}]}),
                "filters.filters[0].value",
            ),
            (json!({"type": "eq", "key": "a", "value": 1, "filters": []}), "filters.filters"),
            (json!({"type": "or", "filters": vec![comparison; MOST]}), "filters.filters[255]"),
        ] {
            assert_eq!(param_of(read("filters", filter.clone()).unwrap_err()), place, "{filter}");
        }
        assert!(read("filters", deep).unwrap_err().to_string().contains("at most 16"));
    }
}
