//! Which web pages may reach the server.
//!
//! A browser lets any page send requests to any server, and a page whose name is made to point at this machine (DNS
//! rebinding) even read the answers. A server with a key is safe from both: no page has it. One without takes requests
//! only under names that are its own, and none that a browser says come from elsewhere.

use std::net::IpAddr;

use axum::extract::{Request, State};
use axum::http::uri::Authority;
use axum::http::{HeaderName, HeaderValue, Method, Version, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};
use tower_http::csrf::{CsrfLayer, ProtectionError};

use settings::Names;

use super::error::ApiError;
use super::observe::REQUEST_ID;
use super::state::App;

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
}
