//! The real binary, as people use it. One test binary, because linking is slow on two cores.

mod apps;
mod clients;
mod console;
mod containers;
mod control_lost;
mod deploys;
mod disk;
mod endure;
mod errors;
mod exec;
mod faults;
mod fleet;
mod fleet_upgrades;
mod host_debug;
mod hostile;
mod kills;
mod liar;
mod machines;
mod poison;
mod registry;
mod rootless;
mod secrets;
mod server;
mod storm;
mod upgrades;
mod volumes;
