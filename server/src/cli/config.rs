//! `quire config show`.

use serde_json::{Map, Value, json};

use super::output::Out;
use settings::{Config, SETTINGS};

pub(super) fn show(config: &Config, out: &Out) {
    let mut values = serde_json::to_value(&config.settings).unwrap_or_default();
    // A key belongs into no terminal and no log.
    for setting in SETTINGS.iter().filter(|setting| setting.secret) {
        if !values[setting.key].is_null() {
            values[setting.key] = "(set)".into();
        }
    }
    if out.json {
        let entry = |(key, origin): &(&'static str, String)| {
            (key.to_string(), json!({"value": values[*key], "origin": origin}))
        };
        out.value(&config.origins.iter().map(entry).collect::<Map<String, Value>>());
        return;
    }
    for (key, origin) in &config.origins {
        let value = match &values[*key] {
            Value::Null => "(none)".to_string(),
            Value::String(text) if text.is_empty() => "(empty)".to_string(),
            Value::String(text) => text.clone(),
            // Settings with fractions are of single precision: 0.15, not 0.15000000596046448.
            Value::Number(number) if number.is_f64() => {
                number.as_f64().map_or_else(String::new, |x| (x as f32).to_string())
            }
            other => other.to_string(),
        };
        out.line(format!("{key:18} {value:32} {origin}"));
    }
}
