//! Static sites: an `index.html` where sites have it.

use crate::generate::{self, Recipe, SiteRecipe};
use crate::node::{Package, Pages, is_program};
use crate::tree::Files;
use crate::{Detected, Evidence, Family, Found};
use std::collections::BTreeMap;

/// Directories that hold a finished site, the preferred first; the root comes last.
const DIRECTORIES: &[&str] = &["dist", "public", ""];
/// Files that say that a program runs here, and of what kind: what lies beside them is its source, not a site.
const PROGRAMS: &[(&str, &str)] = &[
    ("manage.py", "Django"),
    ("requirements.txt", "Python"),
    ("pyproject.toml", "Python"),
    ("Pipfile", "Python"),
    ("setup.py", "Python"),
    ("go.mod", "Go"),
    ("Cargo.toml", "Rust"),
    ("Gemfile", "Ruby"),
    ("config.ru", "Ruby"),
    ("composer.json", "PHP"),
    ("artisan", "PHP"),
    ("pom.xml", "Java"),
    ("build.gradle", "Java"),
    ("build.gradle.kts", "Kotlin"),
    ("build.sbt", "Scala"),
    ("project.clj", "Clojure"),
    ("mix.exs", "Elixir"),
    ("rebar.config", "Erlang"),
    ("gleam.toml", "Gleam"),
    ("deno.json", "Deno"),
    ("deno.jsonc", "Deno"),
    ("Package.swift", "Swift"),
    ("shard.yml", "Crystal"),
    ("stack.yaml", "Haskell"),
    ("build.zig", "Zig"),
    ("CMakeLists.txt", "C or C++"),
    ("Procfile", "a Procfile"),
];
/// Endings that say the same.
const ENDINGS: &[(&str, &str)] = &[
    (".php", "PHP"), (".csproj", "C#"), (".fsproj", "F#"), (".vbproj", "Visual Basic"), (".cabal", "Haskell"), (".jsp", "Java"),
    (".aspx", "ASP.NET"), (".cgi", "CGI"),
];
/// Endings that say so in the first directory; deeper they are often examples of a site about programs.
const ENDINGS_AT_ROOT: &[(&str, &str)] = &[(".py", "Python"), (".rb", "Ruby"), (".go", "Go"), (".pl", "Perl"), (".java", "Java"), (".lua", "Lua")];
pub(crate) const PORT: u16 = 8080;
pub(crate) const MEMORY_MB: u32 = 128;

/// `others` are the families that were looked for before: one that was seen and does not suffice is an app still.
pub(crate) fn detect(files: &Files<'_>, package: Option<&Package>, others: &[Found]) -> Found {
    let index = |directory: &str| if directory.is_empty() { "index.html".to_owned() } else { format!("{directory}/index.html") };
    let Some(directory) = DIRECTORIES.iter().find(|directory| files.has(&index(directory))) else { return Found::Nothing };
    let mut evidence = vec![Evidence::new(index(directory), None, "the site's first page")];
    // With a build script, everything but its result is a source.
    if let Some(build) = package.and_then(|package| package.script("build"))
        && *directory != "dist"
    {
        evidence.push(Evidence::new("package.json", None, format!("build: {build}")));
        return Found::rejected(Family::Static, evidence, "package.json builds the site; deploy the result, or write a Dockerfile that builds it");
    }
    if let Some((seen, why)) = program(files, package, others, directory) {
        evidence.push(seen);
        return Found::rejected(Family::Static, evidence, why);
    }
    let mut notes = Vec::new();
    if directory.is_empty() {
        notes.push("every file of this directory that .dockerignore does not name is served".to_owned());
    } else {
        notes.push(format!("only {directory}/ is served"));
    }
    let recipe = Recipe::Static(SiteRecipe::new(files, (*directory).to_owned(), None, Pages::Files));
    Found::App(Box::new(Detected {
        family: Family::Static,
        name: Family::Static.name().into(),
        port: PORT,
        port_reason: "nginx is told to listen there".into(),
        command: recipe.command(PORT),
        evidence,
        dockerfile_path: None,
        dockerfile: Some(recipe.dockerfile(PORT)),
        extra_files: recipe.extra_files(PORT),
        dockerignore: generate::dockerignore(files, Family::Static),
        env: BTreeMap::new(),
        other_processes: BTreeMap::new(),
        memory_mb: MEMORY_MB,
        notes,
        recipe: Some(recipe),
    }))
}

/// What shows that the pages belong to a program, whose source must not be published as a site.
fn program(files: &Files<'_>, package: Option<&Package>, others: &[Found], directory: &str) -> Option<(Evidence, String)> {
    const INSTEAD: &str = "write a Dockerfile that runs it, or one that serves the pages alone";
    // A package.json of tools alone is what many sites have.
    let counts = |family: Family| family != Family::Node || package.is_none_or(is_program);
    let rejected = others.iter().find_map(|found| match found {
        Found::Rejected(candidate) if counts(candidate.family) => Some(candidate),
        _ => None,
    });
    if let Some(candidate) = rejected {
        let seen = candidate.evidence.first().cloned().unwrap_or_else(|| Evidence::new(".", None, "its files"));
        return Some((seen, format!("it belongs to a {} app, whose source would be published; {INSTEAD}", candidate.family)));
    }
    // Where everything is served, a program in any directory would be.
    let everywhere = directory.is_empty();
    let kind = |path: &str| {
        let (dir, name) = path.rsplit_once('/').unwrap_or(("", path));
        let by_name = || PROGRAMS.iter().find(|(own, _)| *own == name);
        let by_ending = || ENDINGS.iter().find(|(ending, _)| name.ends_with(ending));
        let at_root = || ENDINGS_AT_ROOT.iter().find(|(ending, _)| name.ends_with(ending)).filter(|_| dir.is_empty());
        let found = if everywhere || dir.is_empty() { by_name().or_else(by_ending) } else { None };
        let served = || by_ending().filter(|_| path.starts_with(directory));
        found.or_else(at_root).or_else(served).map(|(_, kind)| *kind)
    };
    let (path, kind) = files.paths().find_map(|path| Some((path, kind(path)?)))?;
    Some((Evidence::new(path, None, kind), format!("{path} shows a program ({kind}), whose source would be published; {INSTEAD}")))
}
