//! Which type a flag takes for a setting.

use std::fmt::Display;
use std::path::PathBuf;
use std::str::FromStr;

use clap::builder::ValueParser;
use clap::value_parser;

use super::values::{Bytes, Named, Secret};

/// The type a flag takes for a setting of this type: that of the value itself, also where it is optional.
pub trait Flag {
    /// What the flag takes.
    type Value: Clone + Send + Sync + 'static;
    /// Whether it is true or false.
    const SWITCH: bool = false;
    /// Whether it is shown nowhere.
    const SECRET: bool = false;
    /// Reads it.
    fn parser() -> ValueParser;
}

macro_rules! plain_flags {
    ($($type:ty),*) => { $(impl Flag for $type {
        type Value = $type;
        fn parser() -> ValueParser {
            value_parser!($type).into()
        }
    })* }
}
plain_flags!(String, PathBuf, Bytes);

macro_rules! number_flags {
    ($($type:ty: $expected:literal,)*) => { $(impl Flag for $type {
        type Value = $type;
        fn parser() -> ValueParser {
            ValueParser::new(|text: &str| {
                text.trim().parse::<$type>().map_err(|_| format!(concat!("expected ", $expected, ", found `{}`"), text))
            })
        }
    })* }
}
number_flags! {
    usize: "a whole number of at least 0",
    u64: "a whole number of at least 0",
    u16: "a whole number from 0 to 65535",
    f32: "a number such as 0.15",
}

impl Flag for bool {
    type Value = bool;
    const SWITCH: bool = true;
    fn parser() -> ValueParser {
        value_parser!(bool)
    }
}
impl Flag for Secret {
    type Value = Secret;
    const SECRET: bool = true;
    fn parser() -> ValueParser {
        ValueParser::new(|text: &str| text.parse::<Secret>())
    }
}
impl<T> Flag for Named<T>
where
    T: Clone + Send + Sync + FromStr<Err: Display> + 'static,
{
    type Value = Named<T>;
    fn parser() -> ValueParser {
        ValueParser::new(|text: &str| text.parse::<T>().map(Named).map_err(|e| e.to_string()))
    }
}
impl<T: Flag> Flag for Option<T> {
    type Value = T::Value;
    fn parser() -> ValueParser {
        T::parser()
    }
    const SWITCH: bool = T::SWITCH;
    const SECRET: bool = T::SECRET;
}
