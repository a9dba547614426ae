//! Makes a base image by hand: `bootstrap-image KIND STORE WORK`.
use dunlin_registry::{ContentStore, bootstrap};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [kind, store, work] = &args[..] else { return Err("give a kind, a store and a work folder".into()) };
    bootstrap(kind.parse()?, &ContentStore::open(store)?, work.as_ref(), |line| println!("{line}"))?;
    Ok(())
}
