//! What leaves a host in a bundle for people goes through here: nothing in it is meant to have a secret, and this is for what
//! nobody thought of. Names that say what they hold, private keys, tokens, and whatever looks like one.

use std::borrow::Cow;

const HIDDEN: &str = "[hidden]";
/// Beginnings of our tokens and others'.
const TOKENS: &[&str] = &["dunlin_v1.", "dnj1.", "FlyV1", "fm2_", "ghp_", "github_pat_", "sk-", "xoxb-", "AKIA", "eyJ"];
/// What follows one of these and `:` or `=` is nobody's business.
const NAMES: &[&str] = &["password", "passwd", "secret", "token", "api_key", "apikey", "private_key", "authorization", "sealed", "nonce", "credential"];
const MIN_TOKEN_CHARS: usize = 16;
/// Digests of SHA-256 are this long and stay: they name images and binaries.
const DIGEST_CHARS: usize = 64;
/// Keys of 32 bytes in base64 have 43.
const KEY_CHARS: usize = 40;

/// The text without what is or may be a secret.
pub fn redacted(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut in_key = false;
    for line in text.lines() {
        let begins = line.contains("-----BEGIN") && line.contains("PRIVATE KEY");
        if in_key || begins {
            if begins {
                out.push_str(HIDDEN);
                out.push('\n');
            }
            in_key = !line.contains("-----END");
            continue;
        }
        out.push_str(&of_line(line));
        out.push('\n');
    }
    out
}

fn of_line(line: &str) -> String {
    let mut out = String::with_capacity(line.len());
    let mut rest = line;
    let mut hide_next = false;
    while !rest.is_empty() {
        let (word, mut behind) = rest.split_at(rest.find(|c: char| !is_of_word(c)).unwrap_or(rest.len()));
        // `Bearer x` is one value.
        let is_scheme = word.eq_ignore_ascii_case("bearer") || word.eq_ignore_ascii_case("basic");
        if hide_next && !is_scheme {
            out.push_str(HIDDEN);
            behind = &rest[rest.find(ends_a_value).unwrap_or(rest.len())..];
            hide_next = false;
        } else {
            out.push_str(&shown(word));
            hide_next = is_scheme || (names_a_secret(word) && has_value(behind));
        }
        // What stands between a name and its value, or between words.
        let gap = behind.find(|c: char| is_of_word(c) || (hide_next && !is_between(c))).unwrap_or(behind.len());
        out.push_str(&behind[..gap]);
        rest = &behind[gap..];
    }
    out
}

fn ends_a_value(c: char) -> bool {
    c.is_whitespace() || "\"',;}".contains(c)
}

fn is_between(c: char) -> bool {
    c.is_whitespace() || "\"'\\:=".contains(c)
}

fn is_of_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || "+/_-.".contains(c)
}

fn names_a_secret(word: &str) -> bool {
    let word = word.to_ascii_lowercase();
    NAMES.iter().any(|name| word.ends_with(name))
}

fn has_value(behind: &str) -> bool {
    let behind = behind.trim_start_matches(['"', '\'', ' ', '\\']);
    behind.starts_with([':', '='])
}

fn shown(word: &str) -> Cow<'_, str> {
    let is_token = word.len() >= MIN_TOKEN_CHARS && TOKENS.iter().any(|token| word.starts_with(token));
    // A path may have letters of all kinds; what has runs like a key's is none of its parts.
    let whole = Some(word).filter(|word| !word.starts_with('/'));
    let is_random = word.split(['.', '/', '-', '_']).chain(whole).any(looks_random);
    if is_token || is_random { HIDDEN.into() } else { word.into() }
}

/// As a key or something sealed in base64 does: long, with letters of both kinds and digits.
fn looks_random(part: &str) -> bool {
    let has = |kind: fn(&u8) -> bool| part.bytes().any(|b| kind(&b));
    let is_mixed = has(u8::is_ascii_lowercase) && has(u8::is_ascii_uppercase) && has(u8::is_ascii_digit);
    let is_hex = part.bytes().all(|b| b.is_ascii_hexdigit());
    (part.len() >= KEY_CHARS && is_mixed) || (is_hex && part.len() > DIGEST_CHARS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_hidden_whatever_they_stand_in() {
        let token = "dunlin_v1.eyJpZCI6ImFiYyJ9.c2lnbmF0dXJlc2lnbmF0dXJl";
        let join = format!("dnj1.{}.{}.{}", "a".repeat(16), "b".repeat(64), "c".repeat(64));
        let key = "q83vEjRWeJCrze8SNFZ4kKvN7xI0VniQq83vEjRWeJA=";
        for (text, secret) in [
            (format!("authorization: Bearer {token}"), token),
            (format!("request with {token} failed"), token),
            (format!("DUNLIN_JOIN_TOKEN={join}"), join.as_str()),
            ("\"password\": \"hunter2\", \"id\": 7".to_owned(), "hunter2"),
            ("DB_PASSWORD=hunter2 and more".to_owned(), "hunter2"),
            ("api_key: 'abc'".to_owned(), "abc"),
            ("{\"password\":\"p@ss!phrase\"}".to_owned(), "phrase"),
            ("password=$ecret more".to_owned(), "ecret"),
            (format!("sealed {key} here"), "q83vEjRW"),
            (format!("\"sealed\":\"{key}\""), "q83vEjRW"),
            (format!("x {}", "0123456789abcdef".repeat(9)), "0123456789abcdef0123"),
            ("-----BEGIN PRIVATE KEY-----\nMC4CAQAw\n-----END PRIVATE KEY-----\nafter".to_owned(), "MC4CAQAw"),
        ] {
            let found = redacted(&text);
            assert!(!found.contains(secret) && found.contains(HIDDEN), "{text}: {found}");
        }
        assert!(redacted("-----BEGIN PRIVATE KEY-----\nMC4C\n-----END PRIVATE KEY-----\nafter").ends_with("after\n"));
        assert!(redacted("\"token\": \"abc\", \"id\": 7").contains("\"id\": 7"));
    }

    #[test]
    fn what_helps_stays() {
        let digest = "0123456789abcdef".repeat(4);
        for text in [
            "2026-11-27T09:00:00Z  INFO dunlin: server runs host=w1 region=ams http=0.0.0.0:80".to_owned(),
            format!("image sha256:{digest} was pulled from /var/lib/dunlin/registry/blobs"),
            "dunlin_proxy_answers_total{app=\"web\",status=\"5xx\"} 3".to_owned(),
            "secrets version 3 of app web; the token of host h2 has expired".to_owned(),
            "machine 01234567890abc is started, attempt 3".to_owned(),
            "/tmp/dunlin-e2e-AbC12x/data/registry/blobs/and/more is not there: disk-usage-of-something".to_owned(),
            "{\"token\": null}".replace("token", "tokens"),
        ] {
            assert_eq!(redacted(&text), format!("{text}\n"));
        }
    }
}
