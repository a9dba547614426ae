//! Real machines on the running kernel: life, isolation, exec, death. Needs root and busybox.

mod containers;
mod exec;
mod hostile;
mod isolation;
mod layers;
mod life;
mod setup;
mod transfer;
mod volumes;
