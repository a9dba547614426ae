//! A directory of source code, whatever is in it: scanning ends and says something.
//!
//! The input is files: a byte that picks a name, two bytes of length, the content.
#![no_main]

use dunlin_scan::{MemoryTree, scan};
use libfuzzer_sys::fuzz_target;

const NAMES: &[&str] = &[
    "Dockerfile", "package.json", "package-lock.json", "requirements.txt", "pyproject.toml", "Pipfile", "manage.py", "app.py", "go.mod",
    "main.go", "Gemfile", "Gemfile.lock", "Procfile", "Cargo.toml", "composer.json", "mix.exs", "pom.xml", "deno.json", "index.html",
    ".dockerignore", ".gitignore", "fly.toml", "server.js", "config/database.yml", ".python-version", "runtime.txt", "build.gradle",
    "next.config.js", "vite.config.ts", "src/main.rs", "bun.lockb", "yarn.lock",
];

fuzz_target!(|bytes: &[u8]| {
    let mut files = vec![];
    let mut rest = bytes;
    while let [name, low, high, after @ ..] = rest {
        let length = usize::from(u16::from_le_bytes([*low, *high])).min(after.len());
        let (content, next) = after.split_at(length);
        files.push((NAMES[usize::from(*name) % NAMES.len()].to_owned(), content.to_vec()));
        rest = next;
    }
    let _ = scan(&MemoryTree::new(files));
});
