//! Ids and names, each validated once where it is parsed.

use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::marker::PhantomData;
use std::str::FromStr;
use std::sync::Arc;

/// A name or id that does not have the required shape.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{kind} {value:?} is not valid: {rule}")]
pub struct InvalidName {
    /// What was being parsed, for example `app name`.
    pub kind: &'static str,
    /// The refused text, cut to 80 characters.
    pub value: String,
    /// The rule that it breaks.
    pub rule: &'static str,
}

impl InvalidName {
    fn of(kind: &'static str, text: &str, rule: &'static str) -> Self {
        Self { kind, value: text.chars().take(80).collect(), rule }
    }
}

/// What all ids have: they are parsed, shown, read and written as their text.
macro_rules! as_text {
    ($name:ident) => {
        impl TryFrom<String> for $name {
            type Error = InvalidName;
            fn try_from(text: String) -> Result<Self, InvalidName> {
                text.parse()
            }
        }
        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.as_str().into()
            }
        }
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                to.serialize_str(self.as_str())
            }
        }
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                from.deserialize_str(Parse(PhantomData))
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                self.as_str()
            }
        }
    };
}

/// A text of any length; a clone is the same text.
macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident, $kind:literal, $rule:literal, $valid:expr) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Arc<str>);

        impl $name {
            /// The text of the id.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl FromStr for $name {
            type Err = InvalidName;
            fn from_str(text: &str) -> Result<Self, InvalidName> {
                let valid: fn(&str) -> bool = $valid;
                if valid(text) { Ok(Self(text.into())) } else { Err(InvalidName::of($kind, text, $rule)) }
            }
        }
        as_text!($name);
    };
}

/// A text of one length, in place: a host's view has one or two in each of a hundred thousand facts.
macro_rules! fixed_id {
    ($(#[$doc:meta])* $name:ident, $length:literal, $kind:literal, $rule:literal, $valid:expr) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name([u8; $length]);

        impl $name {
            /// The text of the id.
            pub fn as_str(&self) -> &str {
                std::str::from_utf8(&self.0).expect("its bytes are letters and digits")
            }
        }
        impl FromStr for $name {
            type Err = InvalidName;
            fn from_str(text: &str) -> Result<Self, InvalidName> {
                let valid: fn(&u8) -> bool = $valid;
                let bytes: Option<[u8; $length]> = text.as_bytes().try_into().ok();
                bytes.filter(|bytes| bytes.iter().all(valid)).map(Self).ok_or_else(|| InvalidName::of($kind, text, $rule))
            }
        }
        as_text!($name);
    };
}

struct Parse<T>(PhantomData<T>);

impl<T: FromStr<Err = InvalidName>> Visitor<'_> for Parse<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        text.parse().map_err(E::custom)
    }
}

/// A DNS label: app names become host names, so they obey the same rule.
fn is_label(text: &str, longest: usize) -> bool {
    !text.is_empty()
        && text.len() <= longest
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-')
}

text_id!(
    /// An app's name, unique on the platform; also its registry repository and its host name label.
    AppName, "app name", "use 1 to 63 lower-case letters, digits and dashes, not beginning or ending with a dash",
    |t| is_label(t, 63)
);
text_id!(
    /// An organization: the unit of isolation between tenants.
    OrgName, "organization name", "use 1 to 40 lower-case letters, digits and dashes, not beginning or ending with a dash",
    |t| is_label(t, 40)
);
text_id!(
    /// A server's id.
    HostId, "host id", "use 1 to 40 lower-case letters, digits and dashes, not beginning or ending with a dash",
    |t| is_label(t, 40)
);
text_id!(
    /// A region's code, for example `fra` or `local`.
    Region, "region", "use 1 to 16 lower-case letters, digits and dashes, not beginning or ending with a dash",
    |t| is_label(t, 16)
);
text_id!(
    /// What fails as one inside a region: a building, a rack, a power feed.
    Zone, "zone", "use 1 to 32 lower-case letters, digits and dashes, not beginning or ending with a dash",
    |t| is_label(t, 32)
);
fixed_id!(
    /// A machine's id: 14 lower-case hexadecimal digits.
    MachineId, 14, "machine id", "a machine id is 14 lower-case hexadecimal digits",
    |b| b.is_ascii_digit() || (b'a'..=b'f').contains(b)
);
text_id!(
    /// A volume's id: `vol_` and 16 lower-case hexadecimal digits.
    VolumeId, "volume id", "a volume id is vol_ and 16 lower-case hexadecimal digits",
    |t| is_prefixed_hex(t, "vol_")
);
text_id!(
    /// A snapshot's id: `vs_` and 16 lower-case hexadecimal digits.
    SnapshotId, "snapshot id", "a snapshot id is vs_ and 16 lower-case hexadecimal digits",
    |t| is_prefixed_hex(t, "vs_")
);
fixed_id!(
    /// One immutable version of a machine's spec, 26 characters of Crockford base 32 (a ULID).
    MachineVersion, 26, "machine version", "a machine version is 26 characters of 0-9 and A-Z without I, L, O and U",
    |b| CROCKFORD.contains(b)
);
text_id!(
    /// Chosen by the sender of a command, so that a repeat gets the first answer.
    CommandId, "command id", "use 1 to 128 letters, digits and any of . _ : / -",
    |t| (1..=128).contains(&t.len())
        && t.bytes().all(|b| b.is_ascii_alphanumeric() || b"._:/-".contains(&b))
);

const CROCKFORD: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";

fn is_prefixed_hex(text: &str, prefix: &str) -> bool {
    let digits = text.strip_prefix(prefix).unwrap_or_default();
    digits.len() == 16 && digits.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

fn hex(random: &[u8]) -> String {
    random.iter().map(|b| format!("{b:02x}")).collect()
}

impl VolumeId {
    pub fn from_random(random: [u8; 8]) -> Self {
        Self(format!("vol_{}", hex(&random)).into())
    }
}

impl SnapshotId {
    pub fn from_random(random: [u8; 8]) -> Self {
        Self(format!("vs_{}", hex(&random)).into())
    }
}

impl MachineId {
    /// An id from seven random bytes.
    pub fn from_random(random: [u8; 7]) -> Self {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        Self(std::array::from_fn(|at| DIGITS[usize::from(random[at / 2] >> (if at % 2 == 0 { 4 } else { 0 }) & 15)]))
    }

    /// The name of the machine's network interface on the host: `dl` and the first 12 digits
    /// (15 bytes is the kernel's limit).
    pub fn interface_name(&self) -> String {
        format!("dl{}", &self.as_str()[..12])
    }
}

impl MachineVersion {
    /// A ULID from milliseconds since 1970 and ten random bytes.
    pub fn new(now_ms: u64, random: [u8; 10]) -> Self {
        let mut value = u128::from(now_ms & 0xffff_ffff_ffff) << 80;
        for (i, byte) in random.iter().enumerate() {
            value |= u128::from(*byte) << (72 - 8 * i);
        }
        Self(std::array::from_fn(|at| CROCKFORD[((value >> (125 - 5 * at)) & 31) as usize]))
    }
}

/// (store incarnation, revision): later always wins, and a restored store begins a new incarnation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Generation {
    pub incarnation: u64,
    pub revision: u64,
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.incarnation, self.revision)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_dns_label_rule() {
        for good in ["a", "web-1", "0x", &"a".repeat(63)] {
            assert!(good.parse::<AppName>().is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a.b", "a_b", "ä", &"a".repeat(64), "a/../b"] {
            assert!(bad.parse::<AppName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn machine_versions_sort_by_time() {
        let old = MachineVersion::new(1_700_000_000_000, [255; 10]);
        let new = MachineVersion::new(1_700_000_000_001, [0; 10]);
        assert!(old < new);
        assert!(old.as_str().parse::<MachineVersion>().is_ok());
    }

    #[test]
    fn interface_names_fit_the_kernel() {
        let id = MachineId::from_random([0xab; 7]);
        assert_eq!(id.as_str().len(), 14);
        assert!(id.interface_name().len() <= 15);
    }

    #[test]
    fn serde_refuses_what_parse_refuses() {
        assert!(serde_json::from_str::<AppName>("\"Bad Name\"").is_err());
    }
}
