//! Settings of who may reach a server: their types, and how they must be written.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use tower_http::csrf::CsrfLayer;

/// Names separated by commas, as a setting.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names(Vec<String>);

impl Names {
    /// The names.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }

    /// Whether it names none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether it names all.
    #[must_use]
    pub fn is_everything(&self) -> bool {
        self.iter().any(|name| name == "*")
    }
}

impl FromStr for Names {
    type Err = std::convert::Infallible;
    fn from_str(text: &str) -> Result<Names, Self::Err> {
        Ok(Names(text.split(',').map(str::trim).filter(|name| !name.is_empty()).map(str::to_string).collect()))
    }
}

impl fmt::Display for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join(","))
    }
}

/// Checks that origins are written as browsers send them: `https://app.example`, without a path.
///
/// # Errors
/// What was expected and what came.
pub(super) fn check_origins(origins: &Names) -> Result<(), String> {
    for origin in origins.iter().filter(|origin| *origin != "*") {
        if let Err(error) = CsrfLayer::new().add_trusted_origin(origin) {
            return Err(format!(
                "expected origins as browsers send them, such as https://app.example, or `*`: {error}"
            ));
        }
    }
    Ok(())
}

/// Checks that host names are written as requests are compared with them: a name or an address alone.
///
/// # Errors
/// What was expected and what came.
pub(super) fn check_hosts(hosts: &Names) -> Result<(), String> {
    let is_name = |host: &str| {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        host.chars().all(plain) && !host.starts_with('.') && !host.ends_with('.')
    };
    match hosts.iter().find(|host| *host != "*" && !is_name(host) && host.parse::<IpAddr>().is_err()) {
        Some(host) => Err(format!(
            "expected host names or addresses as in quire.internal,192.168.0.7, without scheme, port, path or wildcard, or \
             `*`, found `{host}`"
        )),
        None => Ok(()),
    }
}

/// Checks that clients can send a key.
///
/// # Errors
/// What was expected, without the key.
pub(super) fn check_key(key: &str) -> Result<(), &'static str> {
    match key.trim() {
        "" => Err("expected a key, found an empty text; leave it out to run without"),
        key if key.bytes().all(|byte| byte.is_ascii_graphic()) => Ok(()),
        _ => Err("expected a key of visible ASCII characters without white space: others cannot be sent as a header"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn origins_are_written_as_browsers_send_them() {
        let check = |text: &str| check_origins(&text.parse().unwrap());
        check("https://app.example, http://localhost:3000").unwrap();
        check("*").unwrap();
        for wrong in ["app.example", "https://app.example/", "https://app.example/x", "file://"] {
            assert!(check(wrong).unwrap_err().contains("https://app.example"), "{wrong}");
        }
    }

    #[test]
    fn hosts_are_written_as_they_are_compared() {
        let check = |text: &str| check_hosts(&text.parse().unwrap());
        check("quire.internal, my_host, 192.168.0.7, ::1, fe80::1, *, xn--bcher-kva.example").unwrap();
        for wrong in ["http://x", "x:8080", "x/y", "[::1]", "*.example", "x.", ".x", "a b", "bücher.example"] {
            let error = check(&format!("ok.example,{wrong}")).unwrap_err();
            assert!(error.contains(&format!("found `{wrong}`")) && error.contains("quire.internal"), "{error}");
        }
    }

    #[test]
    fn a_key_that_nobody_could_send_is_refused() {
        assert!(check_key("secret-7\r\n").is_ok());
        for wrong in ["", " \n", "schl\u{fc}ssel", "two words", "a\u{7f}"] {
            assert!(check_key(wrong).is_err(), "{wrong:?}");
        }
    }
}
