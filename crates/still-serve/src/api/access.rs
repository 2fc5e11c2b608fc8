//! Who may ask: keys, and the hosts that a server without keys answers to.

use std::net::IpAddr;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use subtle::{Choice, ConstantTimeEq};

use super::error::{ApiError, Result};

/// The keys that give access to the server.
#[derive(Clone)]
pub struct Keys {
    /// Digests, so that all keys are of one length.
    digests: Vec<[u8; 32]>,
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} keys", self.digests.len())
    }
}

impl Keys {
    /// Reads the lines of a key file, one key a line. Empty lines and lines that begin with `#` do not count.
    pub fn from_lines(text: &str) -> Self {
        let lines = text.lines().map(str::trim);
        let keys = lines.filter(|line| !line.is_empty() && !line.starts_with('#'));
        Self { digests: keys.map(|key| *blake3::hash(key.as_bytes()).as_bytes()).collect() }
    }

    /// Whether there are no keys.
    pub fn is_empty(&self) -> bool {
        self.digests.is_empty()
    }

    /// Compares with every key, in constant time.
    fn have(&self, key: &[u8]) -> bool {
        let given = blake3::hash(key);
        let equal = |digest: &[u8; 32]| digest.ct_eq(given.as_bytes());
        self.digests.iter().map(equal).fold(Choice::from(0), |any, one| any | one).into()
    }

    fn check(&self, headers: &HeaderMap) -> Result<()> {
        let given = headers.get(header::AUTHORIZATION).map(|value| value.as_bytes());
        let denied =
            |what: &str| Err(ApiError::client(StatusCode::UNAUTHORIZED, "invalid_api_key", what));
        let Some(given) = given else {
            return denied("no API key was given: send the header `Authorization: Bearer KEY`");
        };
        let key =
            given.split_at_checked(7).filter(|(scheme, _)| scheme.eq_ignore_ascii_case(b"bearer "));
        match key.is_some_and(|(_, key)| self.have(key.trim_ascii())) {
            true => Ok(()),
            false => denied("the API key is wrong"),
        }
    }
}

/// Lets a request with a key through, or, where there are no keys, one that was sent to this machine by name.
pub async fn guard(State(keys): State<Keys>, request: Request, next: Next) -> Response {
    let allowed = match keys.is_empty() {
        true => check_host(request.headers()),
        false => keys.check(request.headers()),
    };
    match allowed {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    }
}

/// A page of another site can have its name lead to this machine. Its requests then come from here, but ask for that name.
fn check_host(headers: &HeaderMap) -> Result<()> {
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    match host.is_empty() || is_loopback(host) {
        true => Ok(()),
        false => Err(ApiError::client(
            StatusCode::FORBIDDEN,
            "host_not_allowed",
            "without --api-key-file this server answers to localhost, 127.0.0.1 and [::1] alone",
        )),
    }
}

/// Whether `name` or `name:port` is this machine's loopback interface.
fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    name.eq_ignore_ascii_case("localhost")
        || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_lines_of_a_file() {
        let keys = Keys::from_lines("# of the team\n\n first \nsecond\n");
        assert!(keys.have(b"first") && keys.have(b"second"));
        for wrong in ["", "firs", "first ", "# of the team", "second\n"] {
            assert!(!keys.have(wrong.as_bytes()), "{wrong:?}");
        }
        assert!(Keys::from_lines("#\n\n").is_empty());
    }

    #[test]
    fn only_loopback_hosts_are_answered_without_keys() {
        for host in ["localhost", "LOCALHOST:8080", "127.0.0.1:1", "127.9.9.9", "[::1]:80", "[::1]"]
        {
            assert!(is_loopback(host), "{host}");
        }
        for host in
            ["evil.example", "127.0.0.1.evil.example:80", "10.0.0.1", "[::2]", "", "localhost.x"]
        {
            assert!(!is_loopback(host), "{host}");
        }
    }
}
