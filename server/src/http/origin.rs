//! Which web pages may reach the server.
//!
//! A browser lets any page send requests to any server, and a page whose name is made to point at this machine (DNS
//! rebinding) even read the answers. A server with a key is safe from both: no page has it. One without takes requests
//! only under names that are its own, and none that a browser says come from elsewhere.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use axum::extract::{Request, State};
use axum::http::uri::Authority;
use axum::http::{HeaderName, HeaderValue, Method, Version, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};
use tower_http::csrf::{CsrfLayer, ProtectionError};

use super::error::ApiError;
use super::observe::REQUEST_ID;
use super::state::App;

/// Names separated by commas, as a setting.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names(Vec<String>);

impl Names {
    /// The names.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether it names all.
    pub(crate) fn is_everything(&self) -> bool {
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
pub(crate) fn check_origins(origins: &Names) -> Result<(), String> {
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
pub(crate) fn check_hosts(hosts: &Names) -> Result<(), String> {
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

/// Answers of which pages elsewhere may read; `None`: of none, which is what browsers do unasked.
pub(super) fn cors(origins: &Names) -> Option<CorsLayer> {
    if origins.is_empty() {
        return None;
    }
    let listed = origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok());
    let allowed = if origins.is_everything() { AllowOrigin::any() } else { AllowOrigin::list(listed) };
    let layer = CorsLayer::new()
        .allow_origin(allowed)
        .allow_methods([Method::GET, Method::POST, Method::DELETE])
        // Clients send many headers of their own; none of them lets anybody in.
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers([REQUEST_ID, header::RETRY_AFTER, HeaderName::from_static("x-quire-notes")])
        .max_age(std::time::Duration::from_secs(600));
    Some(layer)
}

/// Lets a request pass if it came under a name of this server's, and from no page that is not allowed to ask.
pub(super) async fn require_own_name(State(app): State<App>, request: Request, next: Next) -> Response {
    // Of several names one could be ours, and a program in front of this one may have gone by another.
    let one = request.headers().get_all(header::HOST).iter().count() <= 1;
    if app.key().is_none() && !(one && is_called_by_name(&app, &request)) {
        return ApiError::wrong_host(&host_of(&request).unwrap_or_default()).into_response();
    }
    next.run(request).await
}

/// Refuses what a browser says was sent by a page from elsewhere; `None`: everything is allowed.
pub(super) fn cross_site(app: &App) -> Option<CsrfLayer<impl Fn(ProtectionError) -> Response + Clone + use<>>> {
    let origins = &app.settings().cors_origins.0;
    if app.key().is_some() || origins.is_everything() {
        return None;
    }
    let layer = origins.iter().fold(CsrfLayer::new(), |layer, origin| {
        // They were checked with the settings.
        layer.clone().add_trusted_origin(origin).unwrap_or(layer)
    });
    Some(layer.with_rejection_response(|_: ProtectionError| ApiError::cross_site().into_response()))
}

fn is_called_by_name(app: &App, request: &Request) -> bool {
    match host_of(request) {
        Some(host) => is_own(&host, app.address().ip(), &app.settings().host, &app.settings().allowed_hosts.0),
        // Browsers always say whom they ask; HTTP/1.0 need not.
        None => request.version() < Version::HTTP_11,
    }
}

/// Whom the request asks, without the port.
fn host_of(request: &Request) -> Option<String> {
    let named = request.headers().get(header::HOST).and_then(|value| value.to_str().ok());
    let authority = match (request.uri().authority(), named) {
        (Some(authority), _) => authority.clone(),
        (None, Some(text)) => text.parse::<Authority>().ok()?,
        (None, None) => return None,
    };
    Some(authority.host().trim_start_matches('[').trim_end_matches(']').trim_end_matches('.').to_ascii_lowercase())
}

/// An address cannot be made to point elsewhere, so the one that is listened on is always right; where that is "all
/// addresses", every one is. A name is right if it is known.
fn is_own(host: &str, bound: IpAddr, configured: &str, allowed: &Names) -> bool {
    if allowed.iter().any(|name| name == "*" || name.eq_ignore_ascii_case(host)) {
        return true;
    }
    match host.parse::<IpAddr>() {
        Ok(address) => {
            let address = address.to_canonical();
            address.is_loopback() || bound.is_unspecified() || address == bound.to_canonical()
        }
        Err(_) => host == "localhost" || host.ends_with(".localhost") || host.eq_ignore_ascii_case(configured),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_name_that_may_point_anywhere_is_not_the_servers() {
        let allowed = "quire.internal, Other.Example".parse::<Names>().unwrap();
        let own = |host: &str, bound: &str| is_own(host, bound.parse().unwrap(), "myhost", &allowed);
        for host in
            ["localhost", "app.localhost", "127.0.0.1", "127.9.9.9", "::1", "myhost", "quire.internal", "other.example"]
        {
            assert!(own(host, "127.0.0.1"), "{host}");
        }
        for host in ["evil.example", "localhost.evil.example", "192.168.0.7", "127.0.0.1.evil.example", ""] {
            assert!(!own(host, "127.0.0.1"), "{host}");
        }
        assert!(own("192.168.0.7", "0.0.0.0") && own("fe80::1", "::") && own("192.168.0.7", "192.168.0.7"));
        assert!(!own("evil.example", "0.0.0.0"));
        assert!(is_own("evil.example", "0.0.0.0".parse().unwrap(), "0.0.0.0", &"*".parse().unwrap()));
    }

    #[test]
    fn the_host_is_read_with_and_without_a_port() {
        let host =
            |value: &str| host_of(&Request::builder().header("host", value).body(axum::body::Body::empty()).unwrap());
        assert_eq!(host("[::1]:8080").as_deref(), Some("::1"));
        assert_eq!(host("LocalHost.:8080").as_deref(), Some("localhost"));
        assert_eq!(host("127.0.0.1").as_deref(), Some("127.0.0.1"));
        assert_eq!(host("not a host"), None);
    }

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
}
