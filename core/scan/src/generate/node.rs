//! Dockerfiles of Node.js apps.

use super::USER;
use std::fmt::Write;

/// Yarn 1 has ended; this is its last release.
const YARN: &str = "yarn@1.22.22";

/// Who installs dependencies. None of them needs corepack, which not every image has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Manager {
    Npm { locked: bool },
    /// Yarn 1, with a lock file.
    Yarn,
    /// With a lock file; the version as `npm install` takes it.
    Pnpm { version: String },
}

/// How dependencies are installed and a build is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NodeSource {
    pub version: String,
    pub manager: Manager,
    /// The files that an installation reads.
    pub copies: Vec<String>,
    /// Whether there is anything to install.
    pub installs: bool,
    /// Scripts of package.json run at the installation, or it reads more files.
    pub sources_first: bool,
    /// The command that builds.
    pub build: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NodeRecipe {
    pub source: NodeSource,
    /// What starts the app is a development dependency.
    pub keep_development: bool,
    /// The start script runs yarn or pnpm.
    pub manager_at_start: bool,
    pub command: Vec<String>,
}

impl Manager {
    pub fn program(&self) -> &'static str {
        match self {
            Self::Npm { .. } => "npm",
            Self::Yarn => "yarn",
            Self::Pnpm { .. } => "pnpm",
        }
    }

    /// Puts the program into the image; some images have one already, of a version of theirs.
    fn setup(&self) -> Option<String> {
        let package = match self {
            Self::Npm { .. } => return None,
            Self::Yarn => YARN.to_owned(),
            Self::Pnpm { version } => format!("pnpm@{version}"),
        };
        Some(format!("RUN npm install --global --force {package}\n"))
    }

    fn install(&self) -> &'static str {
        match self {
            Self::Npm { locked: true } => "npm ci",
            Self::Npm { locked: false } => "npm install",
            Self::Yarn => "yarn install --frozen-lockfile",
            Self::Pnpm { .. } => "pnpm install --frozen-lockfile",
        }
    }

    fn install_for_production(&self) -> String {
        let option = match self {
            Self::Npm { .. } => "--omit=dev",
            Self::Yarn => "--production",
            Self::Pnpm { .. } => "--prod",
        };
        format!("{} {option}", self.install())
    }

    /// Removes what only the build needed.
    fn prune(&self) -> &'static str {
        match self {
            Self::Npm { .. } => "npm prune --omit=dev --ignore-scripts",
            Self::Yarn => "yarn install --frozen-lockfile --production --ignore-scripts --prefer-offline",
            Self::Pnpm { .. } => "CI=true pnpm prune --prod --ignore-scripts",
        }
    }
}

/// The pnpm that reads a lock file: what package.json names, else the last that writes the format.
pub(crate) fn pnpm_of_lock(text: &str, package_manager: Option<&str>) -> Option<String> {
    let named = package_manager.and_then(|named| named.strip_prefix("pnpm@"));
    let named = named.map(|named| named.split('+').next().unwrap_or_default());
    let is_version = |text: &&str| !text.is_empty() && text.len() < 20 && text.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    if let Some(version) = named.filter(is_version) {
        return Some(version.to_owned());
    }
    let format = text.lines().take(20).find_map(|line| line.strip_prefix("lockfileVersion:"))?;
    let format = format.trim().trim_matches(['\'', '"']);
    let version = match format.split('.').next()? {
        "9" => "9",
        "6" => "8",
        "5" => "7",
        _ => return None,
    };
    Some(version.to_owned())
}

/// The stage that installs and builds. `for_production`: what only development needs is left out or removed.
pub(super) fn write_build(out: &mut String, source: &NodeSource, for_production: ForProduction) -> std::fmt::Result {
    let manager = &source.manager;
    writeln!(out, "FROM node:{}-slim AS build\nWORKDIR /app", source.version)?;
    out.push_str(&manager.setup().unwrap_or_default());
    let install_all = source.build.is_some() || source.sources_first || for_production == ForProduction::No;
    let install = if install_all { manager.install().to_owned() } else { manager.install_for_production() };
    if source.sources_first {
        writeln!(out, "# The installation reads more than the manifests.\nCOPY . .\nRUN {install}")?;
    } else {
        writeln!(out, "COPY {} ./\nRUN {install}", source.copies.join(" "))?;
        if source.build.is_some() {
            writeln!(out, "COPY . .")?;
        }
    }
    if let Some(build) = &source.build {
        writeln!(out, "RUN {build}")?;
    }
    if install_all && for_production == ForProduction::Yes {
        writeln!(out, "# What only the build needed goes.\nRUN {}", manager.prune())?;
    }
    Ok(())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ForProduction {
    Yes,
    No,
}

pub(super) fn write(out: &mut String, recipe: &NodeRecipe, port: u16) -> std::fmt::Result {
    let source = &recipe.source;
    if source.installs {
        writeln!(out, "\n# Dependencies{}.", if source.build.is_some() { " and the build" } else { "" })?;
        write_build(out, source, if recipe.keep_development { ForProduction::No } else { ForProduction::Yes })?;
    }
    writeln!(out, "\n# What runs, as a user without rights.\nFROM node:{}-slim", source.version)?;
    writeln!(out, "ENV NODE_ENV=production PORT={port}")?;
    if recipe.manager_at_start {
        out.push_str(&source.manager.setup().unwrap_or_default());
    }
    write!(out, "{USER}")?;
    writeln!(out, "WORKDIR /app")?;
    if !source.installs {
        writeln!(out, "COPY --chown=app:app . .")?;
    } else if source.build.is_some() || source.sources_first {
        writeln!(out, "COPY --from=build --chown=app:app /app ./")?;
    } else {
        writeln!(out, "COPY --from=build /app/node_modules ./node_modules\nCOPY --chown=app:app . .")?;
    }
    writeln!(out, "USER app")
}
