//! Bounds of requests, and what a key may look like.

use crate::{Compare, Op, StoreError};
use std::collections::HashSet;

pub const MAX_OPS: usize = 100;
pub const MAX_COMPARES: usize = 100;
/// Keys and values of one transaction.
pub const MAX_REQUEST_BYTES: usize = 1024 * 1024;
pub const MAX_VALUE_BYTES: usize = 256 * 1024;
pub const MAX_KEY_BYTES: usize = 512;
/// More than this is read in pages.
pub const MAX_RANGE_BYTES: usize = 64 * 1024 * 1024;
pub const MAX_PAGE_ROWS: usize = 10_000;
/// How many revisions the history keeps when nobody compacts it earlier.
pub const HISTORY_REVISIONS: u64 = 10_000;

fn refuse<T>(why: String) -> Result<T, StoreError> {
    Err(StoreError::Invalid(why))
}

/// Printable ASCII without spaces, in segments separated by single slashes.
pub(crate) fn check_key(key: &str) -> Result<(), StoreError> {
    check_chars(key)?;
    if key.split('/').any(str::is_empty) {
        return refuse(format!("the key {key:?} is empty or has an empty segment"));
    }
    Ok(())
}

/// The beginning of a key, or nothing.
pub(crate) fn check_prefix(prefix: &str) -> Result<(), StoreError> {
    check_chars(prefix)?;
    if prefix.starts_with('/') || prefix.contains("//") {
        return refuse(format!("no key can begin with {prefix:?}"));
    }
    Ok(())
}

fn check_chars(key: &str) -> Result<(), StoreError> {
    if key.len() > MAX_KEY_BYTES {
        return refuse(format!("a key has {} bytes, at most {MAX_KEY_BYTES} are allowed", key.len()));
    }
    match key.chars().find(|c| !c.is_ascii_graphic()) {
        Some(bad) => refuse(format!("the key {key:?} has {bad:?}: only printable ASCII without spaces is allowed")),
        None => Ok(()),
    }
}

pub(crate) fn check_ranges(prefixes: &[&str]) -> Result<(), StoreError> {
    if prefixes.len() > MAX_OPS {
        return refuse(format!("{} ranges in one read, at most {MAX_OPS} are allowed", prefixes.len()));
    }
    prefixes.iter().try_for_each(|prefix| check_prefix(prefix))
}

pub(crate) fn check_txn(compare: &[Compare], then: &[Op]) -> Result<(), StoreError> {
    if then.len() > MAX_OPS || compare.len() > MAX_COMPARES {
        let (compares, ops) = (compare.len(), then.len());
        return refuse(format!(
            "{compares} conditions and {ops} writes, at most {MAX_COMPARES} and {MAX_OPS} are allowed"
        ));
    }
    let mut total = 0;
    for compare in compare {
        check_key(compare.key())?;
        total += compare.key().len();
    }
    let mut written = HashSet::new();
    for op in then {
        check_key(op.key())?;
        total += op.key().len();
        if !written.insert(op.key()) {
            return refuse(format!("{} is written twice in one transaction", op.key()));
        }
        if let Op::Put(key, value) = op {
            total += value.len();
            if value.len() > MAX_VALUE_BYTES {
                return refuse(format!("the value of {key} has {} bytes, at most {MAX_VALUE_BYTES} are allowed", value.len()));
            }
        }
    }
    if total > MAX_REQUEST_BYTES {
        return refuse(format!("the transaction has {total} bytes, at most {MAX_REQUEST_BYTES} are allowed"));
    }
    Ok(())
}

/// The first string after all keys with this prefix. Keys end below 0x7f.
pub(crate) fn prefix_end(prefix: &str) -> String {
    let mut bytes = prefix.as_bytes().to_vec();
    match bytes.last_mut() {
        Some(last) => *last += 1,
        None => bytes.push(0x7f),
    }
    String::from_utf8(bytes).expect("a checked prefix is ASCII")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys() {
        for good in ["a", "apps/web", "certificates/*.localhost", &"k".repeat(MAX_KEY_BYTES)] {
            assert!(check_key(good).is_ok(), "{good}");
        }
        for bad in ["", "/a", "a/", "a//b", "a b", "ä", "a\0", "a\n", &"k".repeat(MAX_KEY_BYTES + 1)] {
            assert!(check_key(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_prefix_ends_after_its_last_key() {
        for prefix in ["", "a", "apps/", "apps/~"] {
            let end = prefix_end(prefix);
            assert!(format!("{prefix}~~~~") < end, "{prefix}");
        }
        assert!("apps0" >= prefix_end("apps/").as_str());
    }
}
