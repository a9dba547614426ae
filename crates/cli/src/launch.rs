//! `launch`: look, propose, ask once, write, create, deploy.

use crate::args::LaunchArgs;
use crate::config_file::{self, Loaded};
use crate::{CliError, Exit, Session, deploy, ui};
use dunlin_api::wire::{App, CreateApp};
use dunlin_api::{ApiError, ErrorCode};
use dunlin_model::AppName;
use dunlin_model::config::{self, AppConfig};
use dunlin_scan::{FileToWrite, MAX_FILES, Proposal, Scan, Tree, Unrecognised};
use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

/// A machine for an image that nobody looked into.
const IMAGE_MEMORY_MB: u32 = 256;
/// Deeper trees are not an app's own source.
const MAX_DEPTH: usize = 24;

pub async fn launch(session: &Session, args: LaunchArgs) -> Result<Exit, CliError> {
    let dir = fs::canonicalize(&args.path)
        .map_err(|e| CliError::usage(format!("{} cannot be looked at: {e}", args.path.display())))?;
    if !dir.is_dir() {
        return Err(CliError::usage(format!("{} is not a directory", dir.display())).hint("name the directory with the app's source"));
    }
    let (existing, named_before) = existing_config(&dir, &args)?;
    let (scan, mut proposal) = propose(&dir, &args, existing.as_ref())?;
    if args.manifest {
        print_manifest(session, &scan, &proposal);
        return Ok(Exit::Ok);
    }
    let app = proposal.app.clone();
    let is_ours = named_before.as_ref() == Some(&app);
    let exists = if args.no_deploy { false } else { name_is_used(session, &app, is_ours).await? };
    if let Some(loaded) = existing.as_ref().filter(|_| named_before.as_ref() != Some(&app)) {
        let file = loaded.path.display();
        proposal.notes.push(format!("{file} does not name {app}: give later commands --app {app}, or write it there"));
    }
    show(&proposal, existing.as_ref().map(|loaded| loaded.path.as_path()), exists);
    if !args.yes && !ui::confirm("Go on?")? {
        return Err(CliError::failed("nothing was changed"));
    }
    for file in &proposal.files {
        write_new(&dir, file)?;
    }
    if args.no_deploy {
        print_written(session, &proposal);
        return Ok(Exit::Ok);
    }
    if !exists {
        let body = CreateApp::named(app.clone());
        session.client.post::<App>("/v1/apps", &body).await?;
    }
    let path = existing.map_or_else(|| dir.join("dunlin.toml"), |loaded| loaded.path);
    let loaded = Loaded { config: AppConfig { app: Some(app.clone()), ..proposal.config }, path };
    deploy::deploy_loaded(session, deploy::Source { app: &app, dir: &dir, image: None, build: &args.build }, loaded, false).await
}

/// The configuration in the directory, and the app that it names: that one is this source's own.
fn existing_config(dir: &Path, args: &LaunchArgs) -> Result<(Option<Loaded>, Option<AppName>), CliError> {
    if config_file::find(dir, None).is_none() {
        return Ok((None, None));
    }
    let mut loaded = config_file::load(dir, None, &args.build.ignore)?;
    let named = loaded.config.app.clone();
    if let Some(name) = &args.name {
        loaded.config.app = Some(name.clone());
    }
    Ok((Some(loaded), named))
}

fn propose(dir: &Path, args: &LaunchArgs, existing: Option<&Loaded>) -> Result<(Scan, Proposal), CliError> {
    let scan = dunlin_scan::scan(&Directory { root: dir.to_owned() });
    let dir_name = dir.file_name().and_then(|name| name.to_str()).unwrap_or("app");
    let name = args.name.clone().unwrap_or_else(|| dunlin_scan::suggest_name(dir_name));
    let config = match (&args.image, existing) {
        (None, loaded) => loaded.map(|loaded| loaded.config.clone()),
        (Some(image), loaded) => {
            let port = args.port.unwrap_or(config::DEFAULT_PORT);
            let mut config = loaded.map_or_else(|| AppConfig::default_for(name.clone(), port, IMAGE_MEMORY_MB), |loaded| loaded.config.clone());
            config.build.image = Some(image.clone());
            Some(config)
        }
    };
    let proposed = dunlin_scan::propose(&scan, name.as_str(), config);
    let mut proposal = proposed.map_err(|why: Unrecognised| CliError::usage(why.to_string()).hint(Unrecognised::HINT))?;
    if args.image.is_some() && existing.is_none() {
        proposal.files = vec![FileToWrite { path: "dunlin.toml".into(), content: config::render(&proposal.config) }];
    }
    Ok((scan, proposal))
}

fn print_manifest(session: &Session, scan: &Scan, proposal: &Proposal) {
    if session.json {
        ui::print_json(&serde_json::json!({ "proposal": proposal, "candidates": scan.candidates }));
        return;
    }
    ui::print_line(config::render(&proposal.config).trim_end());
}

/// Whether an app of that name is there and may be deployed to; one that is somebody else's is an error.
async fn name_is_used(session: &Session, app: &AppName, is_ours: bool) -> Result<bool, CliError> {
    match session.client.get::<App>(&format!("/v1/apps/{app}")).await {
        Ok(found) if is_ours || found.current_release == 0 => Ok(true),
        Ok(_) => Err(CliError::usage(format!("the name {app} is taken"))
            .hint(format!("choose another with --name; if this is the same app, `dunlin deploy --app {app}` deploys to it"))),
        Err(ApiError::Refused { body, .. }) if body.status == ErrorCode::NotFound => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn show(proposal: &Proposal, config: Option<&Path>, exists: bool) {
    let line = |label: &str, text: &str| eprintln!("{label:9} {text}");
    line("app", &format!("{}{}", proposal.app, if exists { " (it exists)" } else { "" }));
    line("what", &proposal.name);
    for evidence in &proposal.evidence {
        line("", &format!("seen in {evidence}"));
    }
    line("size", &format!("{}, {} MiB", proposal.vm_size, proposal.memory_mb));
    line("port", &format!("{}: {}", proposal.port, proposal.port_reason));
    if let Some(path) = config {
        line("uses", &path.display().to_string());
    }
    for (n, file) in proposal.files.iter().enumerate() {
        line(if n == 0 { "writes" } else { "" }, &file.path);
    }
    for note in &proposal.notes {
        line("note", note);
    }
    for warning in &proposal.warnings {
        line("warning", warning);
    }
}

fn print_written(session: &Session, proposal: &Proposal) {
    let paths: Vec<&str> = proposal.files.iter().map(|file| file.path.as_str()).collect();
    if session.json {
        ui::print_json(&serde_json::json!({ "app": proposal.app, "written": paths }));
    } else {
        paths.iter().for_each(|path| ui::print_line(path));
        eprintln!("not deployed; `dunlin apps create {}` and `dunlin deploy` do it", proposal.app);
    }
}

/// Never over a file that exists: the proposal was made from what was there.
fn write_new(dir: &Path, file: &FileToWrite) -> Result<(), CliError> {
    let path = dir.join(&file.path);
    let written = || -> io::Result<()> {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        OpenOptions::new().write(true).create_new(true).open(&path)?.write_all(file.content.as_bytes())
    };
    written().map_err(|e| {
        CliError::failed(format!("{} cannot be written: {e}", path.display())).hint("nothing was deployed; mend that and launch again")
    })
}

/// The source on disk. Links are not followed: what they lead to may be anywhere.
struct Directory {
    root: PathBuf,
}

impl Tree for Directory {
    fn list(&self) -> Vec<String> {
        let mut found = Vec::new();
        let mut pending = vec![(String::new(), 0)];
        while let Some((dir, depth)) = pending.pop() {
            // What cannot be read cannot be evidence; the build says so if it needs it.
            let Ok(entries) = fs::read_dir(self.root.join(&dir)) else { continue };
            let mut entries: Vec<_> = entries.flatten().collect();
            entries.sort_by_key(|entry| entry.file_name());
            for entry in entries {
                let (Some(name), Ok(kind)) = (entry.file_name().to_str().map(str::to_owned), entry.file_type()) else { continue };
                let path = if dir.is_empty() { name.clone() } else { format!("{dir}/{name}") };
                if kind.is_file() {
                    found.push(path);
                    if found.len() >= MAX_FILES {
                        return found;
                    }
                } else if kind.is_dir() && depth < MAX_DEPTH && !dunlin_scan::is_foreign(&name) {
                    pending.push((path, depth + 1));
                }
            }
        }
        found
    }

    fn read(&self, path: &str, limit: usize) -> Option<Vec<u8>> {
        let path = self.root.join(path);
        if !fs::symlink_metadata(&path).ok()?.is_file() {
            return None;
        }
        let mut bytes = Vec::new();
        fs::File::open(&path).ok()?.take(limit as u64 + 1).read_to_end(&mut bytes).ok()?;
        (bytes.len() <= limit).then_some(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_lists_its_own_files_only() {
        let dir = tempfile::tempdir().unwrap();
        for path in ["app.py", "src/x.py", "node_modules/a/index.js", ".git/config"] {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "x").unwrap();
        }
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("passwd")).unwrap();
        let tree = Directory { root: dir.path().to_owned() };
        let mut list = tree.list();
        list.sort();
        assert_eq!(list, ["app.py", "src/x.py"]);
        assert_eq!(tree.read("app.py", 1).as_deref(), Some(&b"x"[..]));
        assert_eq!(tree.read("app.py", 0), None);
        assert_eq!(tree.read("passwd", 1 << 20), None);
    }

    #[test]
    fn a_file_that_exists_is_never_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("Dockerfile"), "mine").unwrap();
        let file = FileToWrite { path: "Dockerfile".into(), content: "theirs".into() };
        assert!(write_new(dir.path(), &file).is_err());
        assert_eq!(fs::read_to_string(dir.path().join("Dockerfile")).unwrap(), "mine");
    }
}
