//! Control's word to a host that it was removed for good. The others refuse such a host, so it hears no desired state any more,
//! and with that no tombstones; and that nobody speaks to it proves nothing. So it asks control, as who joins asks, and obeys
//! what the cluster's key has signed: ids are never used again, so that the word holds for ever and may come from anybody.

use crate::authority::Authority;
use crate::member::{self, Member, MemberError};
use dunlin_model::{HostId, MachineId};
use dunlin_view::{ConfigState, Snapshot};
use ed25519_dalek::{Signature, Signer, SigningKey};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

const CONTEXT: &str = "dunlin cluster 1 a host was removed for good";

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemovalNotice {
    pub removed: HostId,
    /// Ed25519, by the cluster's key, 64 bytes, hexadecimal.
    signature: String,
}

impl Authority {
    /// Only of a host that was removed: it destroys what it runs.
    pub fn removal_notice(&self, host: &HostId) -> RemovalNotice {
        RemovalNotice { removed: host.clone(), signature: hex::encode(sign(self.gossip_key(), host)) }
    }
}

impl RemovalNotice {
    pub fn is_for(&self, member: &Member) -> bool {
        let signature = hex::decode(&self.signature).ok().and_then(|bytes| Signature::from_slice(&bytes).ok());
        let signed = signature.zip(member.cluster_key().ok());
        self.removed == member.host && signed.is_some_and(|(signature, key)| key.verify_strict(&message(&member.host), &signature).is_ok())
    }

    /// That of this member, which was believed before: it stays removed after a restart. One that is not for it, since the disk is
    /// another host's by now, is none.
    pub(crate) fn load(dir: &Path, member: &Member) -> Result<Option<Self>, MemberError> {
        Ok(member::private_file::<Self>(&Self::path(dir))?.filter(|notice| notice.is_for(member)))
    }

    pub(crate) fn save(&self, dir: &Path) -> Result<(), MemberError> {
        member::write_private(&Self::path(dir), self)
    }

    pub(crate) fn path(dir: &Path) -> PathBuf {
        dir.join("removed.json")
    }
}

fn message(host: &HostId) -> [u8; 32] {
    blake3::derive_key(CONTEXT, host.as_str().as_bytes())
}

fn sign(key: &SigningKey, host: &HostId) -> [u8; 64] {
    key.sign(&message(host)).to_bytes()
}

/// Desired state as it is for a host that was removed: what it had is destroyed, as a person has asked for. Volumes keep their
/// files, for which there are no tombstones.
pub(crate) fn without(mut config: ConfigState, host: &HostId, known: &Snapshot) -> ConfigState {
    let assigned = config.machines.values().filter(|machine| machine.host == *host).map(|machine| machine.id.clone());
    let told = known.machines.values().filter(|fact| fact.host == *host).map(|fact| fact.id.clone());
    let own: Vec<MachineId> = assigned.chain(told).collect();
    for id in own {
        config.machines.remove(&id);
        config.asked_for.insert(id.clone());
        config.tombstones.insert(id, host.clone());
    }
    config
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::tests::fact;
    use crate::member::{MemberKeys, Said};
    use crate::View;

    fn member(authority: &Authority, host: &str) -> Member {
        let (host, region, keys): (HostId, dunlin_model::Region, _) = (host.parse().unwrap(), "fra".parse().unwrap(), MemberKeys::generate().unwrap());
        let issued = authority.issue(&host, &region, 1, &keys.public().unwrap(), 0).unwrap();
        let machine_prefix = dunlin_model::desired::Ipv4Prefix { network: "10.208.0.0".parse().unwrap(), length: 20 };
        let control = "h1".parse().unwrap();
        Member { host, region, epoch: 1, domain: "localhost".into(), machine_prefix, control, peers: vec![], said: Said::default(), keys, issued }
    }

    #[test]
    fn only_the_clusters_key_removes_a_host_and_only_that_one() {
        let dir = tempfile::tempdir().unwrap();
        let [authority, foreign] = ["a", "b"].map(|name| Authority::load_or_create(&dir.path().join(name), 0).unwrap());
        let (h2, h3) = (member(&authority, "h2"), member(&authority, "h3"));
        let notice = authority.removal_notice(&h2.host);
        assert!(notice.is_for(&h2));
        assert!(!notice.is_for(&h3) && !RemovalNotice { removed: h3.host.clone(), ..notice.clone() }.is_for(&h3));
        assert!(!foreign.removal_notice(&h2.host).is_for(&h2), "another cluster's word");
        let own = RemovalNotice { removed: h2.host.clone(), signature: hex::encode(sign(&h3.keys.gossip().unwrap(), &h2.host)) };
        assert!(!own.is_for(&h2), "another member's word");
        for signature in ["", "zz", &"00".repeat(64)] {
            assert!(!RemovalNotice { signature: signature.into(), ..notice.clone() }.is_for(&h2), "{signature}");
        }
        notice.save(dir.path()).unwrap();
        assert_eq!(RemovalNotice::load(dir.path(), &h2).unwrap(), Some(notice));
        assert_eq!(RemovalNotice::load(dir.path(), &h3).unwrap(), None);
    }

    #[test]
    fn what_a_removed_host_had_is_destroyed_and_nothing_else() {
        let (mine, others) = (fact(1, "h2"), fact(2, "h3"));
        let view = View::memory();
        view.publish_machine(mine.clone()).unwrap();
        view.publish_machine(others.clone()).unwrap();
        let host: HostId = "h2".parse().unwrap();
        let config = without(ConfigState::default(), &host, &view.current());
        let tombstones: Vec<_> = config.tombstones.iter().map(|(id, host)| (id.clone(), host.clone())).collect();
        assert_eq!(tombstones, [(mine.id.clone(), host.clone())]);
        assert!(config.asked_for.contains(&mine.id) && !config.asked_for.contains(&others.id));
        assert_eq!(without(config.clone(), &host, &view.current()), config, "once more is the same");
    }
}
