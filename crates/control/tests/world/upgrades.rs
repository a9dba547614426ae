//! A new binary for hosts whose servers answer as told.

use super::{Answer, World};
use axum::body::Body;
use axum::http::{Method, Request};
use dunlin_control::operate::{Answer as Said, Ask, NoAnswer, Operate, Sending};
use dunlin_control::upgrade::{Answered, Look, Trial};
use dunlin_view::ConfigState;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

impl World {
    pub async fn start_operated(data: &Path, operate: Operate) -> Self {
        Self::start_all(data, None, &[], false, (ConfigState::default(), operate)).await.unwrap()
    }

    /// Sends a binary for all hosts.
    pub async fn upgrade(&self, binary: &'static [u8]) -> Answer {
        let sha256: String = Sha256::digest(binary).iter().map(|byte| format!("{byte:02x}")).collect();
        let request = Request::builder().method(Method::POST).uri(format!("/v1/cluster/upgrade?sha256={sha256}&bake_s=12"));
        Self::answer(self.control.root_router(), request.body(Body::from(binary)).unwrap()).await
    }
}

/// Servers that run an old binary and never get all of a new one: half comes, and then no more. The files on their way there.
pub fn servers_on_dead_lines() -> (Operate, Arc<Mutex<Vec<Sending>>>) {
    let sends = Arc::<Mutex<Vec<Sending>>>::default();
    let taken = sends.clone();
    let operate: Operate = Arc::new(move |_, ask, sending| {
        let taken = taken.clone();
        Box::pin(async move {
            match (ask, sending) {
                (Ask::Version { .. }, _) => Ok(Said::Version("dunlin 2".into())),
                (Ask::Look, _) => Ok(Said::Look(Box::new(old_server()))),
                (Ask::Install(install), Some(sending)) => {
                    sending.note(install.bytes / 2);
                    taken.lock().unwrap().push(sending.clone());
                    sending.stop.cancelled().await;
                    Err(NoAnswer::Silent("the host is not to have it any more".into()))
                }
                _ => Err(NoAnswer::Refused("no binary of that upgrade was taken here".into())),
            }
        })
    });
    (operate, sends)
}

fn old_server() -> Look {
    Look {
        life: 1,
        version: "dunlin 1".into(),
        sha256: "old".into(),
        trial: Trial::None,
        lacks: Default::default(),
        edge: None,
        machines: BTreeMap::new(),
        answered: Answered::default(),
    }
}
