//! Node.js apps, started as package.json says, and sites that its tools build.

mod needs;
mod package;
mod port;
mod scripts;
mod tools;
#[cfg(test)]
mod tests;
mod version;

pub(crate) use package::{Package, read_package};
pub(crate) use tools::Pages;

use crate::generate::{self, Manager, NodeRecipe, NodeSource, Npmrc, Recipe, SiteRecipe};
use crate::javascript::{listening, tokens};
use crate::procfile::Procfile;
use crate::tree::Files;
use crate::{Detected, Evidence, Family, Found};
use dunlin_model::config::words;
use package::{Lock, NPM_LOCKS, read_lock};
use scripts::{Call, calls_of_command, calls_of_script};
use std::collections::BTreeMap;
use tools::{Production, Tool, builds, dev_server, production};

const MEMORY_MB: u32 = 512;
/// Frameworks that are named to the user.
const FRAMEWORKS: &[&str] = &["next", "nuxt", "@nestjs/core", "@remix-run/serve", "astro", "fastify", "koa", "@hapi/hapi", "express"];
/// Scripts that are for production where `start` is not.
const PRODUCTION_SCRIPTS: &[&str] = &["start:prod", "start:production", "serve:prod", "prod", "production"];
/// Programs that run an app for the person who changes it.
const WATCHERS: &[&str] = &["nodemon", "ts-node-dev", "node-dev", "nest", "tsx", "ts-node", "babel-node"];
/// Scripts that npm runs when it installs, on the sources.
const HOOKS: &[&str] = &["preinstall", "install", "postinstall", "prepare"];

/// What the files say so far.
struct Context<'a> {
    files: &'a Files<'a>,
    package: &'a Package,
    lock: Lock,
    evidence: Vec<Evidence>,
    notes: Vec<String>,
}

/// What is to run.
enum Runs {
    /// `tool` builds it when no script does.
    Server { command: Vec<String>, calls: Vec<Call>, tool: Option<Tool> },
    Site { tool: Tool, directory: String, pages: Pages },
    Nothing(String),
}

/// Whether package.json speaks of something that runs or needs something to run; a formatter of a site does not,
/// nor does a server for the files as they are.
pub(crate) fn is_program(package: &Package) -> bool {
    let serves_files = calls_of_script(package, "start").iter().any(|call| dev_server(package, call) == Some(Tool::Files));
    let needs = package.table("dependencies").next().is_some() || package.get("workspaces").is_some();
    (needs || package.script("start").is_some()) && !serves_files
}

pub(crate) fn detect(files: &Files<'_>, package: Option<&Package>, procfile: Option<&Procfile>) -> Found {
    let Some(package) = package else { return Found::Nothing };
    let mut context = Context { files, package, lock: read_lock(files), evidence: Vec::new(), notes: Vec::new() };
    let elsewhere = |version: &str| version.starts_with("workspace:") || version.starts_with("catalog:") || version.starts_with("link:..") || version.starts_with("file:..");
    if let Some((name, version)) = package.table("dependencies").find(|(_, version)| elsewhere(version)) {
        context.evidence.push(package.evidence(name, format!("{name}: {version}")));
        let why = "it depends on other packages of a workspace, which npm cannot install; write a Dockerfile";
        return Found::rejected(Family::Node, context.evidence, why);
    }
    let framework = FRAMEWORKS.iter().find(|name| package.has_dependency(name)).copied();
    context.evidence.extend(framework.map(|name| package.evidence(name, format!("depends on {name}"))));
    match what_runs(&mut context, procfile) {
        Runs::Server { command, calls, tool } => server(context, framework, command, calls, tool),
        Runs::Site { tool, directory, pages } => site(context, tool, directory, pages),
        Runs::Nothing(why) => Found::rejected(Family::Node, context.evidence, why),
    }
}

/// Procfile, start script, `server.js` (npm's default), a main that listens, the result of a build.
fn what_runs(context: &mut Context<'_>, procfile: Option<&Procfile>) -> Runs {
    let package = context.package;
    if let Some(web) = procfile.and_then(Procfile::web) {
        context.evidence.extend(procfile.and_then(Procfile::web_evidence));
        return Runs::Server { command: web.argv(), calls: calls_of_command(package, &web.command), tool: None };
    }
    let start = calls_of_script(package, "start");
    let tool = start.iter().find_map(|call| dev_server(package, call));
    if package.script("start").is_some() {
        let for_development = tool.is_some() || start.iter().any(|call| WATCHERS.contains(&call.program.as_str()) || call.args.iter().any(|arg| arg == "--watch"));
        let other = PRODUCTION_SCRIPTS.iter().find(|name| {
            let calls = calls_of_script(package, name);
            let there = package.script("build").is_some() || calls.iter().filter_map(port::entry).any(|file| context.files.has(file.trim_start_matches("./")));
            for_development && there && !calls.is_empty() && !calls.iter().any(|call| dev_server(package, call).is_some())
        });
        match (other, tool) {
            (Some(name), _) => return run_script(context, name),
            (None, None) => return run_script(context, "start"),
            (None, Some(tool)) => {
                context.evidence.push(package.evidence("start", format!("start: {}", package.script("start").unwrap_or_default())));
                return built(context, tool, &format!("the start script runs the development server of {}", tool.name()));
            }
        }
    }
    let node = |file: &str| {
        let call = Call { program: "node".into(), args: vec![file.to_owned()] };
        Runs::Server { command: vec!["node".into(), file.to_owned()], calls: vec![call], tool: None }
    };
    if context.files.has("server.js") {
        context.evidence.push(Evidence::new("server.js", None, "what npm starts when package.json names nothing"));
        return node("server.js");
    }
    if let Some((main, line)) = listening_main(context) {
        context.evidence.push(Evidence::new(&main, line, "it listens"));
        return node(&main);
    }
    let build = calls_of_script(package, "build");
    let of_build = build.iter().find_map(|call| builds(package, call));
    let of_dev = || ["dev", "serve", "develop"].iter().flat_map(|name| calls_of_script(package, name)).find_map(|call| dev_server(package, &call));
    match of_build.or_else(of_dev) {
        Some(tool) => built(context, tool, "package.json has no start script"),
        None if !build.is_empty() => {
            Runs::Nothing("package.json has a build script and no start script: if the build makes a static site, write a Dockerfile that serves it".into())
        }
        None => Runs::Nothing("package.json has no start script, and no file that listens is its main".into()),
    }
}

/// The start script, or another that is started in its place.
fn run_script(context: &mut Context<'_>, name: &str) -> Runs {
    let package = context.package;
    let script = package.script(name).unwrap_or_default();
    context.evidence.push(package.evidence(name, format!("{name}: {script}")));
    // Without npm between, the app gets the stop signal itself. Hooks around the script need npm.
    let hooked = package.script(&format!("pre{name}")).is_some() || package.script(&format!("post{name}")).is_some();
    let direct = words::split(script).ok().filter(|argv| !hooked && !words::needs_shell(script) && argv[0] == "node" && argv.len() > 1);
    let by_npm = || if name == "start" { vec!["npm".into(), "start".into()] } else { vec!["npm".into(), "run".into(), name.to_owned()] };
    let calls = calls_of_script(package, name);
    // These start what their own build made.
    let needs_build = |call: &Call| call.args.iter().any(|arg| arg == "start") && ["next", "nuxt", "nuxi"].contains(&call.program.as_str());
    let tool = calls.iter().find(|call| needs_build(call)).map(|call| if call.program == "next" { Tool::Next } else { Tool::Nuxt });
    Runs::Server { command: direct.unwrap_or_else(by_npm), calls, tool }
}

/// A library has a main too; one that listens is an app.
fn listening_main(context: &Context<'_>) -> Option<(String, usize)> {
    let main = context.package.text_of("main").unwrap_or("index.js").trim_start_matches("./");
    let main = [main.to_owned(), format!("{main}.js"), format!("{main}/index.js")].into_iter().find(|path| context.files.has(path))?;
    let call = listening(&tokens(&context.files.text(&main)?)).call?;
    Some((main, call))
}

/// What takes a development server's place.
fn built(context: &mut Context<'_>, tool: Tool, because: &str) -> Runs {
    let package = context.package;
    let build = calls_of_script(package, "build");
    if let Some(script) = package.script("build") {
        context.evidence.push(package.evidence("build", format!("build: {script}")));
    } else if tool.build_command().is_none() {
        return Runs::Nothing(format!("{because}, and there is no build script"));
    }
    match production(tool, context.files, package, &build) {
        Production::Site { directory, pages } => {
            context.notes.push(format!("{because}: what its build makes in {directory} is served"));
            Runs::Site { tool, directory, pages }
        }
        Production::Server { command } => {
            context.notes.push(format!("{because}: it is built, and {} is run", words::join(&command)));
            let calls = vec![Call { program: command[0].clone(), args: command[1..].to_vec() }];
            Runs::Server { command, calls, tool: Some(tool) }
        }
        Production::None(why) => Runs::Nothing(format!("{because}; {why}")),
    }
}

fn server(mut context: Context<'_>, framework: Option<&str>, command: Vec<String>, calls: Vec<Call>, tool: Option<Tool>) -> Found {
    let package = context.package;
    let development = needs::development_only(package, &context.lock, &calls).map(|(what, name)| (what.to_owned(), name));
    if let Some((what, name)) = &development {
        let what = if what == name { what.clone() } else { format!("{what} of {name}") };
        context.notes.push(format!(
            "the app is started by {what}, a development dependency: all of these stay in the image. A start script that runs node alone makes it smaller"
        ));
    }
    let source = source(&mut context, tool, development.is_some());
    let (port, port_reason) = port::find(context.files, package, &calls, &mut context.evidence, &mut context.notes);
    let manager_at_start = calls.iter().any(|call| source.manager.program() != "npm" && call.program == source.manager.program());
    let recipe = Recipe::Node(NodeRecipe { source, keep_development: development.is_some(), manager_at_start, command });
    Found::App(Box::new(Detected {
        family: Family::Node,
        name: framework.or(tool.map(Tool::name)).map_or("Node.js".into(), |name| format!("Node.js ({name})")),
        port,
        port_reason,
        command: recipe.command(port),
        evidence: context.evidence,
        dockerfile_path: None,
        dockerfile: Some(recipe.dockerfile(port)),
        extra_files: Vec::new(),
        dockerignore: generate::dockerignore(context.files, Family::Node),
        env: BTreeMap::new(),
        other_processes: BTreeMap::new(),
        memory_mb: MEMORY_MB,
        notes: context.notes,
        recipe: Some(recipe),
    }))
}

fn site(mut context: Context<'_>, tool: Tool, directory: String, pages: Pages) -> Found {
    let source = source(&mut context, Some(tool), true);
    if pages == Pages::Single {
        context.notes.push("addresses that no file is named like get index.html, whose script reads them".into());
    }
    let recipe = Recipe::Static(SiteRecipe::new(context.files, directory, Some(source), pages));
    let port = crate::static_site::PORT;
    Found::App(Box::new(Detected {
        family: Family::Static,
        name: format!("static site ({})", tool.name()),
        port,
        port_reason: "nginx is told to listen there".into(),
        command: recipe.command(port),
        evidence: context.evidence,
        dockerfile_path: None,
        dockerfile: Some(recipe.dockerfile(port)),
        extra_files: recipe.extra_files(port),
        dockerignore: generate::dockerignore(context.files, Family::Node),
        env: BTreeMap::new(),
        other_processes: BTreeMap::new(),
        memory_mb: crate::static_site::MEMORY_MB,
        notes: context.notes,
        recipe: Some(recipe),
    }))
}

/// How the dependencies are installed and the build is made.
fn source(context: &mut Context<'_>, tool: Option<Tool>, with_development: bool) -> NodeSource {
    let (files, package) = (context.files, context.package);
    let (manager, lock) = manager(context);
    let build = build_command(package, tool, manager.program());
    let locked = lock.is_some();
    let mut copies = vec!["package.json".to_owned()];
    copies.extend(lock);
    match generate::npmrc(files) {
        Npmrc::Plain => copies.push(".npmrc".into()),
        Npmrc::Secret => context.notes.push(
            ".npmrc has credentials, so it stays out of the build; if packages come from a private registry, write a Dockerfile that mounts it as a build secret".into(),
        ),
        Npmrc::None => {}
    }
    let listed = |table: &str| package.table(table).next().is_some();
    let has_dependencies = listed("dependencies") || listed("optionalDependencies");
    let sources_first = HOOKS.iter().any(|name| package.script(name).is_some()) || needs_more_files(files, package);
    let mut tables = vec!["dependencies", "optionalDependencies"];
    if build.is_some() || with_development {
        tables.push("devDependencies");
    }
    let (version, seen) = version::choose(files, package, &context.lock, &tables, &mut context.notes);
    context.evidence.extend(seen);
    if has_dependencies && !locked && !context.notes.iter().any(|note| note.contains("is not read")) {
        context.notes.push("there is no package-lock.json: versions are chosen at each build".into());
    }
    NodeSource {
        version: version.to_string(),
        manager,
        copies,
        installs: has_dependencies || build.is_some() || ((sources_first || with_development) && listed("devDependencies")),
        sources_first,
        build,
    }
}

/// The build script, unless it is not the one of the tool whose result is wanted.
fn build_command(package: &Package, tool: Option<Tool>, manager: &str) -> Option<String> {
    let calls = calls_of_script(package, "build");
    let of_tool = |tool: Tool| tool.build_command().filter(|_| !calls.iter().any(|call| builds(package, call) == Some(tool)));
    match tool.and_then(of_tool) {
        Some(command) => Some(command.to_owned()),
        None => package.script("build").map(|_| format!("{manager} run build")),
    }
}

/// An installation that reads files beside the manifests.
fn needs_more_files(files: &Files<'_>, package: &Package) -> bool {
    let of_this_tree = |version: &str| version.starts_with("file:") || version.starts_with("link:");
    let paths = ["dependencies", "devDependencies", "optionalDependencies"].iter().any(|table| package.table(table).any(|(_, version)| of_this_tree(version)));
    paths || package.get("workspaces").is_some() || package.get("pnpm").is_some() || files.has("pnpm-workspace.yaml")
}

/// Who installs, and the lock file that decides the versions.
fn manager(context: &mut Context<'_>) -> (Manager, Option<String>) {
    let files = context.files;
    if let Some(name) = NPM_LOCKS.iter().find(|name| files.is_sent(name)) {
        return (Manager::Npm { locked: true }, Some((*name).to_owned()));
    }
    let sent = |name: &str| files.text_up_to(name, package::MAX_LOCK).filter(|_| files.is_sent(name));
    let unread = |context: &mut Context<'_>, what: &str, tool: &str| {
        context.notes.push(format!("{what} is not read: npm installs what package.json allows, which may be other versions than {tool} would"));
    };
    if let Some(text) = sent("pnpm-lock.yaml") {
        match generate::pnpm_of_lock(&text, context.package.text_of("packageManager")) {
            Some(version) => return (Manager::Pnpm { version }, Some("pnpm-lock.yaml".into())),
            None => unread(context, "pnpm-lock.yaml, whose version is not known,", "pnpm"),
        }
    } else if let Some(text) = sent("yarn.lock") {
        if !text.contains("__metadata:") {
            return (Manager::Yarn, Some("yarn.lock".into()));
        }
        unread(context, "yarn.lock, which is of Yarn 2 or later,", "yarn");
    } else if let Some(name) = ["bun.lock", "bun.lockb"].into_iter().find(|name| files.has(name)) {
        unread(context, name, "bun");
    }
    (Manager::Npm { locked: false }, None)
}
