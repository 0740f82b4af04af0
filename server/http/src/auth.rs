//! Who may ask.

use axum::extract::{Request, State};
use axum::http::header;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::error::ApiError;
use super::state::App;

/// The key as it is compared: white space around it is never part of one.
pub(super) fn hash_key(key: &str) -> blake3::Hash {
    blake3::hash(key.trim().as_bytes())
}

/// Lets a request pass if the server has no key, or the request carries it.
pub(super) async fn require_key(State(app): State<App>, request: Request, next: Next) -> Response {
    let Some(expected) = app.key() else { return next.run(request).await };
    let given = request
        .headers()
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.split_once(' '))
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
        .map(|(_, key)| hash_key(key));
    // Comparing hashes takes the same time wherever they differ: `blake3::Hash` promises it.
    match given {
        Some(given) if given == *expected => next.run(request).await,
        _ => ApiError::unauthorized().into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn white_space_around_a_key_is_not_part_of_it() {
        assert_eq!(hash_key(" secret-7\n"), hash_key("secret-7"));
    }
}
