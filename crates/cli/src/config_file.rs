//! Finding and reading the app's configuration.

use crate::args::{AppArgs, ConfigCommand};
use crate::{CliError, Exit, Session, ui};
use dunlin_model::AppName;
use dunlin_model::config::{self, AppConfig, ConfigProblem};
use std::fs;
use std::path::{Path, PathBuf};

/// Looked for in this order.
const FILE_NAMES: &[&str] = &["dunlin.toml", "fly.toml"];

/// A configuration and where it came from.
pub struct Loaded {
    pub config: AppConfig,
    pub path: PathBuf,
}

impl Loaded {
    pub fn app_name(&self) -> Result<AppName, CliError> {
        self.config.app.clone().ok_or_else(|| {
            CliError::usage(format!("{} does not name its app", self.path.display()))
                .hint("add `app = \"NAME\"`, or use --app NAME")
        })
    }
}

/// Where the configuration of `dir` is, if it has one.
pub fn find(dir: &Path, named: Option<&Path>) -> Option<PathBuf> {
    match named {
        Some(path) => Some(path.to_owned()),
        None => FILE_NAMES.iter().map(|name| dir.join(name)).find(|path| path.is_file()),
    }
}

/// Reads it; unknown keys, and known ones that are not honoured and not in `ignore`, are errors.
pub fn load(dir: &Path, named: Option<&Path>, ignore: &[String]) -> Result<Loaded, CliError> {
    let Some(path) = find(dir, named) else {
        return Err(CliError::usage(format!("there is no dunlin.toml or fly.toml in {}", dir.display()))
            .hint("`dunlin launch` writes one, or name it with --config"));
    };
    let text = fs::read_to_string(&path)
        .map_err(|e| CliError::usage(format!("{} cannot be read: {e}", path.display())))?;
    let name = path.display().to_string();
    let parsed = config::parse(&text, &name).map_err(unreadable)?;
    let (stopping, passed): (Vec<_>, Vec<_>) = parsed.problems.iter().partition(|problem| match problem {
        ConfigProblem::Note { .. } => false,
        ConfigProblem::NotHonoured { key, .. } => !ignore.contains(key),
        ConfigProblem::Unknown { .. } => true,
    });
    for problem in passed {
        eprintln!("ignored: {name}: {problem}");
    }
    if stopping.is_empty() {
        return Ok(Loaded { config: parsed.config, path });
    }
    let only_known = stopping.iter().all(|problem| matches!(problem, ConfigProblem::NotHonoured { .. }));
    let hint = if only_known {
        "take the key out, or go on without it: --ignore KEY"
    } else {
        "correct the key; `dunlin config show` prints what is understood"
    };
    Err(CliError::usage(format!("{name} has {} problem(s)", stopping.len()))
        .causes(stopping.iter().map(|problem| problem.to_string()).collect())
        .hint(hint))
}

/// The error names file, line and column itself.
fn unreadable(error: config::ConfigError) -> CliError {
    CliError::usage(error.to_string()).hint("mend it there; `dunlin config validate` checks the file again")
}

/// The app that a command means: `--app`, else the configuration in this directory.
pub fn app_name(args: &AppArgs) -> Result<AppName, CliError> {
    if let Some(app) = &args.app {
        return Ok(app.clone());
    }
    let Some(path) = find(Path::new("."), args.config.as_deref()) else {
        return Err(CliError::usage("which app? there is no dunlin.toml or fly.toml in this directory")
            .hint("use --app NAME; `dunlin apps list` shows them"));
    };
    let text = fs::read_to_string(&path)
        .map_err(|e| CliError::usage(format!("{} cannot be read: {e}", path.display())))?;
    let config = config::parse(&text, &path.display().to_string()).map_err(unreadable)?.config;
    Loaded { config, path }.app_name()
}

pub async fn config(session: &Session, command: ConfigCommand) -> Result<Exit, CliError> {
    match command {
        ConfigCommand::Show(args) => {
            let loaded = load_lenient(&args)?;
            if session.json {
                ui::print_json(&loaded.config);
            } else {
                ui::print_line(config::render(&loaded.config).trim_end());
            }
        }
        ConfigCommand::Validate(args) => {
            let loaded = load(Path::new("."), args.config.as_deref(), &[])?;
            if session.json {
                ui::print_json(&serde_json::json!({ "valid": true, "file": loaded.path }));
            } else {
                ui::print_line(&format!("{} is valid", loaded.path.display()));
            }
        }
    }
    Ok(Exit::Ok)
}

/// Shows what is understood even where something is not.
fn load_lenient(args: &AppArgs) -> Result<Loaded, CliError> {
    let path = find(Path::new("."), args.config.as_deref()).ok_or_else(|| {
        CliError::usage("there is no dunlin.toml or fly.toml in this directory").hint("name it with --config FILE")
    })?;
    let text = fs::read_to_string(&path)
        .map_err(|e| CliError::usage(format!("{} cannot be read: {e}", path.display())))?;
    let parsed = config::parse(&text, &path.display().to_string()).map_err(unreadable)?;
    for problem in &parsed.problems {
        eprintln!("{}: {problem}", path.display());
    }
    Ok(Loaded { config: parsed.config, path })
}
