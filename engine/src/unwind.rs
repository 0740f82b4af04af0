//! Where panics end. A panic is a defect; it costs what was being done, not the requests beside it and not the process.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::error::{EngineError, Result};

/// Runs `work`, and turns a panic into [`EngineError::Panicked`]. `doing` names the work in the error. Whatever `work` may
/// have left half done must not be used after that.
pub(crate) fn guarded<T>(doing: &'static str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let done = catch_unwind(AssertUnwindSafe(work));
    done.unwrap_or_else(|panic| Err(EngineError::Panicked { doing, message: message(&*panic) }))
}

/// What a panic says.
pub(crate) fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "it says nothing".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_an_error_that_says_what_was_done_and_what_happened() {
        let said = guarded("reading", || -> Result<()> { panic!("row {} of 3", 4) }).unwrap_err().to_string();
        assert!(said.contains("reading") && said.contains("row 4 of 3"), "{said}");
        assert!(guarded("reading", || -> Result<()> { panic!("plain") }).unwrap_err().to_string().contains("plain"));
        let odd = guarded("reading", || -> Result<()> { std::panic::panic_any(7) });
        assert!(matches!(odd, Err(EngineError::Panicked { doing: "reading", .. })));
        assert_eq!(guarded("reading", || Ok(5)).unwrap(), 5);
        assert!(matches!(
            guarded("reading", || -> Result<()> { Err(EngineError::Cancelled) }),
            Err(EngineError::Cancelled)
        ));
    }
}
