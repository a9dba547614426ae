//! `GET /v1/hosts/{id}/debug`: what a person needs who looks for a fault on a host, in one file without secrets. The host tells
//! what it knows of itself, control what it knows of the host; what nobody can tell is named in `missing.txt`.

use super::{hosts, upgrades};
use crate::failure::Failure;
use crate::operate::{Answer, Ask, redacted};
use crate::{Ctx, FleetQuestion, now_ms, removal, upgrade};
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use dunlin_api::HostApi;
use dunlin_model::{HostId, MachineId};
use dunlin_view::MachineFact;
use flate2::Compression;
use flate2::write::GzEncoder;
use http::header::CONTENT_TYPE;
use serde::Serialize;
use std::sync::Arc;
use std::time::Duration;

/// Of one text; its end is kept, where the newest is.
const MAX_TEXT_BYTES: usize = 512 << 10;
const MAX_TEXTS: usize = 200;
/// Of a host with more, those that do worst come first.
const MAX_MACHINES: usize = 50;
const EVENTS_WITHIN: Duration = Duration::from_secs(10);

pub async fn bundle(State(ctx): State<Arc<Ctx>>, Path(id): Path<HostId>) -> Result<Response, Failure> {
    removal::load(&ctx, &id).await?;
    let mut bundle = Bundle::default();
    match (ctx.operate)(id.clone(), Ask::Collect, None).await {
        Ok(Answer::Collected(texts)) => texts.into_iter().for_each(|(name, text)| bundle.add(&name, &text)),
        Ok(_) => bundle.lacks("all that the host knows: its answer is not understood"),
        Err(error) => bundle.lacks(&format!("all that the host knows: {error}; on that host, journalctl and `dunlin doctor` still say much")),
    }
    of_control(&ctx, &id, &mut bundle).await?;
    let root = format!("dunlin-debug-{id}-{}", now_ms() / 1000);
    let bytes = tokio::task::spawn_blocking(move || bundle.packed(&root)).await.map_err(std::io::Error::other).flatten();
    let bytes = bytes.map_err(|error| Failure::internal("the bundle cannot be packed", &error))?;
    Ok(([(CONTENT_TYPE, "application/gzip")], bytes).into_response())
}

async fn of_control(ctx: &Ctx, id: &HostId, bundle: &mut Bundle) -> Result<(), Failure> {
    bundle.json("control/host.json", &hosts::detail(ctx, id).await?.0);
    let view = ctx.view.current();
    let mut machines: Vec<&MachineFact> = view.machines.values().map(|fact| &**fact).filter(|fact| fact.host == *id).collect();
    machines.sort_by_key(|fact| (fact.problem.is_none(), fact.is_healthy(), fact.id.clone()));
    bundle.json("control/machines.json", &machines);
    if machines.len() > MAX_MACHINES {
        bundle.lacks(&format!("events of {} of {} machines: those that do worst come first", machines.len() - MAX_MACHINES, machines.len()));
    }
    let worst: Vec<MachineId> = machines.iter().take(MAX_MACHINES).map(|fact| fact.id.clone()).collect();
    match crate::hosts::reach(ctx, id) {
        Ok(host) => events(&*host, &worst, bundle).await,
        Err(error) => bundle.lacks(&format!("events of its machines: {error}")),
    }
    match upgrade::load(ctx).await? {
        Some(row) => bundle.json("control/upgrade.json", &upgrades::shown(&row.value)),
        None => bundle.lacks("an upgrade of the fleet: there was none"),
    }
    match &ctx.fleet {
        Some(fleet) => bundle.json("control/cluster-status.json", &(fleet.ask)(FleetQuestion::Status).await),
        None => bundle.lacks("the cluster as control sees it: this server is alone"),
    }
    bundle.json("control/about.json", &serde_json::json!({
        "host": ctx.host_row.id, "version": ctx.version, "commit": ctx.commit, "at_ms": now_ms(), "started_ms": ctx.started_ms,
        "heard": view.heard.get(id), "config_generation": view.config.generation,
    }));
    Ok(())
}

async fn events(host: &dyn HostApi, machines: &[MachineId], bundle: &mut Bundle) {
    let all = async {
        for id in machines {
            match host.events(id).await {
                Ok(events) => bundle.json(&format!("machines/{id}-events.json"), &events),
                Err(refusal) => return Some(format!("events of machine {id} and those after it: {refusal}")),
            }
        }
        None
    };
    let within = format!("events of some machines: they did not come within {} s", EVENTS_WITHIN.as_secs());
    if let Some(why) = tokio::time::timeout(EVENTS_WITHIN, all).await.unwrap_or(Some(within)) {
        bundle.lacks(&why);
    }
}

/// Texts, each without secrets and bounded.
#[derive(Default)]
struct Bundle {
    texts: Vec<(String, String)>,
    missing: Vec<String>,
}

impl Bundle {
    fn add(&mut self, name: &str, text: &str) {
        let is_name = !name.is_empty() && name.len() <= 100 && name.split('/').all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)) && part != "..");
        if !is_name || self.texts.len() >= MAX_TEXTS {
            return self.lacks(&format!("a text that the host calls {name:?}"));
        }
        let mut from = text.len().saturating_sub(MAX_TEXT_BYTES);
        while !text.is_char_boundary(from) {
            from += 1;
        }
        if from > 0 {
            self.lacks(&format!("the first {from} bytes of {name}"));
        }
        self.texts.push((name.to_owned(), redacted(&text[from..])));
    }

    fn json(&mut self, name: &str, value: &impl Serialize) {
        match serde_json::to_string_pretty(value) {
            Ok(text) => self.add(name, &text),
            Err(error) => self.lacks(&format!("{name}: {error}")),
        }
    }

    fn lacks(&mut self, what: &str) {
        self.missing.push(what.to_owned());
    }

    fn packed(mut self, root: &str) -> std::io::Result<Vec<u8>> {
        if !self.missing.is_empty() {
            self.texts.push(("missing.txt".into(), redacted(&self.missing.join("\n"))));
        }
        let mut archive = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
        for (name, text) in &self.texts {
            let mut header = tar::Header::new_gnu();
            header.set_size(text.len() as u64);
            header.set_mode(0o600);
            header.set_mtime(now_ms() / 1000);
            archive.append_data(&mut header, format!("{root}/{name}"), text.as_bytes())?;
        }
        archive.into_inner()?.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn a_bundle_is_bounded_and_names_what_it_lacks() {
        let mut bundle = Bundle::default();
        bundle.add("host/log.txt", &format!("begin{}end token=abcdef", "x ".repeat(MAX_TEXT_BYTES)));
        bundle.add("../../etc/passwd", "x");
        bundle.lacks("the moon");
        let packed = bundle.packed("dunlin-debug-h1").unwrap();
        let mut found = std::collections::BTreeMap::new();
        for entry in tar::Archive::new(flate2::read::GzDecoder::new(&packed[..])).entries().unwrap() {
            let mut entry = entry.unwrap();
            let mut text = String::new();
            entry.read_to_string(&mut text).unwrap();
            found.insert(entry.path().unwrap().display().to_string(), text);
        }
        assert_eq!(found.keys().collect::<Vec<_>>(), ["dunlin-debug-h1/host/log.txt", "dunlin-debug-h1/missing.txt"]);
        let log = &found["dunlin-debug-h1/host/log.txt"];
        assert!(log.ends_with("end token=[hidden]\n") && !log.contains("begin"), "{}", &log[log.len() - 40..]);
        let missing = &found["dunlin-debug-h1/missing.txt"];
        assert!(missing.contains("bytes of host/log.txt") && missing.contains("passwd") && missing.contains("the moon"), "{missing}");
    }
}
