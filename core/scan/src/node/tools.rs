//! Tools with a development server, and what takes its place in production: a directory that the build makes, or
//! a server of their own.

use super::package::Package;
use super::scripts::Call;
use crate::javascript::{setting, tokens};
use crate::tree::Files;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tool {
    Angular,
    Astro,
    Cra,
    Docusaurus,
    Eleventy,
    Ember,
    Gatsby,
    Next,
    Nuxt,
    Parcel,
    ReactRouter,
    Snowpack,
    SvelteKit,
    Vite,
    VitePress,
    VueCli,
    Webpack,
    /// Serves the files as they lie there.
    Files,
    /// Has nothing for production.
    Workbench,
}

/// How pages are found that no file is named like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pages {
    /// Every page is a file.
    Files,
    /// One page, whose script reads the address.
    Single,
}

pub(crate) enum Production {
    Site { directory: String, pages: Pages },
    Server { command: Vec<String> },
    None(String),
}

impl Tool {
    pub fn name(self) -> &'static str {
        match self {
            Self::Angular => "Angular",
            Self::Astro => "Astro",
            Self::Cra => "Create React App",
            Self::Docusaurus => "Docusaurus",
            Self::Eleventy => "Eleventy",
            Self::Ember => "Ember",
            Self::Gatsby => "Gatsby",
            Self::Next => "Next.js",
            Self::Nuxt => "Nuxt",
            Self::Parcel => "Parcel",
            Self::ReactRouter => "React Router",
            Self::Snowpack => "Snowpack",
            Self::SvelteKit => "SvelteKit",
            Self::Vite => "Vite",
            Self::VitePress => "VitePress",
            Self::VueCli => "Vue CLI",
            Self::Webpack => "webpack",
            Self::Files => "a server for files",
            Self::Workbench => "a workbench",
        }
    }

    /// What builds it when no script does.
    pub fn build_command(self) -> Option<&'static str> {
        Some(match self {
            Self::Angular => "npx ng build",
            Self::Astro => "npx astro build",
            Self::Cra => "npx react-scripts build",
            Self::Docusaurus => "npx docusaurus build",
            Self::Eleventy => "npx @11ty/eleventy",
            Self::Ember => "npx ember build --environment=production",
            Self::Gatsby => "npx gatsby build",
            Self::Next => "npx next build",
            Self::Nuxt => "npx nuxt build",
            Self::SvelteKit | Self::Vite => "npx vite build",
            Self::VueCli => "npx vue-cli-service build",
            Self::ReactRouter | Self::Parcel | Self::Snowpack | Self::VitePress | Self::Webpack | Self::Files | Self::Workbench => return None,
        })
    }
}

/// Whether a program is a development server: it builds on request, watches files, and is made for one person.
pub(crate) fn dev_server(package: &Package, call: &Call) -> Option<Tool> {
    let first = call.args.iter().find(|arg| !arg.starts_with('-')).map_or("", String::as_str);
    Some(match (call.program.as_str(), first) {
        ("react-scripts" | "react-app-rewired" | "craco", "start") => Tool::Cra,
        ("vite" | "vinxi", "" | "dev" | "serve" | "preview" | ".") => vite_kind(package),
        ("svelte-kit", "dev" | "preview") => Tool::SvelteKit,
        ("ng", "serve" | "s") => Tool::Angular,
        ("next", "" | "dev") => Tool::Next,
        ("nuxt" | "nuxi" | "nuxt-cli", "" | "dev" | "preview") => Tool::Nuxt,
        ("vue-cli-service", "" | "serve") => Tool::VueCli,
        ("gatsby", "develop" | "serve") => Tool::Gatsby,
        ("astro", "dev" | "start" | "preview") => Tool::Astro,
        ("webpack", "serve" | "server") | ("webpack-dev-server", _) => Tool::Webpack,
        ("parcel", first) if !["build", "watch", "help"].contains(&first) => Tool::Parcel,
        ("docusaurus", "start" | "serve") => Tool::Docusaurus,
        ("remix" | "react-router", "dev" | "vite:dev") => Tool::ReactRouter,
        ("ember", "serve" | "server" | "s") => Tool::Ember,
        ("eleventy", _) if call.args.iter().any(|arg| arg == "--serve" || arg == "--watch") => Tool::Eleventy,
        ("vitepress" | "vuepress", "dev" | "serve" | "preview") => Tool::VitePress,
        ("snowpack", "dev" | "start") => Tool::Snowpack,
        ("live-server" | "lite-server" | "browser-sync" | "http-server" | "light-server" | "five-server", _) => Tool::Files,
        ("expo" | "storybook" | "start-storybook" | "react-native", _) => Tool::Workbench,
        _ => return None,
    })
}

/// Whether a program is such a tool's build.
pub(crate) fn builds(package: &Package, call: &Call) -> Option<Tool> {
    let first = call.args.iter().find(|arg| !arg.starts_with('-')).map_or("", String::as_str);
    Some(match (call.program.as_str(), first) {
        ("react-scripts" | "react-app-rewired" | "craco", "build") => Tool::Cra,
        ("vite" | "vinxi", "build") => vite_kind(package),
        ("ng", "build" | "b") => Tool::Angular,
        ("next", "build") => Tool::Next,
        ("nuxt" | "nuxi", "build" | "generate") => Tool::Nuxt,
        ("vue-cli-service", "build") => Tool::VueCli,
        ("gatsby", "build") => Tool::Gatsby,
        ("astro", "build") => Tool::Astro,
        ("parcel", "build") => Tool::Parcel,
        ("docusaurus", "build") => Tool::Docusaurus,
        ("remix" | "react-router", "build" | "vite:build") => Tool::ReactRouter,
        ("ember", "build") => Tool::Ember,
        ("eleventy", _) => Tool::Eleventy,
        ("vitepress" | "vuepress", "build") => Tool::VitePress,
        ("snowpack", "build") => Tool::Snowpack,
        _ => return None,
    })
}

/// Frameworks on Vite are started by its program.
fn vite_kind(package: &Package) -> Tool {
    if package.has_any_dependency("@sveltejs/kit") {
        Tool::SvelteKit
    } else if package.has_any_dependency("@remix-run/dev") || package.has_any_dependency("@react-router/dev") {
        Tool::ReactRouter
    } else {
        Tool::Vite
    }
}

/// Frameworks on Vite whose build is a server that is not known here.
const VITE_SERVERS: &[&str] = &["vinxi", "@solidjs/start", "@tanstack/react-start", "@builder.io/qwik-city", "vike", "vite-plugin-ssr", "@analogjs/platform"];

/// What runs in production. `build` are the programs of the build script.
pub(crate) fn production(tool: Tool, files: &Files<'_>, package: &Package, build: &[Call]) -> Production {
    let site = |directory: &str, pages: Pages| Production::Site { directory: directory.to_owned(), pages };
    let none = |why: &str| Production::None(why.to_owned());
    let server = |words: &[&str]| Production::Server { command: words.iter().map(|word| (*word).to_owned()).collect() };
    let runs = |program: &str, word: &str| build.iter().any(|call| call.program == program && call.args.iter().any(|arg| arg == word));
    match tool {
        Tool::Vite => match VITE_SERVERS.iter().find(|name| package.has_any_dependency(name)) {
            Some(name) => Production::None(format!("{name} makes a server: add a start script that runs it")),
            None => inside(&vite_directory(files, build), Pages::Single),
        },
        Tool::Cra => site("build", Pages::Single),
        Tool::VueCli => inside(&config(files, &["vue.config.js", "vue.config.ts"], "outputDir").unwrap_or_else(|| "dist".into()), Pages::Single),
        Tool::Parcel | Tool::Webpack | Tool::Ember => site("dist", Pages::Single),
        Tool::Snowpack => site("build", Pages::Single),
        Tool::Docusaurus => site("build", Pages::Files),
        Tool::Gatsby => site("public", Pages::Files),
        Tool::Eleventy => site("_site", Pages::Files),
        Tool::Angular => angular(files),
        Tool::Astro if package.has_any_dependency("@astrojs/node") => server(&["node", "dist/server/entry.mjs"]),
        Tool::Astro if astro_setting(files).as_deref() == Some("server") => none("its pages are made on request: add @astrojs/node, which makes a server"),
        Tool::Astro => site("dist", Pages::Files),
        Tool::Next if next_output(files).as_deref() == Some("export") => site("out", Pages::Files),
        Tool::Next => server(&["node_modules/.bin/next", "start"]),
        Tool::Nuxt if runs("nuxt", "generate") || runs("nuxi", "generate") => site(".output/public", Pages::Files),
        Tool::Nuxt => server(&["node", ".output/server/index.mjs"]),
        Tool::SvelteKit if package.has_any_dependency("@sveltejs/adapter-node") => server(&["node", "build"]),
        Tool::SvelteKit if package.has_any_dependency("@sveltejs/adapter-static") => site("build", Pages::Files),
        Tool::SvelteKit => none("SvelteKit needs an adapter: add @sveltejs/adapter-node for a server or @sveltejs/adapter-static for a site"),
        Tool::ReactRouter if package.has_dependency("@react-router/serve") => server(&["node_modules/.bin/react-router-serve", "build/server/index.js"]),
        Tool::ReactRouter if package.has_dependency("@remix-run/serve") => server(&["node_modules/.bin/remix-serve", "build/server/index.js"]),
        Tool::ReactRouter => none("add @react-router/serve (or @remix-run/serve), which runs what the build makes"),
        Tool::VitePress => vitepress(build),
        Tool::Files | Tool::Workbench => none("it has no build for production"),
    }
}

/// A site in a directory that a configuration names.
fn inside(directory: &str, pages: Pages) -> Production {
    let plain = |directory: &str| !directory.is_empty() && directory.chars().all(|c| c.is_ascii_alphanumeric() || "._-/@+".contains(c));
    match crate::requirements::inside("x", directory) {
        Some(directory) if plain(&directory) => Production::Site { directory, pages },
        _ => Production::None(format!("it is built into {directory}, which is not a directory of the app's own")),
    }
}

fn vite_directory(files: &Files<'_>, build: &[Call]) -> String {
    let flag = build.iter().filter(|call| call.program == "vite").find_map(|call| {
        let at = call.args.iter().position(|arg| arg == "--outDir")?;
        call.args.get(at + 1).cloned()
    });
    let configs = ["vite.config.ts", "vite.config.js", "vite.config.mts", "vite.config.mjs"];
    let directory = flag.or_else(|| config(files, &configs, "outDir")).unwrap_or_else(|| "dist".into());
    match config(files, &configs, "root") {
        Some(root) => format!("{root}/{directory}"),
        None => directory,
    }
}

/// A setting's text in the first of these files that exists.
fn config(files: &Files<'_>, names: &[&str], key: &str) -> Option<String> {
    let text = names.iter().find_map(|name| files.text(name))?;
    setting(&tokens(&text), key).filter(|value| !value.contains("${"))
}

fn next_output(files: &Files<'_>) -> Option<String> {
    config(files, &["next.config.js", "next.config.mjs", "next.config.ts", "next.config.cjs"], "output")
}

fn astro_setting(files: &Files<'_>) -> Option<String> {
    config(files, &["astro.config.mjs", "astro.config.js", "astro.config.ts", "astro.config.mts"], "output")
}

/// `outputPath` of angular.json, with `browser/` below it where the newer builder puts it.
fn angular(files: &Files<'_>) -> Production {
    let none = |why: &str| Production::None(why.to_owned());
    let Some(workspace) = files.text("angular.json").and_then(|text| serde_json::from_str::<serde_json::Value>(&text).ok()) else {
        return none("there is no angular.json that can be read");
    };
    let projects = workspace.get("projects").and_then(|projects| projects.as_object());
    let named = workspace.get("defaultProject").and_then(|name| name.as_str());
    let project = projects.into_iter().flatten().find(|(name, project)| match named {
        Some(named) => name.as_str() == named,
        None => project.get("projectType").and_then(|kind| kind.as_str()) != Some("library"),
    });
    let Some((name, project)) = project else { return none("angular.json has no application") };
    let targets = project.get("architect").or_else(|| project.get("targets"));
    let Some(build) = targets.and_then(|targets| targets.get("build")) else { return none("angular.json has no build of the application") };
    let options = build.get("options");
    let option = |key: &str| options.and_then(|options| options.get(key));
    if option("ssr").is_some_and(|ssr| ssr.as_bool() != Some(false)) {
        return none("its pages are made on request: add a start script that runs dist/*/server/server.mjs");
    }
    let newer = build.get("builder").and_then(|builder| builder.as_str()).is_some_and(|builder| builder.ends_with(":application"));
    let output = option("outputPath");
    let base = output.and_then(|output| output.as_str().or_else(|| output.get("base")?.as_str()));
    let base = base.map_or_else(|| format!("dist/{name}"), str::to_owned);
    let browser = output.and_then(|output| output.get("browser")).and_then(|browser| browser.as_str()).unwrap_or("browser");
    inside(&if newer { format!("{base}/{browser}") } else { base }, Pages::Single)
}

/// `vitepress build docs` makes `docs/.vitepress/dist`.
fn vitepress(build: &[Call]) -> Production {
    let Some(call) = build.iter().find(|call| call.program == "vitepress" || call.program == "vuepress") else {
        return Production::None("no build script shows where its pages are".into());
    };
    let docs = call.args.iter().filter(|arg| !arg.starts_with('-')).nth(1).map_or(".", String::as_str);
    inside(&format!("{docs}/.{}/dist", call.program), Pages::Files)
}
