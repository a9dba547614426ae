//! `cluster upgrade`: sends the binary, then tells how it goes on. The upgrade is the server's work: it goes on without whoever
//! looks, and through the restart of control that is part of it.

use crate::args::{UpgradeArgs, UpgradeCommand};
use crate::logs::parse_time;
use crate::{CliError, Exit, Session, ui};
use bytes::Bytes;
use dunlin_api::ApiError;
use dunlin_api::fleet::{UpgradeShown, UpgradeState, UpgradeTurn};
use serde_json::json;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::{Duration, Instant};

const PATH: &str = "/v1/cluster/upgrade";
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Control restarts on the way, and a trial that fails takes longer.
const SILENT_AT_MOST: Duration = Duration::from_secs(300);
const CHUNK_BYTES: usize = 256 << 10;

pub async fn upgrade(session: &Session, args: UpgradeArgs) -> Result<Exit, CliError> {
    match (args.command, &args.binary) {
        (Some(UpgradeCommand::Status), _) => {
            let shown: UpgradeShown = session.client.get(PATH).await?;
            show(session, &shown);
            Ok(Exit::Ok)
        }
        (Some(UpgradeCommand::Resume), _) => {
            let shown: UpgradeShown = session.client.post(&format!("{PATH}/resume"), &json!({})).await?;
            follow(session, shown).await
        }
        (Some(UpgradeCommand::Abort), _) => {
            let shown: UpgradeShown = session.client.post(&format!("{PATH}/abort"), &json!({})).await?;
            follow(session, shown).await
        }
        (None, Some(binary)) => start(session, &args, binary).await,
        (None, None) => Err(CliError::usage("which binary should all hosts run?").hint("dunlin cluster upgrade --binary FILE")),
    }
}

async fn start(session: &Session, args: &UpgradeArgs, binary: &Path) -> Result<Exit, CliError> {
    let bake_s = parse_time(&args.bake)?.div_ceil(1000);
    let unreadable = |error: std::io::Error| {
        CliError::usage(format!("{} cannot be read: {error}", binary.display())).hint("name the new binary: dunlin cluster upgrade --binary FILE")
    };
    let mut file = File::open(binary).map_err(unreadable)?;
    let sha256 = digest(&mut file).map_err(unreadable)?;
    let file = File::open(binary).map_err(unreadable)?;
    let canary = args.canary.as_ref().map_or(String::new(), |host| format!("&canary={host}"));
    let path = format!("{PATH}?sha256={sha256}&parallel={}&bake_s={bake_s}{canary}", args.parallel);
    let chunks = futures_util::stream::unfold(file, |mut file| async move {
        let mut chunk = vec![0; CHUNK_BYTES];
        match file.read(&mut chunk) {
            Ok(0) => None,
            Ok(read) => {
                chunk.truncate(read);
                Some((Ok(Bytes::from(chunk)), file))
            }
            Err(error) => Some((Err(error), file)),
        }
    });
    // Whether it may be is asked first: a no in the middle of a long upload is heard badly.
    let _null: Option<UpgradeShown> = session.client.post(&format!("{path}&only_check=true"), &json!({})).await?;
    let shown: UpgradeShown = session.client.send_stream(&path, chunks).await?;
    if args.detach {
        show(session, &shown);
        return Ok(Exit::Ok);
    }
    follow(session, shown).await
}

fn digest(file: &mut File) -> std::io::Result<String> {
    let mut hash = Sha256::new();
    std::io::copy(file, &mut hash)?;
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// To its end, line by line. Whoever ends this command ends nothing else.
async fn follow(session: &Session, first: UpgradeShown) -> Result<Exit, CliError> {
    let (mut shown, mut told) = (first, 0);
    let mut heard = Instant::now();
    loop {
        told = tell(session, &shown, told);
        if shown.state != UpgradeState::Running {
            return ended(session, &shown);
        }
        tokio::time::sleep(LOOK_EVERY).await;
        match session.client.get::<UpgradeShown>(PATH).await {
            Ok(next) => (shown, heard) = (next, Instant::now()),
            Err(error) if passes(&error) && heard.elapsed() < SILENT_AT_MOST => {}
            Err(error) => {
                return Err(CliError::from(error).hint("the upgrade goes on where it can; `dunlin cluster upgrade status` shows it once control answers"));
            }
        }
    }
}

/// Control restarts as part of it.
fn passes(error: &ApiError) -> bool {
    match error {
        ApiError::Refused { http_status, .. } => *http_status >= 500,
        ApiError::Unreachable { .. } | ApiError::Broken(_) => true,
        _ => false,
    }
}

/// Prints what has not been told, and returns how many lines were.
fn tell(session: &Session, shown: &UpgradeShown, told: u64) -> u64 {
    let all = shown.story_dropped + shown.story.len() as u64;
    let new = all.saturating_sub(told.max(shown.story_dropped)) as usize;
    if !session.json {
        for line in &shown.story[shown.story.len() - new..] {
            let seconds = line.at_ms.saturating_sub(shown.started_at_ms) as f64 / 1000.0;
            ui::print_line(&format!("[{seconds:6.1}s] {}", line.text));
        }
    }
    all
}

fn ended(session: &Session, shown: &UpgradeShown) -> Result<Exit, CliError> {
    if session.json {
        ui::print_json(shown);
    }
    if shown.state == UpgradeState::Done {
        let left: Vec<&UpgradeTurn> = shown.hosts.iter().filter(|turn| turn.phase == "skipped").collect();
        if left.is_empty() {
            return Ok(Exit::Ok);
        }
        let told: Vec<String> = left.iter().map(|turn| format!("{} ({})", turn.host, turn.why.as_deref().unwrap_or("it did not answer"))).collect();
        return Err(CliError::failed(format!("the other hosts run it, and these were left out: {}", told.join(", ")))
            .hint("`dunlin cluster upgrade resume` gives them their turn once they answer"));
    }
    let why = shown.why.as_deref().unwrap_or("it has stopped");
    Err(CliError::failed(format!("the upgrade has stopped: {why}")).hint(next(shown)))
}

/// What an operator does about an upgrade that has stopped.
fn next(shown: &UpgradeShown) -> String {
    let failed = shown.hosts.iter().find(|turn| turn.phase == "failed");
    let kept = shown.hosts.iter().filter(|turn| turn.phase == "kept").count();
    let look = failed.map_or(String::new(), |turn| format!("`dunlin host debug {}` collects what there is to know; ", turn.host));
    let stuck = failed.filter(|turn| turn.is_back == Some(false)).map_or(String::new(), |turn| {
        format!("on {} `dunlin upgrade` with the binary from before, beside it as .previous, takes it back if it did not do so itself; ", turn.host)
    });
    let back = match kept {
        0 => String::new(),
        kept => format!("; {kept} hosts have kept it, and `dunlin cluster upgrade --binary` with the one from before takes them back"),
    };
    format!("{look}{stuck}begin anew with a mended binary, or `dunlin cluster upgrade resume` gives hosts that failed another turn{back}")
}

fn show(session: &Session, shown: &UpgradeShown) {
    if session.json {
        return ui::print_json(shown);
    }
    let state = match shown.state {
        UpgradeState::Running => "running",
        UpgradeState::Stopped => "stopped",
        UpgradeState::Done => "done",
    };
    ui::print_line(&format!("{state}: {} (sha256 {})", shown.version, shown.sha256));
    let rows: Vec<_> = shown.hosts.iter().map(row).collect();
    ui::print_table(&["HOST", "PHASE", "WHY"], &rows);
    if shown.state == UpgradeState::Stopped {
        eprintln!("next: {}", next(shown));
    }
}

fn row(turn: &UpgradeTurn) -> Vec<String> {
    let phase = match turn.is_back {
        Some(true) => format!("{}, is back", turn.phase),
        Some(false) => format!("{}, not known to be back", turn.phase),
        None => turn.phase.replace('_', " "),
    };
    vec![turn.host.to_string(), phase, turn.why.clone().unwrap_or("-".into())]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(phases: &[(&str, Option<bool>)]) -> UpgradeShown {
        let turn = |(n, (phase, is_back)): (usize, &(&str, Option<bool>))| {
            json!({ "host": format!("h{n}"), "phase": phase, "is_back": is_back, "why": is_back.map(|_| "it burnt") })
        };
        serde_json::from_value(json!({
            "id": "1", "version": "dunlin 2", "sha256": "ab", "state": "stopped", "why": "h1: it burnt", "bake_s": 60, "parallel": 1,
            "started_at_ms": 0, "hosts": phases.iter().enumerate().map(turn).collect::<Vec<_>>(), "story": [], "story_dropped": 0,
        }))
        .unwrap()
    }

    #[test]
    fn what_to_do_next_depends_on_who_has_what() {
        let check = |phases: &[(&str, Option<bool>)], says: &[&str], never: &str| {
            let found = next(&shown(phases));
            assert!(says.iter().all(|text| found.contains(text)) && !found.contains(never), "{found}");
        };
        check(&[("failed", Some(true)), ("waiting", None)], &["dunlin host debug h0", "resume"], "from before");
        check(&[("kept", None), ("failed", Some(true))], &["dunlin host debug h1", "1 hosts have kept it"], ".previous");
        check(&[("failed", Some(false))], &["on h0 `dunlin upgrade`", ".previous"], "have kept it");
        assert_eq!(row(&shown(&[("failed", Some(true))]).hosts[0]), ["h0", "failed, is back", "it burnt"]);
        assert_eq!(row(&shown(&[("going_back", None)]).hosts[0]), ["h0", "going back", "-"]);
    }
}
