//! The Dockerfiles and `.dockerignore` files that are written: readable, in stages, with comments.

mod context;
mod node;
mod python;
mod site;

pub(crate) use context::{Npmrc, dockerignore, note_secrets, npmrc};
pub(crate) use node::{Manager, NodeRecipe, NodeSource, pnpm_of_lock};
pub(crate) use python::{Install, PythonRecipe, Start};
pub(crate) use site::SiteRecipe;

use std::fmt::Write;

/// The configuration of nginx, beside the Dockerfile.
pub(crate) const NGINX_CONF: &str = "dunlin.nginx.conf";
const HEAD: &str = "# Written by `dunlin launch` for this app; yours to change from here on.\n";
/// What runs is nobody's root.
const USER: &str = "RUN useradd --uid 10001 --create-home app && install -d -o app -g app /app\n";

/// What a Dockerfile is made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Recipe {
    Python(PythonRecipe),
    Node(NodeRecipe),
    Static(SiteRecipe),
}

impl Recipe {
    /// The words that start the app on that port.
    pub fn command(&self, port: u16) -> Vec<String> {
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        match self {
            Self::Python(recipe) => match &recipe.start {
                Start::Gunicorn { target } => {
                    let bind = format!("0.0.0.0:{port}");
                    words(&["gunicorn", "--bind", &bind, "--threads", "8", "--access-logfile", "-", target])
                }
                Start::Uvicorn { target, factory } => {
                    let port = port.to_string();
                    let mut command = words(&["uvicorn", "--host", "0.0.0.0", "--port", &port, "--proxy-headers", "--forwarded-allow-ips", "*"]);
                    command.extend(factory.then(|| "--factory".to_owned()));
                    command.push(target.clone());
                    command
                }
                Start::Argv(argv) => argv.clone(),
            },
            Self::Node(recipe) => recipe.command.clone(),
            Self::Static(_) => words(&["nginx", "-e", "stderr", "-c", "/etc/nginx/nginx.conf"]),
        }
    }

    /// The text of the Dockerfile for that port.
    pub fn dockerfile(&self, port: u16) -> String {
        let mut out = HEAD.to_owned();
        // Writing to a String cannot fail.
        let _ = match self {
            Self::Python(recipe) => python::write(&mut out, recipe, port),
            Self::Node(recipe) => node::write(&mut out, recipe, port),
            Self::Static(recipe) => site::write(&mut out, recipe, port),
        };
        let _ = writeln!(out, "EXPOSE {port}\nCMD {}", exec_form(&self.command(port)));
        out
    }

    /// Further files that the Dockerfile copies.
    pub fn extra_files(&self, port: u16) -> Vec<crate::FileToWrite> {
        match self {
            Self::Static(recipe) if !recipe.configured => vec![crate::FileToWrite { path: NGINX_CONF.into(), content: site::nginx_conf(recipe.pages, port) }],
            _ => Vec::new(),
        }
    }
}

/// `[\"a\", \"b\"]`, the form that runs without a shell.
fn exec_form(words: &[String]) -> String {
    let quoted: Vec<String> = words.iter().map(|word| serde_json::Value::from(word.as_str()).to_string()).collect();
    format!("[{}]", quoted.join(", "))
}
