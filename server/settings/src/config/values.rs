//! The types of settings that are more than a number or a text: how they are written, read and shown.

use std::fmt;
use std::ops::Deref;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A value that is written as its name: parsed and printed by the type's own `FromStr` and `Display`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Named<T>(pub T);

impl<T: FromStr> FromStr for Named<T> {
    type Err = T::Err;
    fn from_str(text: &str) -> std::result::Result<Self, T::Err> {
        text.parse().map(Named)
    }
}

impl<T: fmt::Display> fmt::Display for Named<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<T: fmt::Display> Serialize for Named<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

impl<'de, T: FromStr<Err: fmt::Display>> Deserialize<'de> for Named<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map(Named).map_err(serde::de::Error::custom)
    }
}

/// The number format of KV.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvFormat {
    /// bf16 when the weights have 16 bits, else f32.
    Auto,
    /// Always f32.
    F32,
    /// Always bf16.
    Bf16,
}

impl FromStr for KvFormat {
    type Err = String;
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "auto" => Ok(KvFormat::Auto),
            "f32" => Ok(KvFormat::F32),
            "bf16" => Ok(KvFormat::Bf16),
            other => Err(format!("KV format: expected auto, f32 or bf16, found `{other}`")),
        }
    }
}

impl fmt::Display for KvFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            KvFormat::Auto => "auto",
            KvFormat::F32 => "f32",
            KvFormat::Bf16 => "bf16",
        })
    }
}

/// Where sampling comes from that neither a request nor a setting names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GenerationSource {
    /// The model's `generation_config.json`, then the defaults of the OpenAI API.
    Auto,
    /// The defaults of the OpenAI API.
    None,
}

impl FromStr for GenerationSource {
    type Err = String;
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "auto" => Ok(GenerationSource::Auto),
            "none" => Ok(GenerationSource::None),
            other => Err(format!("generation config: expected auto or none, found `{other}`")),
        }
    }
}

impl fmt::Display for GenerationSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            GenerationSource::Auto => "auto",
            GenerationSource::None => "none",
        })
    }
}

/// Checks what is to be logged: a level, or a filter as of tracing. A word that is no level names a part of the program, of
/// which everything would be logged; what was meant is a level, as a rule.
///
/// # Errors
/// What was expected and what came.
pub(crate) fn check_log(filter: &str) -> std::result::Result<(), String> {
    let levels = ["off", "error", "warn", "info", "debug", "trace"];
    let level = |word: &str| levels.iter().any(|level| word.eq_ignore_ascii_case(level));
    let expected = "expected off, error, warn, info, debug, trace, or a filter such as `info,quire=debug`";
    let directives = filter.split(',').map(str::trim).filter(|directive| !directive.is_empty());
    for directive in directives {
        if !level(directive) && directive.chars().all(|c| c.is_alphanumeric() || matches!(c, '_' | '-' | ':')) {
            return Err(format!(
                "{expected}, found `{directive}`: a part of the program has a level, as in `{directive}=debug`"
            ));
        }
    }
    tracing_subscriber::EnvFilter::try_new(filter).map(drop).map_err(|e| format!("{expected}, found `{filter}`: {e}"))
}

/// A number of bytes: written as a plain number or with a unit, as in `8G`, `512M` or `1.5GiB`.
///
/// K, M, G, T (also KiB, MiB, GiB, TiB) are powers of 1024; KB, MB, GB, TB are powers of 1000. Capitals and small
/// letters mean the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub u64);

/// What a size may look like, for messages.
const SIZE: &str = "expected a number of bytes such as 1048576, 512M, 8G or 1.5GiB";

impl FromStr for Bytes {
    type Err = String;
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let wrong = || format!("{SIZE}, found `{text}`");
        let trimmed = text.trim();
        let digits = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
        let (number, unit) = trimmed.split_at(digits);
        let unit: u128 = match unit.trim_start().to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            "k" | "kib" => 1 << 10,
            "m" | "mib" => 1 << 20,
            "g" | "gib" => 1 << 30,
            "t" | "tib" => 1 << 40,
            "kb" => 1_000,
            "mb" => 1_000_000,
            "gb" => 1_000_000_000,
            "tb" => 1_000_000_000_000,
            _ => return Err(wrong()),
        };
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        // Beyond these digits there is nothing that a byte could tell apart; the product stays far below 128 bits.
        if whole.is_empty() || whole.len() > 20 || fraction.len() > 12 || number.ends_with('.') {
            return Err(wrong());
        }
        let parse = |digits: &str| digits.parse::<u128>().map_err(|_| wrong());
        let scale = 10u128.pow(fraction.len() as u32);
        let parts = if fraction.is_empty() { 0 } else { parse(fraction)? };
        let bytes = parse(whole)? * unit + parts * unit / scale;
        u64::try_from(bytes).map(Bytes).map_err(|_| format!("{SIZE}, found `{text}`, which is beyond 64 bits"))
    }
}

/// The shortest exact form: `8G`, `1536M`, `1000`.
impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(40, "T"), (30, "G"), (20, "M"), (10, "K")] {
            if self.0 > 0 && self.0.trailing_zeros() >= shift {
                return write!(f, "{}{unit}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

/// As a plain number, for programs.
impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.0)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = Bytes;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of bytes such as 1048576, \"512M\", \"8G\" or \"1.5GiB\"")
            }
            fn visit_u64<E: serde::de::Error>(self, bytes: u64) -> std::result::Result<Bytes, E> {
                Ok(Bytes(bytes))
            }
            fn visit_i64<E: serde::de::Error>(self, bytes: i64) -> std::result::Result<Bytes, E> {
                u64::try_from(bytes).map(Bytes).map_err(|_| E::custom(format!("{SIZE}, found `{bytes}`")))
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> std::result::Result<Bytes, E> {
                text.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// A text that is shown nowhere: its `Debug` does not contain it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(pub String);

impl Deref for Secret {
    type Target = str;
    fn deref(&self) -> &str {
        &self.0
    }
}

impl FromStr for Secret {
    type Err = std::convert::Infallible;
    fn from_str(text: &str) -> std::result::Result<Self, Self::Err> {
        Ok(Secret(text.into()))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn sizes_are_read_with_and_without_units() {
        let bytes = |text: &str| text.parse::<Bytes>().unwrap().0;
        assert_eq!([bytes("0"), bytes("1048576"), bytes("12b")], [0, 1 << 20, 12]);
        assert_eq!([bytes("8G"), bytes("8g"), bytes("8GiB"), bytes("8 GiB")], [8 << 30; 4]);
        assert_eq!([bytes("512M"), bytes("1.5GiB"), bytes("0.5K")], [512 << 20, 3 << 29, 512]);
        assert_eq!([bytes("8GB"), bytes("2kb"), bytes("1T")], [8_000_000_000, 2000, 1 << 40]);
        assert_eq!(bytes("18446744073709551615"), u64::MAX);
        for wrong in ["", "G", "-1", "1.", ".5", "8X", "8GG", "1e9", "18446744073709551616", "99999999T", "1.2.3"] {
            let problem = wrong.parse::<Bytes>().unwrap_err();
            assert!(problem.contains("8G or 1.5GiB") && problem.contains(&format!("`{wrong}`")), "{problem}");
        }
    }

    #[test]
    fn sizes_are_shown_so_that_they_are_read_back_the_same() {
        for (bytes, shown) in [(0, "0"), (1000, "1000"), (8 << 30, "8G"), (3 << 29, "1536M"), (1 << 50, "1024T")] {
            assert_eq!(Bytes(bytes).to_string(), shown);
            assert_eq!(shown.parse(), Ok(Bytes(bytes)));
        }
    }

    #[test]
    fn what_is_logged_is_a_level_or_a_filter() {
        for right in
            ["warn", "INFO", "off", "", "info,quire=debug", "quire::http=trace", "debug,hyper=off", "[span]=info"]
        {
            check_log(right).unwrap();
        }
        for wrong in ["foo", "info,foo", "verbose", "quire=loud", "2x"] {
            let error = check_log(wrong).unwrap_err();
            assert!(error.contains("`info,quire=debug`") && error.contains("found `"), "{error}");
        }
    }

    #[test]
    fn a_secret_is_not_in_its_debug_text() {
        assert!(!format!("{:?}", Some(Secret("hunter2".into()))).contains("hunter2"));
        assert_eq!(&*Secret("hunter2".into()), "hunter2");
    }
}
