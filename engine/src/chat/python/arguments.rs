//! The arguments of a call, by place or by name as in Python.

use minijinja::Error;
use minijinja::value::{ArgType, Kwargs, Value};

use super::{Result, failed};

/// What a function or method was given.
pub(super) struct Arguments<'a> {
    name: &'a str,
    placed: &'a [Value],
    named: Kwargs,
}

impl<'a> Arguments<'a> {
    /// Takes what a call passes; errors begin with the `name` of what is called.
    pub(super) fn new(name: &'a str, args: &'a [Value]) -> Result<Self> {
        let (placed, named) = match args.split_last() {
            Some((last, before)) if last.is_kwargs() => (before, Kwargs::try_from(last.clone())?),
            _ => (args, Kwargs::from_iter(std::iter::empty::<(String, Value)>())),
        };
        Ok(Arguments { name, placed, named })
    }

    /// The argument at `place`, or the one of this `keyword`.
    pub(super) fn value(&self, place: usize, keyword: &str) -> Result<Option<Value>> {
        let named: Option<Value> = if keyword.is_empty() { None } else { self.named.get(keyword)? };
        match (self.placed.get(place), named) {
            (Some(_), Some(_)) => Err(failed(format!("{}: {keyword} is given twice", self.name))),
            (placed, named) => Ok(placed.cloned().or(named)),
        }
    }

    /// The same as a type; none stands for an absent one.
    pub(super) fn optional<T>(&self, place: usize, keyword: &str) -> Result<Option<T>>
    where
        T: for<'v> ArgType<'v, Output = T>,
    {
        let value = self.value(place, keyword)?.filter(|value| !value.is_none());
        value.map(|value| T::from_value(Some(&value))).transpose().map_err(|error| self.wrong(&error))
    }

    /// A text; none stands for an absent one.
    pub(super) fn text(&self, place: usize, keyword: &str) -> Result<Option<String>> {
        let value = self.value(place, keyword)?.filter(|value| !value.is_none());
        let text = |value: Value| match value.as_str() {
            Some(text) => Ok(text.to_string()),
            None => Err(failed(format!("{}: expected a text, found a {}", self.name, value.kind()))),
        };
        value.map(text).transpose()
    }

    /// A text that must be there.
    pub(super) fn required_text(&self, place: usize) -> Result<String> {
        self.text(place, "")?.ok_or_else(|| self.missing(place))
    }

    /// An argument that must be there.
    pub(super) fn required<T>(&self, place: usize) -> Result<T>
    where
        T: for<'v> ArgType<'v, Output = T>,
    {
        self.optional(place, "")?.ok_or_else(|| self.missing(place))
    }

    /// Refuses what is more than the function takes: `places` by their place, and names that were not asked for.
    pub(super) fn end(&self, places: usize) -> Result<()> {
        if self.placed.len() > places {
            return Err(failed(format!("{}: expected at most {places} arguments", self.name)));
        }
        self.named.assert_all_used().map_err(|error| self.wrong(&error))
    }

    fn missing(&self, place: usize) -> Error {
        failed(format!("{}: expected argument {}, found none", self.name, place + 1))
    }

    fn wrong(&self, error: &Error) -> Error {
        failed(format!("{}: {}", self.name, error.detail().unwrap_or("wrong arguments")))
    }
}
