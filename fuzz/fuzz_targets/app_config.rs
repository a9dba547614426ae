//! fly.toml, dunlin.toml and Procfiles as anybody writes them.
#![no_main]

use dunlin_model::config;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let _ = config::parse(text, "fly.toml");
    let _ = config::parse(text, "dunlin.toml");
    let _ = config::procfile::parse(text, "Procfile");
});
