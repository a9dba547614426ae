//! The supervisor's personality alone, and a small agent, for the tests of this crate.

use std::io::Write;

fn main() {
    match std::env::args().nth(1) {
        Some(argument) if dunlin_runtime::is_personality(&argument) => dunlin_runtime::supervisor_main(),
        Some(argument) if argument == "spawn" => spawn(),
        _ => {
            eprintln!("this is the supervisor of the tests; it is started by them");
            std::process::exit(2);
        }
    }
}

/// Starts the machine that standard input describes, says so, and waits to be killed.
fn spawn() {
    let spec = serde_json::Deserializer::from_reader(std::io::stdin());
    let spec: dunlin_runtime::SupervisorSpec =
        serde::Deserialize::deserialize(&mut { spec }).expect("a spec on standard input");
    let exe = dunlin_runtime::SealedExe::new().expect("memfd");
    dunlin_runtime::spawn(&exe, &spec).expect("a machine");
    println!("up");
    std::io::stdout().flush().expect("standard output");
    loop {
        std::thread::park();
    }
}
