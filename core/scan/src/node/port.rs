//! Where a Node.js app listens.

use super::package::Package;
use super::scripts::Call;
use crate::Evidence;
use crate::javascript::{listening, tokens};
use crate::python_port::Listens;
use crate::tree::Files;

pub(super) const DEFAULT_PORT: u16 = 8080;
/// Entry files when nothing names one.
const ENTRIES: &[&str] = &["server", "index", "app", "main", "src/index", "src/server", "src/app", "src/main"];
const ENDINGS: &[&str] = &["js", "mjs", "cjs", "ts", "mts", "cts"];
/// Directories that a build writes to; the source of what is there lies in `src`, or beside them.
const BUILT: &[&str] = &["dist", "build", "lib", "out"];
/// Programs whose first argument is the file that runs.
const RUNNERS: &[&str] = &[
    "node", "nodemon", "ts-node", "ts-node-dev", "ts-node-esm", "tsx", "babel-node", "node-dev", "pm2-runtime", "swc-node", "esr", "bun",
];
/// Options of these that take a word.
const OPTIONS_WITH_A_WORD: &[&str] = &["-r", "--require", "--import", "--loader", "--experimental-loader", "-P", "--project", "--ext", "-e", "-w"];
/// Frameworks whose server reads PORT by itself.
const READ_PORT: &[&str] = &["next", "nuxt", "@remix-run/serve", "@react-router/serve", "astro", "@sveltejs/kit"];

/// Where it will listen, and why.
pub(super) fn find(files: &Files<'_>, package: &Package, calls: &[Call], evidence: &mut Vec<Evidence>, notes: &mut Vec<String>) -> (u16, String) {
    for path in sources(files, package, calls) {
        let Some(text) = files.text(&path) else { continue };
        let found = listening(&tokens(&text));
        if let Some(line) = found.loopback {
            notes.push(format!("{path}:{line} listens on the loopback address, where no request can reach it; use 0.0.0.0"));
        }
        match found.listens {
            Some(Listens::FromEnvironment { line }) => {
                evidence.push(Evidence::new(&path, line, "it reads PORT"));
                return (DEFAULT_PORT, format!("{path}:{line} listens on PORT, which the image sets"));
            }
            Some(Listens::On { port, line }) => {
                evidence.push(Evidence::new(&path, line, format!("port {port}")));
                return (port, format!("{path}:{line} says {port}"));
            }
            None => {}
        }
    }
    match READ_PORT.iter().find(|name| package.has_any_dependency(name)) {
        Some(name) => (DEFAULT_PORT, format!("{name} listens on PORT, which the image sets")),
        None => {
            notes.push(format!("nothing shows where the app listens: it must be on 0.0.0.0 and the port in PORT, {DEFAULT_PORT}"));
            (DEFAULT_PORT, "the usual one; nothing shows another".into())
        }
    }
}

/// Files that may hold the call, the likeliest first: what the command starts, the source of it, what `main` names.
fn sources(files: &Files<'_>, package: &Package, calls: &[Call]) -> Vec<String> {
    let main = package.text_of("main").map(str::to_owned);
    let named = calls.iter().filter_map(entry).chain(main);
    let named = named.flat_map(|path| spellings(path.trim_start_matches("./")));
    let conventional = ENTRIES.iter().flat_map(|stem| ENDINGS.iter().map(move |ending| format!("{stem}.{ending}")));
    let mut found: Vec<String> = Vec::new();
    for path in named.chain(conventional) {
        if files.has(&path) && !found.contains(&path) {
            found.push(path);
        }
    }
    found
}

/// The file that a program is told to run.
pub(super) fn entry(call: &Call) -> Option<String> {
    if !RUNNERS.contains(&call.program.as_str()) {
        return None;
    }
    let mut words = call.args.iter();
    while let Some(word) = words.next() {
        if OPTIONS_WITH_A_WORD.contains(&word.as_str()) {
            words.next();
        } else if !word.starts_with('-') && word != "watch" {
            return Some(word.clone());
        }
    }
    None
}

/// `dist/app.js` is made from `src/app.ts` or `app.ts`; `app` means `app.js` or `app/index.js`.
fn spellings(path: &str) -> Vec<String> {
    let stem = path.rsplit_once('.').filter(|(_, ending)| ENDINGS.contains(ending)).map_or(path, |(stem, _)| stem);
    let mut stems = vec![stem.to_owned()];
    if let Some((first, rest)) = stem.split_once('/')
        && BUILT.contains(&first)
    {
        stems.extend([format!("src/{rest}"), rest.to_owned()]);
    }
    let with_endings = stems.iter().flat_map(|stem| {
        let indexed = if stem == path { Some(format!("{stem}/index")) } else { None };
        [Some(stem.clone()), indexed].into_iter().flatten().flat_map(|stem| ENDINGS.iter().map(move |ending| format!("{stem}.{ending}")))
    });
    [path.to_owned()].into_iter().chain(with_endings).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_told_what_to_run() {
        let check = |line: &str, expected: Option<&str>| {
            let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
            let call = Call { program: words[0].clone(), args: words[1..].to_vec() };
            assert_eq!(entry(&call).as_deref(), expected, "{line}");
        };
        check("node --enable-source-maps dist/index.js --port 3", Some("dist/index.js"));
        check("node -r dotenv/config server.js", Some("server.js"));
        check("tsx watch src/server.ts", Some("src/server.ts"));
        check("nodemon", None);
        check("next start", None);
    }

    #[test]
    fn built_files_have_sources() {
        let spelled = spellings("dist/api/app.js");
        for expected in ["dist/api/app.js", "src/api/app.ts", "api/app.ts", "src/api/app.mts"] {
            assert!(spelled.iter().any(|path| path == expected), "{expected} in {spelled:?}");
        }
        assert!(spellings("lib/app").contains(&"lib/app/index.js".to_owned()) && spellings("src").contains(&"src/index.ts".to_owned()));
    }
}
