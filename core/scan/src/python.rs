//! Python apps: Flask behind gunicorn, FastAPI behind uvicorn, and programs that listen themselves.

use crate::generate::{self, Install, PythonRecipe, Recipe, Start};
use crate::manifest::{self, Installer, Manifest};
use crate::native;
use crate::procfile::Procfile;
use crate::python_port::{Listens, binds_loopback, listens};
use crate::python_source::{AppObject, Line, app_object, lines, main_guard};
use crate::python_version;
use crate::tree::Files;
use crate::{Detected, Evidence, Family, Found};
use std::collections::BTreeMap;

/// Files that hold an app by convention, the preferred first.
const ENTRIES: &[&str] = &["app.py", "wsgi.py", "asgi.py", "main.py", "application.py", "server.py", "run.py", "api.py", "index.py"];
/// Programs that are started by themselves.
const PROGRAMS: &[&str] = &["main.py", "app.py", "server.py", "run.py", "__main__.py"];
/// Packages that are not the app.
const NOT_PACKAGES: &[&str] = &["tests", "test", "docs", "doc", "examples", "example", "scripts", "migrations", "alembic", "node_modules"];
/// Most files that are looked at for an app object.
const MAX_ENTRIES: usize = 40;
const DEFAULT_PORT: u16 = 8080;
const MEMORY_MB: u32 = 256;
/// Libraries that do not fit into that.
const HEAVY: &[&str] = &["numpy", "pandas", "scipy", "torch", "tensorflow", "scikit-learn", "transformers", "opencv-python"];
const HEAVY_MEMORY_MB: u32 = 1024;

/// A file that may hold the app.
struct Module {
    path: String,
    lines: Vec<Line>,
}

struct Context<'a> {
    files: &'a Files<'a>,
    manifest: Option<Manifest>,
    procfile: Option<&'a Procfile>,
    modules: Vec<Module>,
}

pub(crate) fn detect(files: &Files<'_>, procfile: Option<&Procfile>, warnings: &mut Vec<String>) -> Vec<Found> {
    let manifest = manifest::read(files, warnings);
    let modules: Vec<Module> = entry_paths(files)
        .into_iter()
        .filter_map(|path| files.text(&path).map(|text| Module { path, lines: lines(&text) }))
        .collect();
    if manifest.is_none() && modules.is_empty() {
        return Vec::new();
    }
    let context = Context { files, manifest, procfile, modules };
    let mut found = vec![framework(&context, Family::Flask), framework(&context, Family::FastApi)];
    if !found.iter().any(|found| matches!(found, Found::App(_))) {
        found.push(program(&context));
    }
    found
}

/// Conventional names at the root and in packages, `src/` included.
fn entry_paths(files: &Files<'_>) -> Vec<String> {
    let mut paths: Vec<String> = ENTRIES.iter().filter(|name| files.has(name)).map(|name| (*name).to_owned()).collect();
    for path in files.paths() {
        let inner = path.strip_prefix("src/").unwrap_or(path);
        let Some((package, name)) = inner.rsplit_once('/') else {
            if inner != path && ENTRIES.contains(&inner) {
                paths.push(path.to_owned());
            }
            continue;
        };
        let identifier = package.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        if identifier && !NOT_PACKAGES.contains(&package) && (name == "__init__.py" || ENTRIES.contains(&name)) {
            paths.push(path.to_owned());
        }
        if paths.len() >= MAX_ENTRIES {
            break;
        }
    }
    paths
}

/// Flask or FastAPI: the dependency, and an app object or a Procfile that names one.
fn framework(context: &Context<'_>, family: Family) -> Found {
    let (package, class) = if family == Family::Flask { ("flask", "Flask") } else { ("fastapi", "FastAPI") };
    let objects: Vec<(&Module, AppObject)> =
        context.modules.iter().filter_map(|module| Some((module, app_object(&module.lines, package, class)?))).collect();
    let chosen = objects.iter().find(|(_, object)| matches!(object, AppObject::Object { .. })).or(objects.first());
    let mut evidence = Vec::new();
    let dependency = context.manifest.as_ref().and_then(|manifest| manifest.dependency(package));
    evidence.extend(dependency.map(|dependency| dependency.evidence.clone()));
    if let Some((module, object)) = chosen {
        evidence.push(match object {
            AppObject::Object { name, line } => Evidence::new(&module.path, *line, format!("{name} = {}(...)", value_name(module, *line, class))),
            AppObject::Factory { name, line } => Evidence::new(&module.path, *line, format!("def {name}(), which makes a {class} app")),
        });
    }
    let web = context.procfile.and_then(Procfile::web);
    match (dependency, chosen, web) {
        (None, None, _) => Found::Nothing,
        (None, Some((module, _)), _) => {
            let why = match &context.manifest {
                Some(manifest) => format!("{} uses {class}, but {} does not list {package}", module.path, manifest.file),
                None => format!("{} uses {class}, but there is no requirements.txt or pyproject.toml that lists {package}", module.path),
            };
            Found::rejected(family, evidence, why)
        }
        (Some(_), None, None) => {
            let why = format!("no file holds an app object: looked for `app = {class}(...)` or `def create_app():` in {}", ENTRIES[..4].join(", "));
            Found::rejected(family, evidence, why)
        }
        (Some(_), chosen, _) => {
            let target = chosen.map(|(module, object)| target(module, object));
            app(context, family, evidence, target)
        }
    }
}

/// What is called on that line: the class, or a factory.
fn value_name(module: &Module, line: usize, class: &str) -> String {
    let tokens = module.lines.iter().find(|own| own.number == line).map(|own| own.tokens.as_slice()).unwrap_or_default();
    let equals = tokens.iter().position(|token| token.is_op('=')).unwrap_or(0);
    let first = tokens.get(equals + 1).and_then(|token| token.name()).unwrap_or(class);
    if ["create_app", "make_app"].contains(&first) { first.to_owned() } else { class.to_owned() }
}

/// `module:object`; `true` when it is a factory.
fn target(module: &Module, object: &AppObject) -> (String, bool) {
    let path = module.path.strip_prefix("src/").unwrap_or(&module.path);
    let path = path.strip_suffix(".py").unwrap_or(path);
    let dotted = path.strip_suffix("/__init__").unwrap_or(path).replace('/', ".");
    match object {
        AppObject::Object { name, .. } => (format!("{dotted}:{name}"), false),
        AppObject::Factory { name, .. } => (format!("{dotted}:{name}"), true),
    }
}

/// A program: `main.py` and the like that runs when started, or a Procfile that says what to start.
fn program(context: &Context<'_>) -> Found {
    let files = context.files;
    if let Some(django) = context.manifest.as_ref().and_then(|manifest| manifest.dependency("django"))
        && context.procfile.and_then(Procfile::web).is_none()
    {
        let why = "Django is not recognised yet: write a Dockerfile, or a Procfile with a web process";
        return Found::rejected(Family::Python, vec![django.evidence.clone()], why);
    }
    let mut evidence: Vec<Evidence> =
        context.manifest.iter().map(|manifest| Evidence::new(&manifest.file, None, "Python dependencies")).collect();
    if let Some(web) = context.procfile.and_then(Procfile::web_evidence) {
        if context.manifest.is_none() && !files.paths().any(|path| path.ends_with(".py")) {
            return Found::Nothing; // a Procfile alone says nothing about the language
        }
        evidence.push(web);
        return app(context, Family::Python, evidence, None);
    }
    let entry = PROGRAMS.iter().filter_map(|name| context.modules.iter().find(|module| module.path == *name)).find_map(|module| {
        match (main_guard(&module.lines), listens(&module.lines)) {
            (Some(line), _) => Some((module, Evidence::new(&module.path, line, "if __name__ == \"__main__\""))),
            (None, Some(Listens::On { line, .. })) => Some((module, Evidence::new(&module.path, line, "it listens when it is run"))),
            _ => None,
        }
    });
    match entry {
        Some((module, seen)) => {
            evidence.push(seen);
            app(context, Family::Python, evidence, Some((module.path.clone(), false)))
        }
        None if context.manifest.is_some() => {
            let why = format!(
                "nothing says what to start: looked for `if __name__ == \"__main__\"` in {}, and for a Procfile with a web process",
                PROGRAMS[..4].join(", ")
            );
            Found::rejected(Family::Python, evidence, why)
        }
        None => Found::Nothing,
    }
}

/// The app; `target` is `module:object` for a framework and the file for a program.
fn app(context: &Context<'_>, family: Family, mut evidence: Vec<Evidence>, target: Option<(String, bool)>) -> Found {
    let mut notes = Vec::new();
    let manifest = context.manifest.as_ref();
    let (version, version_evidence) = python_version::choose(context.files, manifest, &mut notes);
    if version != python_version::DEFAULT_PYTHON {
        notes.push(format!("python:{version}-slim must come from a registry; python:{}-slim can be made here", python_version::DEFAULT_PYTHON));
    }
    evidence.extend(version_evidence);
    let web = context.procfile.and_then(Procfile::web);
    let start = match (web, family, target) {
        (Some(web), _, _) => {
            evidence.extend(context.procfile.and_then(Procfile::web_evidence).filter(|web| !evidence.contains(web)));
            Start::Argv(web.argv())
        }
        (None, Family::Flask, Some((target, factory))) => Start::Gunicorn { target: if factory { target + "()" } else { target } },
        (None, Family::FastApi, Some((target, factory))) => Start::Uvicorn { target, factory },
        (None, _, Some((file, _))) => Start::Argv(vec!["python3".into(), file]),
        (None, _, None) => return Found::Nothing,
    };
    let add = missing_server(&start, manifest);
    if let Some(server) = add {
        let file = manifest.map_or("the manifest", |manifest| &manifest.file);
        notes.push(format!("{file} does not list {server}; the Dockerfile installs it to serve the app"));
    }
    let (port, port_reason) = port(context, &start, &mut evidence, &mut notes);
    let heavy = HEAVY.iter().find(|name| manifest.is_some_and(|manifest| manifest.dependency(name).is_some()));
    if let Some(heavy) = heavy {
        notes.push(format!("{heavy} needs memory: {HEAVY_MEMORY_MB} MB are proposed"));
    }
    let src_layout = context.modules.iter().any(|module| module.path.starts_with("src/"));
    let install = manifest.map(|manifest| Install {
        installer: manifest.installer,
        copies: manifest.copies.clone(),
        sources_first: manifest.reads_sources || manifest.installer == Installer::Package,
        from_git: manifest.from_git,
    });
    let packages = manifest.map(|manifest| native::packages(manifest, &mut notes)).unwrap_or_default();
    let recipe = Recipe::Python(PythonRecipe { version, install, packages, add, src_layout, start });
    Found::App(Box::new(Detected {
        family,
        name: family.name().into(),
        port,
        port_reason,
        command: recipe.command(port),
        evidence,
        dockerfile_path: None,
        dockerfile: Some(recipe.dockerfile(port)),
        extra_files: Vec::new(),
        dockerignore: generate::dockerignore(context.files, family),
        env: BTreeMap::new(),
        other_processes: BTreeMap::new(),
        memory_mb: if heavy.is_some() { HEAVY_MEMORY_MB } else { MEMORY_MB },
        notes,
        recipe: Some(recipe),
    }))
}

/// The server that the command needs and the dependencies do not bring.
fn missing_server(start: &Start, manifest: Option<&Manifest>) -> Option<&'static str> {
    let needed = match start {
        Start::Gunicorn { .. } => "gunicorn",
        Start::Uvicorn { .. } => "uvicorn",
        Start::Argv(argv) => {
            let line = argv.last().filter(|_| argv.first().is_some_and(|first| first == "sh"));
            let mut words = line.map_or(argv.as_slice()[0].as_str(), String::as_str).split_whitespace();
            let first = words.next().filter(|word| *word != "exec").or_else(|| words.next())?;
            ["gunicorn", "uvicorn"].into_iter().find(|server| *server == first)?
        }
    };
    let has = |name: &str| manifest.and_then(|manifest| manifest.dependency(name));
    // FastAPI's `standard` and `all` bring uvicorn along.
    let brought = needed == "uvicorn" && has("fastapi").is_some_and(|d| d.extras.iter().any(|extra| extra == "standard" || extra == "all"));
    (has(needed).is_none() && !brought).then_some(needed)
}

/// Where it will listen, and why.
fn port(context: &Context<'_>, start: &Start, evidence: &mut Vec<Evidence>, notes: &mut Vec<String>) -> (u16, String) {
    let is_server = !matches!(start, Start::Argv(_));
    // A program is one file; a framework's port may be named wherever it is run by hand.
    let modules: Vec<&Module> = match start {
        Start::Argv(argv) => {
            let named: Vec<&Module> = context.modules.iter().filter(|module| argv.last() == Some(&module.path)).collect();
            if named.is_empty() { context.modules.iter().collect() } else { named }
        }
        _ => context.modules.iter().collect(),
    };
    if let Start::Argv(argv) = start
        && argv.iter().any(|word| word.contains("$PORT") || word.contains("${PORT"))
    {
        return (DEFAULT_PORT, "the Procfile's command listens on $PORT, which the image sets".into());
    }
    if !is_server {
        for module in &modules {
            if let Some(line) = binds_loopback(&module.lines) {
                notes.push(format!("{}:{line} listens on the loopback address, where no request can reach it; use 0.0.0.0", module.path));
            }
        }
    }
    let found = modules.iter().find_map(|module| Some((module, listens(&module.lines)?)));
    match found {
        Some((module, Listens::FromEnvironment { line })) => {
            evidence.push(Evidence::new(&module.path, line, "it reads PORT"));
            (DEFAULT_PORT, format!("{}:{line} listens on PORT, which the image sets", module.path))
        }
        Some((module, Listens::On { port, line })) => {
            evidence.push(Evidence::new(&module.path, line, format!("port {port}")));
            (port, format!("{}:{line} says {port}", module.path))
        }
        None if is_server => (DEFAULT_PORT, "the usual one; the start command listens there".into()),
        None => {
            notes.push(format!("nothing shows where the app listens: it must be on 0.0.0.0 and the port in PORT, {DEFAULT_PORT}"));
            (DEFAULT_PORT, "the usual one; nothing shows another".into())
        }
    }
}
