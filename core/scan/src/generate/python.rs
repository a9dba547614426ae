//! Dockerfiles of Python apps.

use super::{USER, exec_form};
use crate::manifest::Installer;
use crate::native::Packages;
use std::fmt::Write;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PythonRecipe {
    pub version: String,
    /// `None` = nothing to install.
    pub install: Option<Install>,
    pub packages: Packages,
    /// A server that the manifest does not have and the command needs.
    pub add: Option<&'static str>,
    pub src_layout: bool,
    pub start: Start,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Install {
    pub installer: Installer,
    pub copies: Vec<String>,
    /// It reads more of the app than these files.
    pub sources_first: bool,
    /// Something has no hash, as git fetches it.
    pub from_git: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Start {
    /// `module:object`, or `module:factory()`.
    Gunicorn { target: String },
    Uvicorn { target: String, factory: bool },
    Argv(Vec<String>),
}

pub(super) fn write(out: &mut String, recipe: &PythonRecipe, port: u16) -> std::fmt::Result {
    let image = format!("python:{}-slim", recipe.version);
    let venv = recipe.install.is_some() || recipe.add.is_some();
    if venv {
        writeln!(out, "\n# Dependencies go into a virtual environment; the rest of this stage is thrown away.")?;
        writeln!(out, "FROM {image} AS build")?;
        apt(out, "Needed to install", &recipe.packages.compiled, &recipe.packages.build)?;
        writeln!(out, "WORKDIR /app\nRUN python3 -m venv /venv\nENV PATH=/venv/bin:$PATH")?;
        if let Some(dependencies) = &recipe.install {
            install(out, dependencies)?;
        }
        if let Some(server) = recipe.add {
            writeln!(out, "# The server that runs the app; the app's own dependencies do not have it.")?;
            writeln!(out, "RUN pip install --no-cache-dir {server}")?;
        }
    }
    writeln!(out, "\n# What runs, as a user without rights.\nFROM {image}")?;
    apt(out, "Used at run time by", &recipe.packages.linked, &recipe.packages.run)?;
    if venv {
        writeln!(out, "ENV PATH=/venv/bin:$PATH")?;
    }
    if recipe.src_layout {
        writeln!(out, "ENV PYTHONPATH=/app/src")?;
    }
    writeln!(out, "ENV PYTHONUNBUFFERED=1 PORT={port}")?;
    write!(out, "{USER}")?;
    writeln!(out, "WORKDIR /app")?;
    if venv {
        writeln!(out, "COPY --from=build /venv /venv")?;
    }
    // An installation in place leaves links to the sources, and files beside them.
    if recipe.install.as_ref().is_some_and(|install| install.sources_first) {
        writeln!(out, "COPY --from=build --chown=app:app /app ./\nUSER app")
    } else {
        writeln!(out, "COPY --chown=app:app . .\nUSER app")
    }
}

/// Installs packages of Debian; nothing without any.
fn apt(out: &mut String, why: &str, of: &[&str], packages: &[&str]) -> std::fmt::Result {
    if packages.is_empty() {
        return Ok(());
    }
    writeln!(out, "# {why} {}.", of.join(", "))?;
    writeln!(
        out,
        "RUN apt-get update \\\n && apt-get install -y --no-install-recommends {} \\\n && rm -rf /var/lib/apt/lists/*",
        packages.join(" ")
    )
}

fn install(out: &mut String, install: &Install) -> std::fmt::Result {
    if install.sources_first {
        writeln!(out, "# The installation reads more than the manifests.\nCOPY . .")?;
    } else {
        copy_manifests(out, &install.copies)?;
    }
    // pip takes hashes for all or for none.
    let (uv_hashes, poetry_hashes) = if install.from_git { (" --no-hashes", " --without-hashes") } else { ("", "") };
    let export = match install.installer {
        Installer::Pip => None,
        Installer::Package => return writeln!(out, "RUN pip install --no-cache-dir ."),
        Installer::Project => {
            let program = "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project'].get('dependencies', []), sep='\\n')";
            Some(("The dependencies that pyproject.toml lists.", format!("python3 -c \"{program}\" > /tmp/requirements.txt")))
        }
        Installer::Uv => Some((
            "The versions of uv.lock.",
            format!("pip install --no-cache-dir uv && uv export --frozen --no-dev --no-emit-project{uv_hashes} --output-file /tmp/requirements.txt"),
        )),
        Installer::Poetry { locked } => {
            let lock = if locked { "" } else { "poetry lock && " };
            let what = if locked { "The versions of poetry.lock." } else { "There is no poetry.lock: versions are chosen at each build." };
            Some((what, format!("pip install --no-cache-dir poetry poetry-plugin-export && {lock}poetry export{poetry_hashes} --output /tmp/requirements.txt")))
        }
        Installer::Pipenv { locked } => {
            let lock = if locked { "" } else { "pipenv lock && " };
            let what = if locked { "The versions of Pipfile.lock." } else { "There is no Pipfile.lock: versions are chosen at each build." };
            Some((what, format!("pip install --no-cache-dir pipenv && {lock}pipenv requirements > /tmp/requirements.txt")))
        }
    };
    match export {
        None => writeln!(out, "RUN pip install --no-cache-dir -r requirements.txt"),
        Some((what, command)) => {
            // Tools of the build have an environment of their own, so that the app's stays clean.
            let command = if matches!(install.installer, Installer::Project) {
                command
            } else {
                format!("python3 -m venv /tools && PATH=/tools/bin:$PATH && {command}").replace(" && ", " \\\n && ")
            };
            writeln!(out, "# {what}\nRUN {command}")?;
            writeln!(out, "RUN pip install --no-cache-dir -r /tmp/requirements.txt")
        }
    }
}

/// Files keep their directories, because requirements files name each other.
fn copy_manifests(out: &mut String, copies: &[String]) -> std::fmt::Result {
    let mut by_directory: Vec<(&str, Vec<&str>)> = Vec::new();
    for path in copies {
        let directory = path.rsplit_once('/').map_or("", |(directory, _)| directory);
        match by_directory.iter_mut().find(|(known, _)| *known == directory) {
            Some((_, paths)) => paths.push(path),
            None => by_directory.push((directory, vec![path])),
        }
    }
    for (directory, paths) in by_directory {
        let target = if directory.is_empty() { "./".to_owned() } else { format!("./{directory}/") };
        if paths.iter().any(|path| path.contains(char::is_whitespace)) {
            let words: Vec<String> = paths.iter().map(|path| (*path).to_owned()).chain([target]).collect();
            writeln!(out, "COPY {}", exec_form(&words))?;
        } else {
            writeln!(out, "COPY {} {target}", paths.join(" "))?;
        }
    }
    Ok(())
}
