//! `deploy`, `releases`, `rollback`: the CLI uploads and follows; the server does the work.

use crate::args::{AppArgs, BuildArgs, DeployArgs, RollbackArgs};
use crate::config_file::{self, Loaded, app_name};
use crate::{CliError, Exit, Session, context, local_files, ui};
use base64::Engine;
use dunlin_api::{ApiError, ErrorCode};
use dunlin_api::wire::{AppStatus, BuildEvent, CreateRelease, DeployEvent, Release, Rollback};
use dunlin_model::AppName;
use dunlin_model::desired::ReleaseStatus;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

/// A broken event stream is taken up again this often: the server may just be restarting.
const RECONNECTS: u32 = 60;
const RECONNECT_PAUSE: Duration = Duration::from_millis(500);

pub async fn deploy(session: &Session, args: DeployArgs) -> Result<Exit, CliError> {
    let mut loaded = config_file::load(&args.path, args.target.config.as_deref(), &args.build.ignore)?;
    if let Some(app) = args.target.app {
        loaded.config.app = Some(app);
    }
    let app = loaded.app_name()?;
    let source = Source { app: &app, dir: &args.path, image: args.image, build: &args.build };
    deploy_loaded(session, source, loaded, args.detach).await
}

/// Where a release's image comes from.
pub struct Source<'a> {
    pub app: &'a AppName,
    pub dir: &'a Path,
    /// Instead of building, and before what the configuration names.
    pub image: Option<String>,
    pub build: &'a BuildArgs,
}

/// Builds unless an image is given, releases, follows.
pub async fn deploy_loaded(session: &Session, source: Source<'_>, loaded: Loaded, detach: bool) -> Result<Exit, CliError> {
    let app = source.app;
    let progress = ui::Progress::new();
    let image = match source.image.clone().or_else(|| loaded.config.build.image.clone()) {
        Some(image) => image,
        None => {
            progress.step(&format!("building {app} from {}", source.dir.display()));
            build_image(session, &source, &loaded, &progress).await?
        }
    };
    progress.step(&format!("releasing {image}"));
    let config = local_files::read_in(loaded.config, source.dir)?;
    let body = CreateRelease { image, config, reason: String::new() };
    let release: Release = session.client.post(&format!("/v1/apps/{app}/releases"), &body).await?;
    if detach {
        print_release(session, &release);
        return Ok(Exit::Ok);
    }
    follow_with(session, app, release.version, &progress).await
}

async fn build_image(
    session: &Session,
    source: &Source<'_>,
    loaded: &Loaded,
    progress: &ui::Progress,
) -> Result<String, CliError> {
    let (app, build, config) = (source.app, source.build, &loaded.config.build);
    let mut args: BTreeMap<String, String> = config.args.clone();
    args.extend(build.build_arg.iter().cloned());
    let secrets = build_secrets(&build.build_secret)?;
    let mut query = format!("?no_cache={}", build.no_cache);
    if let Some(dockerfile) = &config.dockerfile {
        query.push_str(&format!("&dockerfile={}", encode(dockerfile)));
    }
    if let Some(target) = build.build_target.as_ref().or(config.build_target.as_ref()) {
        query.push_str(&format!("&target={}", encode(target)));
    }
    let context = context::stream(source.dir, config.ignorefile.as_deref(), config.dockerfile.as_deref())?;
    progress.detail(&format!("context: {} files, {}", context.files, size(context.bytes)));
    let headers =
        [("dunlin-build-args", header(&args)?), ("dunlin-build-secrets", header(&secrets)?)];
    let path = format!("/v1/apps/{app}/builds{query}");
    let mut events = match session.client.upload(&path, &headers, context.body).await {
        Ok(events) => events,
        Err(error) => return Err(broken_build(error, &context.read_error)),
    };
    loop {
        match events.next::<BuildEvent>().await.map_err(|error| broken_build(error, &context.read_error))? {
            Some(BuildEvent::Output { line }) => progress.detail(&line),
            Some(BuildEvent::Step { message }) => progress.step(&message),
            Some(BuildEvent::Done { image: _, digest, .. }) => return Ok(format!("{app}@{digest}")),
            Some(BuildEvent::Failed { error, step: _, hint, last_lines }) => {
                let error = CliError::failed(error).causes(last_lines);
                return Err(match hint {
                    Some(hint) => error.hint(hint),
                    None => error,
                });
            }
            None => {
                return Err(CliError::failed("the server ended the build without a result")
                    .hint("was the server restarted? deploy again: finished layers are cached"));
            }
        }
    }
}

/// A build ends with its connection: unlike a deploy, nothing of it goes on.
fn broken_build(error: ApiError, read_error: &context::ReadError) -> CliError {
    if let Some(why) = read_error.take() {
        return CliError::failed(format!("the source could not be read: {why}")).hint("mend that, or name it in .dockerignore, and deploy again");
    }
    let is_broken = matches!(error, ApiError::Broken(_));
    let mut error = CliError::from(error);
    if is_broken {
        error.exit = Exit::Failed;
        error.hint = Some("the build ended with it and nothing was changed; deploy again: finished layers are cached".into());
    }
    error
}

/// Values come from the command line, a file (`@FILE`) or standard input (`-`).
fn build_secrets(given: &[(String, String)]) -> Result<BTreeMap<String, String>, CliError> {
    let mut secrets = BTreeMap::new();
    for (name, value) in given {
        let value = match value.strip_prefix('@') {
            Some(file) => std::fs::read_to_string(file)
                .map_err(|e| CliError::usage(format!("the build secret {name} cannot be read from {file}: {e}")))?,
            None if value == "-" => crate::secrets::read_value()?,
            None => value.clone(),
        };
        secrets.insert(name.clone(), value);
    }
    Ok(secrets)
}

fn header(values: &BTreeMap<String, String>) -> Result<String, CliError> {
    let json = serde_json::to_vec(values).map_err(|e| CliError::failed(e.to_string()))?;
    Ok(base64::engine::general_purpose::STANDARD.encode(json))
}

/// Percent-encodes a query value.
fn encode(text: &str) -> String {
    text.bytes().map(|b| match b {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => char::from(b).to_string(),
        _ => format!("%{b:02X}"),
    }).collect()
}

fn size(bytes: u64) -> String {
    match bytes {
        0..1_000_000 => format!("{} kB", bytes.div_ceil(1000)),
        _ => format!("{:.1} MB", bytes as f64 / 1e6),
    }
}

/// Follows a release to its end.
pub async fn follow(session: &Session, app: &AppName, release: u32) -> Result<Exit, CliError> {
    follow_with(session, app, release, &ui::Progress::new()).await
}

async fn follow_with(session: &Session, app: &AppName, release: u32, progress: &ui::Progress) -> Result<Exit, CliError> {
    let mut seen = None;
    let mut broken = 0;
    loop {
        match follow_once(session, app, release, progress, &mut seen).await {
            Ok(event) => return finish(session, app, event, progress).await,
            Err(error) if is_passing(&error) && broken < RECONNECTS => {
                if broken == 0 {
                    progress.step("the server is away; the deploy goes on when it is back");
                }
                broken += 1;
                tokio::time::sleep(RECONNECT_PAUSE).await;
            }
            Err(error) => {
                let mut error = CliError::from(error);
                error.exit = Exit::Unknown;
                return Err(error.hint(format!("the server goes on by itself: `dunlin releases --app {app}` tells how it ended")));
            }
        }
    }
}

/// Whether a server that restarts would explain it.
fn is_passing(error: &ApiError) -> bool {
    match error {
        ApiError::Broken(_) | ApiError::Unreachable { .. } => true,
        ApiError::Refused { body, .. } => body.status == ErrorCode::Unavailable,
        ApiError::BadAnswer(_) => false,
    }
}

/// Prints events that are newer than `seen`, returns the closing one. A server that was killed may have
/// told events that it had not stored: they are known by their time, not by their number.
async fn follow_once(
    session: &Session,
    app: &AppName,
    release: u32,
    progress: &ui::Progress,
    seen: &mut Option<(u64, String)>,
) -> Result<DeployEvent, ApiError> {
    let mut events = session.client.lines(&format!("/v1/apps/{app}/releases/{release}/events")).await?;
    while let Some(event) = events.next::<DeployEvent>().await? {
        if event.ended.is_some() {
            return Ok(event);
        }
        let is_new = seen.as_ref().is_none_or(|(at_ms, message)| {
            event.at_ms > *at_ms || (event.at_ms == *at_ms && event.message != *message)
        });
        if is_new {
            progress.step(&event.message);
            *seen = Some((event.at_ms, event.message));
        }
    }
    Err(ApiError::Broken(std::io::ErrorKind::UnexpectedEof.into()))
}

async fn finish(session: &Session, app: &AppName, event: DeployEvent, progress: &ui::Progress) -> Result<Exit, CliError> {
    let exit = match event.ended {
        Some(ReleaseStatus::Succeeded) => Exit::Ok,
        Some(ReleaseStatus::RolledBack) => Exit::RolledBack,
        Some(ReleaseStatus::Superseded) => Exit::Superseded,
        Some(ReleaseStatus::Failed) => Exit::ReleaseFailed,
        Some(ReleaseStatus::Running) | None => Exit::Unknown,
    };
    if exit != Exit::Ok {
        let mut error = CliError::new(exit, event.message).causes(event.details);
        error.hint = event.hint;
        return Err(error);
    }
    progress.step(&event.message);
    // The deploy is over and well, whatever becomes of this question.
    let urls = match session.client.get::<AppStatus>(&format!("/v1/apps/{app}/status")).await {
        Ok(status) => status.urls,
        Err(error) => {
            eprintln!("its URL could not be asked for: {error}");
            vec![]
        }
    };
    if session.json {
        ui::print_json(&serde_json::json!({ "app": app, "release": event.release, "status": "succeeded", "urls": urls }));
    } else {
        urls.iter().for_each(|url| ui::print_line(url));
    }
    Ok(Exit::Ok)
}

pub async fn releases(session: &Session, args: AppArgs) -> Result<Exit, CliError> {
    let app = app_name(&args)?;
    let mut releases: Vec<Release> = session.client.get(&format!("/v1/apps/{app}/releases")).await?;
    releases.sort_by_key(|release| std::cmp::Reverse(release.version));
    if session.json {
        ui::print_json(&releases);
        return Ok(Exit::Ok);
    }
    let rows: Vec<_> = releases.iter().map(|release| {
        vec![format!("v{}", release.version), word(release.status).to_owned(), release.image.clone(), release.reason.clone()]
    }).collect();
    ui::print_table(&["RELEASE", "STATUS", "IMAGE", "REASON"], &rows);
    Ok(Exit::Ok)
}

pub async fn rollback(session: &Session, args: RollbackArgs) -> Result<Exit, CliError> {
    let app = app_name(&args.target)?;
    let body = Rollback { version: args.version };
    let release: Release = session.client.post(&format!("/v1/apps/{app}/rollback"), &body).await?;
    if args.detach {
        print_release(session, &release);
        return Ok(Exit::Ok);
    }
    follow(session, &app, release.version).await
}

pub fn print_release(session: &Session, release: &Release) {
    if session.json {
        ui::print_json(release);
    } else {
        ui::print_line(&format!("release v{} of {}", release.version, release.app));
    }
}

pub fn word(status: ReleaseStatus) -> &'static str {
    match status {
        ReleaseStatus::Running => "deploying",
        ReleaseStatus::Succeeded => "succeeded",
        ReleaseStatus::Failed => "failed",
        ReleaseStatus::RolledBack => "rolled back",
        ReleaseStatus::Superseded => "superseded",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn query_values_are_encoded() {
        assert_eq!(encode("docker/File name&x"), "docker/File%20name%26x");
    }
}
