//! `cargo xtask tidy`: the house rules as a test.
//!
//! Dependency edges as ARCHITECTURE.md has them, cores that build where there is no operating system,
//! `unsafe` only where it is allowed, files that stay one thing.

use crate::sh;
use anyhow::{Context, bail};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Each crate and the crates of ours that it may use. A crate that is not here fails the check.
const EDGES: &[(&str, &[&str])] = &[
    ("dunlin-model", &[]),
    ("dunlin-view", &["dunlin-model"]),
    ("dunlin-scan", &["dunlin-model", "dunlin-view"]),
    ("dunlin-planner", &["dunlin-model", "dunlin-view"]),
    ("dunlin-machine", &["dunlin-model", "dunlin-view"]),
    ("dunlin-routing", &["dunlin-model", "dunlin-view"]),
    ("dunlin-gossip", &[]),
    ("dunlin-api", &["dunlin-model", "dunlin-view"]),
    ("dunlin-store", &["dunlin-model"]),
    ("dunlin-cluster", &["dunlin-model", "dunlin-view", "dunlin-gossip"]),
    ("dunlin-runtime", &["dunlin-model"]),
    ("dunlin-registry", &["dunlin-model", "dunlin-cluster"]),
    ("dunlin-builder", &["dunlin-model", "dunlin-api", "dunlin-registry"]),
    ("dunlin-proxy", &["dunlin-model", "dunlin-view", "dunlin-routing", "dunlin-api", "dunlin-cluster"]),
    (
        "dunlin-host",
        &[
            "dunlin-model", "dunlin-view", "dunlin-machine", "dunlin-api", "dunlin-cluster", "dunlin-runtime",
            "dunlin-registry",
        ],
    ),
    (
        "dunlin-control",
        &[
            "dunlin-model", "dunlin-view", "dunlin-planner", "dunlin-api", "dunlin-store", "dunlin-cluster",
            "dunlin-registry", "dunlin-builder",
        ],
    ),
    ("dunlin-cli", &["dunlin-model", "dunlin-view", "dunlin-scan", "dunlin-api"]),
];
/// They wire or test everything.
const UNRESTRICTED: &[&str] = &["dunlin", "dunlin-e2e", "dunlin-sim", "xtask"];
/// A core decides: these would let it act.
const BANNED_IN_CORE: &[&str] = &["tokio", "hyper", "nix", "libc", "rustix", "getrandom", "async-trait"];
/// C code and keys of its own; aws-lc-rs is the one TLS backend.
const BANNED_EVERYWHERE: &[&str] = &["ring", "openssl-sys"];
/// Where servers and people's commands run. quinn names ring for browsers, where nothing of this is built.
const BUILT_FOR: &[&str] =
    &["x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu", "aarch64-apple-darwin", "x86_64-pc-windows-msvc"];
const UNSAFE_ALLOWED: &[&str] = &["crates/runtime"];
const MAX_LINES: usize = 700;
/// Longer files, each with its reason.
const LONGER: &[(&str, &str)] = &[];
const CORES: &[&str] =
    &["dunlin-model", "dunlin-view", "dunlin-scan", "dunlin-planner", "dunlin-machine", "dunlin-routing", "dunlin-gossip"];

pub fn run() -> anyhow::Result<()> {
    let mut problems = Vec::new();
    edges(&mut problems)?;
    files(&mut problems)?;
    if !problems.is_empty() {
        bail!("house rules are broken:\n  {}", problems.join("\n  "));
    }
    cores_without_a_system()?;
    println!("tidy: edges, bans, unsafe and file lengths are in order");
    Ok(())
}

fn edges(problems: &mut Vec<String>) -> anyhow::Result<()> {
    let text = sh::output(sh::cargo().args(["metadata", "--format-version", "1", "--no-deps"]))?;
    let metadata: serde_json::Value = serde_json::from_str(&text)?;
    let allowed: BTreeMap<&str, &[&str]> = EDGES.iter().copied().collect();
    for package in metadata["packages"].as_array().context("cargo metadata names no packages")? {
        let name = package["name"].as_str().unwrap_or_default();
        if UNRESTRICTED.contains(&name) {
            continue;
        }
        let Some(allowed) = allowed.get(name) else {
            problems.push(format!("{name} is not in ARCHITECTURE.md's table: add its edges to xtask/src/tidy.rs"));
            continue;
        };
        let in_core = package["manifest_path"].as_str().unwrap_or_default().contains("/core/");
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            if dependency["kind"].as_str() == Some("dev") {
                continue;
            }
            let used = dependency["name"].as_str().unwrap_or_default();
            if used.starts_with("dunlin") && !allowed.contains(&used) {
                problems.push(format!("{name} uses {used}, an edge that the architecture forbids"));
            }
            if in_core && BANNED_IN_CORE.contains(&used) {
                problems.push(format!("core crate {name} uses {used}: core decides and never acts"));
            }
        }
    }
    // Of what is built, not of Cargo.lock: that also names what nobody turned on.
    let mut tree = vec!["tree", "--workspace", "--edges", "all", "--prefix", "none", "--format", "{p}"];
    BUILT_FOR.iter().for_each(|target| tree.extend(["--target", target]));
    let tree = sh::output(sh::cargo().args(tree))?;
    for banned in BANNED_EVERYWHERE {
        if tree.lines().any(|line| line.split(' ').next() == Some(banned)) {
            problems.push(format!("{banned} is built; find who brings it with `cargo tree -i {banned}`"));
        }
    }
    Ok(())
}

fn files(problems: &mut Vec<String>) -> anyhow::Result<()> {
    let root = sh::root();
    let mut stack: Vec<PathBuf> = ["core", "crates", "tests", "xtask"].iter().map(|dir| root.join(dir)).collect();
    while let Some(dir) = stack.pop() {
        for entry in std::fs::read_dir(&dir).with_context(|| format!("{} cannot be read", dir.display()))? {
            let path = entry?.path();
            if path.is_dir() {
                stack.push(path);
            } else if path.extension().is_some_and(|ext| ext == "rs") {
                file(&path, path.strip_prefix(&root)?, problems)?;
            }
        }
    }
    Ok(())
}

fn file(path: &Path, name: &Path, problems: &mut Vec<String>) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(path)?;
    let name = name.display().to_string();
    let lines = text.lines().count();
    if lines > MAX_LINES && !LONGER.iter().any(|(longer, _)| *longer == name) {
        problems.push(format!("{name} has {lines} lines, more than {MAX_LINES}: is it still one thing?"));
    }
    // Split so that this line is not found by itself.
    let keyword = concat!("unsafe", " ");
    let mut previous_has_reason = false;
    for (number, line) in text.lines().enumerate() {
        let code = line.split("//").next().unwrap_or_default();
        let is_unsafe = code.contains(&format!("{keyword}{{")) || code.contains(&format!("{keyword}fn"))
            || code.contains(&format!("{keyword}impl"));
        if is_unsafe && !UNSAFE_ALLOWED.iter().any(|allowed| name.starts_with(allowed)) {
            problems.push(format!("{name}:{}: this crate may not contain unsafe code", number + 1));
        }
        if is_unsafe && !previous_has_reason && !line.contains("SAFETY:") {
            problems.push(format!("{name}:{}: no SAFETY line before it", number + 1));
        }
        let trimmed = line.trim_start();
        previous_has_reason = line.contains("SAFETY:")
            || line.contains("/// # Safety")
            || (previous_has_reason && (trimmed.starts_with("//") || trimmed.starts_with("#[") || !trimmed.ends_with(';') && !trimmed.is_empty()));
    }
    Ok(())
}

/// Builds the cores for a target that has no clock, files, sockets or threads.
fn cores_without_a_system() -> anyhow::Result<()> {
    const TARGET: &str = "wasm32-unknown-unknown";
    let packages = CORES.iter().flat_map(|name| ["--package", name]);
    let installed = sh::output(Command::new("rustc").args(["--print", "sysroot"]))?;
    let std_of_target = Path::new(installed.trim()).join("lib/rustlib").join(TARGET);
    if !std_of_target.exists() {
        let added = Command::new("rustup")
            .args(["target", "add", TARGET])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success());
        if !added {
            println!("tidy: NOT CHECKED that cores build for {TARGET}: rustup could not fetch its standard library");
            return Ok(());
        }
    }
    sh::run(sh::cargo().args(["check", "--quiet", "--target", TARGET]).args(packages))
}
