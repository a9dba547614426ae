//! Host names as clients write them.

use std::borrow::Cow;

/// DNS allows no longer name.
const MAX_HOST_NAME: usize = 253;

/// The lower-case name of an authority such as `Web.Example.org:8443`, without port and final dot.
/// `None` when it cannot be a host name: such a request is refused, not guessed at.
pub fn host_name(authority: &str) -> Option<Cow<'_, str>> {
    let name = match authority.rsplit_once(':') {
        // An IPv6 literal keeps its colons.
        Some((name, port)) if !authority.ends_with(']') => {
            if port.len() > 5 || !port.bytes().all(|b| b.is_ascii_digit()) {
                return None;
            }
            name
        }
        _ => authority,
    };
    let name = name.strip_suffix('.').unwrap_or(name);
    if name.is_empty() || name.len() > MAX_HOST_NAME {
        return None;
    }
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b'[' | b']' | b':');
    if !name.bytes().all(allowed) {
        return None;
    }
    if name.bytes().any(|b| b.is_ascii_uppercase()) {
        Some(Cow::Owned(name.to_ascii_lowercase()))
    } else {
        Some(Cow::Borrowed(name))
    }
}

#[cfg(test)]
mod tests {
    use super::host_name;

    #[test]
    fn names_are_taken_as_clients_write_them() {
        for (given, expected) in [
            ("web.localhost", Some("web.localhost")),
            ("Web.LocalHost:8080", Some("web.localhost")),
            ("web.localhost.", Some("web.localhost")),
            ("web.localhost.:80", Some("web.localhost")),
            ("127.0.0.1:80", Some("127.0.0.1")),
            ("[::1]:80", Some("[::1]")),
            ("[::1]", Some("[::1]")),
            ("", None),
            (":80", None),
            ("a@b", None),
            ("a b", None),
            ("a/b", None),
            ("web:http", None),
            ("web:123456", None),
        ] {
            assert_eq!(host_name(given).as_deref(), expected, "{given:?}");
        }
        assert_eq!(host_name(&"a".repeat(254)), None);
    }
}
