//! Names, ids, expressions and tokens: what is taken is printed as it would be read again.
#![no_main]

use dunlin_model::config::PrimaryRegion;
use dunlin_model::token::Capability;
use dunlin_model::{AppName, CommandId, HostId, MachineId, MachineVersion, OrgName, Region, RegionExpr, SnapshotId, VolumeId, Zone};
use ed25519_dalek::SigningKey;
use libfuzzer_sys::fuzz_target;
use std::fmt::Display;
use std::str::FromStr;

fn same_again<T: FromStr + Display + PartialEq>(text: &str) {
    if let Ok(read) = text.parse::<T>() {
        let printed = read.to_string();
        assert!(printed.parse::<T>().is_ok_and(|again| again == read), "{text:?} is printed as {printed:?}");
    }
}

fuzz_target!(|text: &str| {
    same_again::<AppName>(text);
    same_again::<CommandId>(text);
    same_again::<HostId>(text);
    same_again::<MachineId>(text);
    same_again::<MachineVersion>(text);
    same_again::<OrgName>(text);
    same_again::<PrimaryRegion>(text);
    same_again::<Region>(text);
    same_again::<RegionExpr>(text);
    same_again::<SnapshotId>(text);
    same_again::<VolumeId>(text);
    same_again::<Zone>(text);
    let _ = text.parse::<dunlin_model::Schedule>();
    let key = SigningKey::from_bytes(&[3; 32]).verifying_key();
    assert!(Capability::verify(text, &key, 0).is_err(), "a token that nobody signed was taken");
});
