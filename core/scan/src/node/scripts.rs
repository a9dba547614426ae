//! What the scripts of package.json run: through variables, wrappers and scripts that call each other, down to the
//! programs.

use super::package::Package;
use dunlin_model::config::words;

/// How deep scripts may call each other, and how many programs are looked at.
const MAX_DEPTH: usize = 8;
const MAX_CALLS: usize = 100;
/// Programs that set variables for the one behind them.
const WRAPPERS: &[&str] = &["cross-env", "cross-env-shell", "env-cmd", "dotenv", "dotenvx", "dotenv-flow", "varlock"];
/// Options of these and of `npx` that take a word.
const OPTIONS_WITH_A_WORD: &[&str] = &["-f", "-e", "-c", "-v", "-p", "--file", "--environments", "--package", "--names", "-n", "--prefix-colors"];
/// Words of a shell that come before a command.
const PREFIXES: &[&str] = &["exec", "time", "nohup", "command", "env", "sudo"];

/// A program that a script runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Call {
    pub program: String,
    pub args: Vec<String>,
}

/// The programs of a script, its hooks included; none without such a script.
pub(crate) fn calls_of_script(package: &Package, name: &str) -> Vec<Call> {
    let mut calls = Vec::new();
    follow_script(package, name, 0, &mut calls);
    calls
}

/// The programs of a command line.
pub(crate) fn calls_of_command(package: &Package, command: &str) -> Vec<Call> {
    let mut calls = Vec::new();
    follow_text(package, command, 0, &mut calls);
    calls
}

fn follow_script(package: &Package, name: &str, depth: usize, calls: &mut Vec<Call>) {
    if depth == MAX_DEPTH || calls.len() >= MAX_CALLS || package.script(name).is_none() {
        return;
    }
    for name in [format!("pre{name}"), name.to_owned(), format!("post{name}")] {
        if let Some(text) = package.script(&name) {
            follow_text(package, text, depth + 1, calls);
        }
    }
}

fn follow_text(package: &Package, text: &str, depth: usize, calls: &mut Vec<Call>) {
    if depth > MAX_DEPTH {
        return;
    }
    for command in commands(text) {
        if let Ok(words) = words::split(&command) {
            follow_words(package, &words, depth, calls);
        }
    }
}

/// The commands of a line, apart; quotes are kept.
fn commands(text: &str) -> Vec<String> {
    let (mut found, mut command, mut quote) = (Vec::new(), String::new(), None::<char>);
    let mut escaped = false;
    for c in text.chars() {
        match (quote, c) {
            _ if escaped => escaped = false,
            (open, '\\') if open != Some('\'') => escaped = true,
            (Some(open), c) if c == open => quote = None,
            (None, '"' | '\'') => quote = Some(c),
            (None, '&' | '|' | ';' | '\n') => {
                found.push(std::mem::take(&mut command));
                continue;
            }
            (None, '(' | ')') => continue,
            _ => {}
        }
        command.push(c);
    }
    found.push(command);
    found
}

fn follow_words(package: &Package, mut words: &[String], depth: usize, calls: &mut Vec<Call>) {
    while let [first, rest @ ..] = words {
        if calls.len() >= MAX_CALLS {
            return;
        }
        if is_assignment(first) || PREFIXES.contains(&first.as_str()) {
            words = rest;
            continue;
        }
        let program = first.rsplit('/').next().unwrap_or(first);
        let push = |calls: &mut Vec<Call>| calls.push(Call { program: program.to_owned(), args: rest.to_vec() });
        match program {
            _ if WRAPPERS.contains(&program) => {
                push(calls);
                words = after_options(rest);
            }
            "npx" | "pnpx" | "bunx" => words = after_options(rest),
            "npm" | "pnpm" | "yarn" | "bun" => {
                push(calls);
                match manager_runs(package, program, rest) {
                    Runs::Script(name) => return follow_script(package, name, depth, calls),
                    Runs::Program(program) => words = program,
                    Runs::Itself => return,
                }
            }
            "node" if rest.first().is_some_and(|word| word == "--run") => {
                push(calls);
                return rest.get(1).into_iter().for_each(|name| follow_script(package, name, depth, calls));
            }
            "run-s" | "run-p" | "npm-run-all" | "npm-run-all2" => {
                push(calls);
                return rest.iter().filter(|word| !word.starts_with('-')).for_each(|name| follow_named(package, name, depth, calls));
            }
            "concurrently" => {
                push(calls);
                return each_argument(rest).for_each(|text| match text.strip_prefix("npm:") {
                    Some(name) => follow_named(package, name, depth, calls),
                    None => follow_text(package, text, depth + 1, calls),
                });
            }
            "sh" | "bash" if rest.first().is_some_and(|word| word == "-c") => {
                return rest.get(1).into_iter().for_each(|text| follow_text(package, text, depth + 1, calls));
            }
            _ => {
                push(calls);
                // nodemon --exec "ts-node src/app.ts"
                let inner = rest.iter().position(|word| word == "--exec" || word == "-x").and_then(|at| rest.get(at + 1));
                return inner.into_iter().for_each(|text| follow_text(package, text, depth + 1, calls));
            }
        }
    }
}

fn is_assignment(word: &str) -> bool {
    word.split_once('=').is_some_and(|(name, _)| !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'))
}

fn after_options(mut words: &[String]) -> &[String] {
    while let [first, rest @ ..] = words {
        words = match first.as_str() {
            "--" => return rest,
            option if OPTIONS_WITH_A_WORD.contains(&option) => rest.get(1..).unwrap_or_default(),
            option if option.starts_with('-') || is_assignment(option) => rest,
            _ => return words,
        };
    }
    words
}

fn each_argument(words: &[String]) -> impl Iterator<Item = &String> {
    let mut skip = false;
    words.iter().filter(move |word| {
        let value = std::mem::replace(&mut skip, OPTIONS_WITH_A_WORD.contains(&word.as_str()));
        !value && !word.starts_with('-')
    })
}

enum Runs<'w> {
    Script(&'w str),
    Program(&'w [String]),
    Itself,
}

/// What `npm run build`, `yarn build`, `pnpm exec vite` and the like come to.
fn manager_runs<'w>(package: &Package, manager: &str, words: &'w [String]) -> Runs<'w> {
    let at = words.iter().position(|word| !word.starts_with('-'));
    let Some((first, rest)) = at.and_then(|at| words[at..].split_first()) else { return Runs::Itself };
    match first.as_str() {
        "run" | "run-script" => {
            let name = rest.iter().find(|word| !word.starts_with('-'));
            name.map_or(Runs::Itself, |name| Runs::Script(name))
        }
        "exec" | "x" | "dlx" => Runs::Program(after_options(rest)),
        "start" | "test" | "stop" => Runs::Script(first),
        name if manager != "npm" && package.script(name).is_some() => Runs::Script(first),
        "install" | "i" | "ci" | "add" | "prune" | "rebuild" => Runs::Itself,
        _ if manager != "npm" => Runs::Program(&words[at.unwrap_or(0)..]),
        _ => Runs::Itself,
    }
}

/// `build`, or `build:*` for all whose names begin so.
fn follow_named(package: &Package, name: &str, depth: usize, calls: &mut Vec<Call>) {
    match name.strip_suffix('*') {
        None => follow_script(package, name, depth, calls),
        Some(prefix) => {
            let names: Vec<String> = package.script_names().filter(|own| own.starts_with(prefix)).map(str::to_owned).collect();
            names.iter().for_each(|name| follow_script(package, name, depth, calls));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryTree;
    use crate::node::package::read_package;
    use crate::tree::Files;
    use proptest::prelude::*;

    fn package(scripts: &[(&str, &str)]) -> Package {
        let scripts: serde_json::Map<String, serde_json::Value> =
            scripts.iter().map(|(name, text)| ((*name).to_owned(), (*text).into())).collect();
        let tree = MemoryTree::new([("package.json", serde_json::json!({ "scripts": scripts }).to_string())]);
        read_package(&Files::of(&tree), &mut Vec::new()).unwrap()
    }

    fn check(scripts: &[(&str, &str)], expected: &[&str]) {
        let calls = calls_of_script(&package(scripts), scripts[0].0);
        let shown: Vec<String> = calls.iter().map(|call| [&[call.program.clone()][..], &call.args].concat().join(" ")).collect();
        assert_eq!(shown, expected, "{scripts:?}");
    }

    #[test]
    fn scripts_come_down_to_programs() {
        check(&[("start", "node server.js")], &["node server.js"]);
        check(&[("start", "NODE_ENV=production A=\"b c\" node ./a.js --port=1")], &["node ./a.js --port=1"]);
        check(&[("start", "cross-env NODE_ENV=x next start -p $PORT")], &["cross-env NODE_ENV=x next start -p $PORT", "next start -p $PORT"]);
        check(&[("start", "env-cmd -f .env node a.js")], &["env-cmd -f .env node a.js", "node a.js"]);
        check(&[("start", "npx --yes vite")], &["vite"]);
        check(&[("start", "./node_modules/.bin/vite --host")], &["vite --host"]);
        check(&[("start", "npm run -s dev"), ("dev", "vite")], &["npm run -s dev", "vite"]);
        check(&[("start", "yarn dev"), ("dev", "tsc && vite")], &["yarn dev", "tsc", "vite"]);
        check(&[("start", "pnpm exec nodemon a.js")], &["pnpm exec nodemon a.js", "nodemon a.js"]);
        check(&[("start", "node a.js"), ("prestart", "npm run build"), ("build", "tsc -p .")], &["npm run build", "tsc -p .", "node a.js"]);
        check(&[("start", "run-p watch:*"), ("watch:js", "esbuild"), ("watch:css", "sass")], &["run-p watch:*", "sass", "esbuild"]);
        check(&[("start", "concurrently -n a,b \"npm:api\" 'vite --host'"), ("api", "tsx api.ts")],
            &["concurrently -n a,b npm:api vite --host", "tsx api.ts", "vite --host"]);
        check(&[("start", "nodemon --exec 'ts-node src/a.ts'")], &["nodemon --exec ts-node src/a.ts", "ts-node src/a.ts"]);
        check(&[("start", "sh -c 'node a.js'")], &["node a.js"]);
        check(&[("start", "echo 'a && b'; (cd x)")], &["echo a && b", "cd x"]);
        // round and round
        check(&[("start", "npm start")], &["npm start"; MAX_DEPTH]);
        assert!(calls_of_script(&package(&[]), "start").is_empty());
    }

    proptest! {
        #[test]
        fn any_script_is_survived(text in "(npm |run |start|yarn |npx |-|concurrently |nodemon --exec |'|\"|\\\\|&&|;|\\(|\\)|=|\\PC){0,40}") {
            calls_of_script(&package(&[("start", &text), ("dev", &text)]), "start");
        }
    }
}
